"""How commands show what they did."""

from __future__ import annotations

import logging

logger = logging.getLogger("nearfield")


def announce_stage(stage: str, state: str) -> None:
    """Log that a stage runs, or that there is nothing to do."""
    logger.info("%s: %s", stage, "up to date" if state == "done" else "running")
