"""The planner: which examples meet in which step, written to a file before training."""

from __future__ import annotations

from nearfield.batching.config import BatchConfig, SingleSourceConfig

__all__ = ["BatchConfig", "SingleSourceConfig"]
