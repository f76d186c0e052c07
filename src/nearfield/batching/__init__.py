"""The planner: which examples meet in which step, written to a file before training."""

from __future__ import annotations

from nearfield.batching.config import (
    BatchConfig,
    CommunitiesConfig,
    KMeansStrataConfig,
    MixedConfig,
    MixedPart,
    ShuffledConfig,
    SingleSourceConfig,
)
from nearfield.batching.sampler import batch_sampler, follow_plans

__all__ = [
    "BatchConfig",
    "CommunitiesConfig",
    "KMeansStrataConfig",
    "MixedConfig",
    "MixedPart",
    "ShuffledConfig",
    "SingleSourceConfig",
    "batch_sampler",
    "follow_plans",
]
