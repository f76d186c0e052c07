"""The learning rate as a function of the step: no state to save."""

from __future__ import annotations

import math

from nearfield.training.config import ScheduleConfig


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of the warm-up: a share of the run, or a number."""
    return math.ceil(config.warmup * total_steps) if config.warmup < 1 else int(config.warmup)


def rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The share of the peak rate that step ``step`` (0, 1, ... total_steps - 1) uses.

    The first step of a warm-up of n uses 1 / (n + 1) and the first step after it the peak, so that no step is wasted
    on a rate of zero.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.final + (1 - config.final) * shape
