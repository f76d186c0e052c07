"""What the loop asks of negatives that change, and how a step's negatives are put into its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nearfield.batching.plan import Batch
from nearfield.batching.rows import Lists, Rows
from nearfield.errors import BadInputError
from nearfield.mining.config import DynamicNegatives, RefreshedNegatives, ScheduledNegatives
from nearfield.training.step import StepResult

if TYPE_CHECKING:
    from nearfield.mining.config import DuringConfig
    from nearfield.training.engine import Engine
    from nearfield.training.negatives.refreshed import Remine


@dataclass(frozen=True)
class Candidates:
    """The mined candidates of examples: item rows, the hardest first."""

    examples: Rows
    """(n,) example rows, rising."""
    lists: Lists

    def places(self, examples: Rows) -> Rows:
        """Where these examples stand; -1 for those that were not mined for."""
        if not len(self.examples):
            return np.full(len(examples), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.examples, examples), len(self.examples) - 1)
        return np.where(self.examples[places] == examples, places, -1).astype(np.int64)

    def of(self, examples: Rows) -> list[Rows]:
        """The candidates of each of these examples; none for one that was not mined for."""
        none = np.empty(0, dtype=np.int64)
        return [self.lists[place] if place >= 0 else none for place in self.places(examples).tolist()]


@dataclass(frozen=True)
class NegativeInputs:
    """What changing negatives are made of."""

    config: DuringConfig
    candidates: Candidates
    """Those mined before the training."""
    wanted: int
    """Negatives an example in a step."""
    distinct: bool = True
    """Whether an item may stand only once among a batch's documents."""
    avoid_positives: bool = True
    """Whether a known positive of any query of the batch is no negative in it."""
    remine: Remine | None = None
    """What mines anew from the weights; only ``refresh`` needs it."""


class ChangingNegatives:
    """The negatives of a plan as they stand: nothing changes. The base of those that do.

    All that they do is the same on every rank. Their state is a few entries and tensors of a checkpoint.
    """

    seconds = 0.0
    """That mining anew took."""
    looks_at_batches = False
    """Whether ``observe`` wants the embeddings of the whole batch."""

    def batch(self, batch: Batch, step: int) -> tuple[Batch, dict[str, int]]:
        """A planned batch with the negatives in force, and what is worth a figure."""
        return batch, {}

    def observe(self, batch: Batch, step: int, result: StepResult) -> None:
        """Learn from a step that was done; *collective*."""

    def due(self, done: int) -> bool:
        """Whether the pool is to be mined anew after ``done`` steps and was not yet."""
        return False

    def refresh(self, engine: Engine, done: int, budget: int, stop: Callable[[], bool]) -> None:
        """Mine the pool anew; *collective*."""

    def saved(self) -> dict[str, Any]:
        """Entries of a checkpoint's state."""
        return {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a checkpoint."""
        yield from ()

    def load(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put back what a checkpoint's state and tensors hold."""


class Replacing(ChangingNegatives):
    """What those that change have in common: candidates in an order go into the batch, as far as they fit."""

    def __init__(self, inputs: NegativeInputs, known_positives: Callable[[int], Rows], seed: int) -> None:
        self.inputs = inputs
        self.seed = seed
        self.known_positives = known_positives

    def orders(self, examples: Rows, step: int) -> list[Rows]:
        """For each example the items that its negatives are taken from, in the order of preference."""
        raise NotImplementedError

    def batch(self, batch: Batch, step: int) -> tuple[Batch, dict[str, int]]:
        """The batch with the first candidates of each example that clash with nothing in it."""
        negatives, clashes = fit(
            batch, self.orders(batch.example, step), self.inputs, self.known_positives, self.inputs.wanted
        )
        missing = sum(self.inputs.wanted - len(rows) for rows in negatives)
        figures = {"negatives_clashing": clashes, "negatives_missing": missing}
        return dataclasses.replace(batch, negatives=negatives), figures


def fit(
    batch: Batch,
    orders: Sequence[Rows],
    inputs: NegativeInputs,
    known_positives: Callable[[int], Rows],
    wanted: int,
) -> tuple[list[Rows], int]:
    """The first ``wanted`` items of each order that clash with nothing in the batch, and how many were passed over.

    An item clashes if it stands in the batch already, or if the data calls it a positive of any of the batch's queries: the
    planner saw to neither for negatives that came later. Examples choose in the order of the batch.
    """
    taken: set[int] = set()
    if inputs.distinct:
        taken.update(batch.query.tolist())
        for positives in batch.positives:
            taken.update(positives.tolist())
    if inputs.avoid_positives:
        for query in batch.query.tolist():
            taken.update(known_positives(query).tolist())
    chosen, clashes = [], 0
    for query, order in zip(batch.query.tolist(), orders, strict=True):
        own: list[int] = []
        for item in order.tolist():
            if len(own) == wanted:
                break
            if item in taken or item in own or item == query:
                clashes += 1
                continue
            own.append(item)
        if inputs.distinct:
            taken.update(own)
        chosen.append(np.asarray(own, dtype=np.int64))
    return chosen, clashes


def open_negatives(
    inputs: NegativeInputs | None,
    known_positives: Callable[[int], Rows],
    run: Path,
    *,
    seed: int,
    steps: int,
    epochs: Sequence[int],
    averaged_batches: int,
    device: torch.device,
    writes: bool,
) -> ChangingNegatives:
    """The negatives of a run of ``steps`` steps, ``epochs`` the steps of each epoch; those of the plan without ``inputs``."""
    if inputs is None:
        return ChangingNegatives()
    if isinstance(inputs.config, ScheduledNegatives):
        from nearfield.training.negatives.scheduled import Scheduled

        return Scheduled(inputs, inputs.config, known_positives, seed, steps)
    if isinstance(inputs.config, DynamicNegatives):
        if averaged_batches > 1:
            raise BadInputError(
                "dynamic negatives need the scores of the whole batch, which training.averaged_batches cuts",
                where="training.averaged_batches",
                hint="Leave it at 1: a large batch fits by gradient caching.",
            )
        from nearfield.training.negatives.dynamic import make_dynamic

        return make_dynamic(inputs, inputs.config, known_positives, seed)
    assert isinstance(inputs.config, RefreshedNegatives)
    from nearfield.training.negatives.refreshed import Refreshed

    return Refreshed(
        inputs, inputs.config, known_positives, seed, run, epochs=epochs, steps=steps, device=device, writes=writes
    )
