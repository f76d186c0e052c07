"""How commands show what they did."""

from __future__ import annotations

import logging
import os
import warnings

logger = logging.getLogger("nearfield")


def announce_stage(stage: str, state: str) -> None:
    """Log that a stage runs, or that there is nothing to do."""
    logger.info("%s: %s", stage, "up to date" if state == "done" else "running")


def quiet_libraries() -> None:
    """Keep the bars and warnings of mteb, bm25s and transformers out of a command's output: ours say what matters.

    To be called before these are imported.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for name in ("mteb", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
