"""The loop: chunked encoding, one gradient a step, checkpoints, exact resume."""

from __future__ import annotations

from nearfield.training.config import CheckpointConfig, ScheduleConfig, TrainingConfig

__all__ = ["CheckpointConfig", "ScheduleConfig", "TrainingConfig"]
