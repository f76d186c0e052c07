"""Going on from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from nearfield.errors import BadInputError
from nearfield.training.checkpoint import Checkpoint, newest_checkpoint, read_extra, read_tensors
from nearfield.training.communication import broadcast_json, broadcast_tensors
from nearfield.training.engine import Engine

logger = logging.getLogger("nearfield.training")


def resume(
    engine: Engine, checkpoints: Path, identity: dict[str, Any], steps: int
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Put the newest checkpoint into the engine and return its state, and its tensors that are not the engine's.

    Rank 0 reads, the others receive.
    """
    launch, device = engine.launch, engine.backend.device
    checkpoint: Checkpoint | None = None
    if launch.is_main:
        checkpoint = newest_checkpoint(checkpoints, lambda found: _check_identity(found, identity))
    state: dict[str, Any] | None = broadcast_json(None if checkpoint is None else checkpoint.state, device)
    if state is None:
        return None, {}
    tensors = read_tensors(checkpoint) if checkpoint is not None else (None, None)
    try:
        engine.backend.load(*tensors)
    except (RuntimeError, KeyError) as error:
        where = str(checkpoint.path) if checkpoint is not None else str(checkpoints)
        reason = str(error).strip().splitlines()[0]
        raise BadInputError(f"this checkpoint does not fit the model: {reason}", where=where) from error
    if launch.is_main:
        logger.info("Resuming from step %d of %d", state["step"], steps)
        if state.get("world_size") != launch.world_size:
            logger.info(
                "The checkpoint was written by %s ranks, now there are %d: the batches and dropout masks are the same",
                state.get("world_size"),
                launch.world_size,
            )
        if engine.level and not state["cut_apart"] and engine.feed.pictures is not None and not engine.towers:
            logger.warning(
                "On %s texts and pictures lie in chunks of their own, unlike where the run began: from here on the "
                "dropout masks of batches with both are other ones",
                engine.backend.name,
            )
    return state, dict(broadcast_tensors(None if checkpoint is None else read_extra(checkpoint), device))


def _check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    for key, value in identity.items():
        if checkpoint.state.get(key) != value:
            raise BadInputError(f"it belongs to another run (its {key} differs)", where=str(checkpoint.path))
