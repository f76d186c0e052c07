"""Settings of the trackers: where a run's figures go besides its own ``metrics.jsonl`` and ``evaluations.jsonl``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from nearfield.config import Config
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.training.trackers import Tracker

Name = Annotated[str, Field(min_length=1)]


class TensorBoardConfig(Config):
    """TensorBoard, in the run's folder ``tensorboard``."""

    kind: Literal["tensorboard"] = "tensorboard"

    def check(self) -> None:
        """Refuse, before any work, what is not installed."""
        if find_spec("tensorboard") is None:
            raise BadInputError(
                "TensorBoard is not installed", where="training.trackers", hint="pip install tensorboard"
            )

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

    def check(self) -> None:
        """Refuse, before any work, what is not installed."""
        if sys.modules.get("wandb", False) is None or ("wandb" not in sys.modules and find_spec("wandb") is None):
            raise BadInputError(
                "Weights & Biases is not installed", where="training.trackers", hint="pip install 'nearfield[wandb]'"
            )

    def build(self, run: Path, first_step: int, about: Mapping[str, Any]) -> Tracker:
        from nearfield.training.trackers import WandbTracker

        return WandbTracker(self, run, first_step, about)


TrackerConfig = Annotated[TensorBoardConfig | WandbConfig, Field(discriminator="kind")]
