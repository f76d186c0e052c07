"""Settings of the trackers: where a run's figures go besides its own ``metrics.jsonl`` and ``evaluations.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from nearfield.config import Config

if TYPE_CHECKING:
    from nearfield.training.trackers import Tracker

Name = Annotated[str, Field(min_length=1)]


class TensorBoardConfig(Config):
    """TensorBoard, in the run's folder ``tensorboard``."""

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self, run: Path, first_step: int, about: Mapping[str, Any]) -> Tracker:
        from nearfield.training.trackers import TensorBoardTracker

        return TensorBoardTracker(run, first_step)


class WandbConfig(Config):
    """Weights & Biases. A resumed run goes on with the same W&B run, whose id the run's folder keeps."""

    kind: Literal["wandb"] = "wandb"
    project: Name
    entity: Name | None = None
    """A user or team; null takes the account's own."""
    name: Name | None = None
    """Null takes the recipe's name."""
    group: Name | None = None
    tags: tuple[Name, ...] = ()
    mode: Literal["online", "offline", "disabled"] = "online"
    """``offline`` writes to the run's folder, for ``wandb sync`` later."""

    def build(self, run: Path, first_step: int, about: Mapping[str, Any]) -> Tracker:
        from nearfield.training.trackers import WandbTracker

        return WandbTracker(self, run, first_step, about)


TrackerConfig = Annotated[TensorBoardConfig | WandbConfig, Field(discriminator="kind")]
