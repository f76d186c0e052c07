"""The protocol of a trainer's parts: evaluation, changing negatives, tracking, diagnostics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from nearfield.batching.plan import Batch
    from nearfield.objectives.queue import MemoryQueue
    from nearfield.training.step import StepResult
    from nearfield.training.trainer import Trainer


@dataclass(frozen=True)
class StepMade:
    """A step that has changed the weights."""

    done: int
    """Steps done, this one counted."""
    batch: Batch
    result: StepResult
    norm: float
    """Of the gradient, before clipping."""
    line: Mapping[str, Any] | None
    """Its line of metrics, where it gets one."""


class Part:
    """A part of a training. Every rank calls the methods of all parts in one order; by default they do nothing."""

    trainer: Trainer
    seconds: float = 0.0
    """Seconds spent between steps, which do not count as training."""

    def begin(self, trainer: Trainer) -> None:
        """Get to know the trainer, before the first step."""
        self.trainer = trainer

    def batch(self, batch: Batch, step: int) -> tuple[Batch, dict[str, int]]:
        """The batch that the step is made on, and figures for its line of metrics."""
        return batch, {}

    def after_step(self, made: StepMade) -> None:
        """Look at a step; *collective*."""

    def pause(self, done: int) -> None:
        """Work that takes its time after ``done`` steps, also before the first; *collective*."""

    def end(self) -> None:
        """Say what is to be said once all steps are done; *collective*."""

    def state(self) -> dict[str, Any]:
        """Entries of a checkpoint's state."""
        return {}

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Tensors of a checkpoint."""
        return ()

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put back what a checkpoint's state and tensors hold."""


class QueuedPositives(Part):
    """Positives of earlier steps, for objectives that ask for them."""

    def __init__(self, queue: MemoryQueue) -> None:
        self.queue = queue

    def after_step(self, made: StepMade) -> None:
        if made.result.batch is not None:
            self.queue.push(made.result.batch)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        return self.queue.tensors()

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.queue.load(tensors)
