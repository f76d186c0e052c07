"""What every planner takes and gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SourceExamples:
    """The examples of one source that an epoch draws from. Item numbers are rows of the store's items."""

    source: int
    name: str
    examples: Rows
    """Row numbers of the examples in the store, shape (n,)."""
    queries: Rows
    """The query item of each, shape (n,)."""
    positives: Sequence[Rows]
    negatives: Sequence[Rows]


@dataclass(frozen=True)
class PlannedRow:
    """One example in a batch, with the positives and negatives that were chosen for it."""

    source: int
    example: int
    query: int
    positives: Rows
    negatives: Rows
    stratum: int = -1

    def items(self) -> list[int]:
        """All items of the row: the query, its positives, its negatives."""
        return [self.query, *self.positives.tolist(), *self.negatives.tolist()]


@dataclass
class EpochBatches:
    """The batches of an epoch in the order of their steps, and what was left out and why."""

    batches: list[list[PlannedRow]]
    dropped: Counter[str] = field(default_factory=Counter)


class Planner(Protocol):
    """Makes the batches of an epoch: a function of its settings, the seed, the epoch and the examples, nothing else."""

    def plan(self, sources: Sequence[SourceExamples], seed: int, epoch: int) -> EpochBatches:
        """The batches of one epoch."""
        ...
