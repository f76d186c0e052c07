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

__all__ = [
    "BatchConfig",
    "CommunitiesConfig",
    "KMeansStrataConfig",
    "MixedConfig",
    "MixedPart",
    "ShuffledConfig",
    "SingleSourceConfig",
]
