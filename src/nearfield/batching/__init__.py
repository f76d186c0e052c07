"""The planner: which examples meet in which step, written to a file before training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nearfield.batching.config import (
    BatchConfig,
    CommunitiesConfig,
    KMeansStrataConfig,
    MixedConfig,
    MixedPart,
    PlannerSettings,
    ShuffledConfig,
    SingleSourceConfig,
)

if TYPE_CHECKING:
    from nearfield.batching.planner import SingleSourcePlanner, StreamPlanner
    from nearfield.batching.sampler import batch_sampler, follow_plans

__all__ = [
    "BatchConfig",
    "CommunitiesConfig",
    "KMeansStrataConfig",
    "MixedConfig",
    "MixedPart",
    "PlannerSettings",
    "ShuffledConfig",
    "SingleSourceConfig",
    "SingleSourcePlanner",
    "StreamPlanner",
    "batch_sampler",
    "follow_plans",
]


def __getattr__(name: str) -> object:
    if name in ("SingleSourcePlanner", "StreamPlanner"):
        return getattr(importlib.import_module("nearfield.batching.planner"), name)
    if name in ("batch_sampler", "follow_plans"):
        return getattr(importlib.import_module("nearfield.batching.sampler"), name)
    raise AttributeError(f"module 'nearfield.batching' has no attribute {name!r}")
