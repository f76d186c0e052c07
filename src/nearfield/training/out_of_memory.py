"""What happens when memory runs out: a smaller budget, in place or in the last checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from nearfield.errors import BadInputError, OutOfMemoryStopError
from nearfield.training.checkpoint import amend_state, checkpoint_paths, newest_checkpoint
from nearfield.training.memory import Budget
from nearfield.training.step import is_out_of_memory

logger = logging.getLogger("nearfield.training")


@contextlib.contextmanager
def stops_for_memory(doing: str, budget: Budget) -> Iterator[None]:
    """Where memory runs out in what cannot be repeated, end the run so that it goes on with a smaller budget.

    Ranks may wait in a collective that this one will never join, or parameters may be half updated: only the last
    checkpoint is sound.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryStopError(
            f"memory ran out in {doing} with {budget.micro_batch_tokens} tokens at a time",
            hint="`nearfield train --resume` with the same launcher goes on from the last checkpoint with half as many.",
        ) from error


def halve_budget(budget: Budget, step: int) -> Budget:
    """The budget that the step is repeated with; :class:`BadInputError` where less is no use."""
    smaller = budget.halved()
    if smaller is None:
        raise BadInputError(
            f"memory ran out in step {step + 1} with {budget.micro_batch_tokens} tokens at a time, and less is no use",
            where="training.max_length",
            hint="Lower training.max_length, use gradient checkpointing, an adapter, or more devices with fsdp2 or zero3.",
        )
    logger.warning(
        "Memory ran out in step %d: %d tokens at a time from now on (was %d)",
        step + 1,
        smaller.micro_batch_tokens,
        budget.micro_batch_tokens,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return smaller


class ShrinkBudget:
    """Halves the budget in the last checkpoint, once, where memory ran out on a backend that cannot repeat the step."""

    def __init__(self, checkpoints: Path, writes: bool) -> None:
        self.checkpoints = checkpoints
        self.writes = writes

    def when_dead(self, exit_code: int) -> None:
        """Act if a rank left because memory ran out."""
        if exit_code == OutOfMemoryStopError.exit_code:
            self()

    def __call__(self) -> None:
        paths = checkpoint_paths(self.checkpoints)
        if not self.writes or not paths:
            return
        self.writes = False
        path = newest_checkpoint(self.checkpoints)
        assert path is not None
        smaller = Budget.from_json(path.state).halved()
        if smaller is not None:
            amend_state(path.path, smaller.to_json())
            logger.warning("The budget in %s is now %d tokens at a time", path.path.name, smaller.micro_batch_tokens)
