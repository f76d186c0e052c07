"""Settings of the planners; ``kind`` picks one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nearfield.config import Config

if TYPE_CHECKING:
    from nearfield.batching.planner import Planner


class SingleSourceConfig(Config):
    """Shuffled global batches of one source each, no item twice in a batch."""

    kind: Literal["single_source"] = "single_source"
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Examples a step, over all devices."""
    positives: Annotated[int, Field(ge=1)] = 1
    """Positives of an example that are used in an epoch, drawn anew each epoch; fewer where it has fewer."""
    negatives: Annotated[int, Field(ge=0)] = 1
    """Explicit negatives of an example that are used in an epoch, likewise."""
    duplicates: Literal["forbid", "allow"] = "forbid"
    """Whether an item may stand twice in a batch."""
    drop_last: bool = True
    """Leave out batches that stay smaller than ``batch_size``; the summary counts what is left out."""

    def build(self) -> Planner:
        """The planner."""
        from nearfield.batching.single_source import SingleSourcePlanner

        return SingleSourcePlanner(self)


BatchConfig = SingleSourceConfig
"""The union of all planners' settings, discriminated by ``kind``."""
