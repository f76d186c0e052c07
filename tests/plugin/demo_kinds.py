"""A package of its own that brings nearfield a loss, a planner and a reader. A recipe names them by an import path
(``kind: demo_kinds:HingeLoss``) or by the names in ``pyproject.toml``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nearfield.batching import SingleSourceConfig, SingleSourcePlanner
from nearfield.data import ReaderBase, Row
from nearfield.objectives import ContrastiveBatch, LossSum, Objective, ObjectiveSettings


class HingeLoss(ObjectiveSettings):
    """Every other query's documents are to be less similar than a query's own, by a margin."""

    margin: float = 0.3

    def build(self, sources: object = (), around: object = None) -> Objective:
        return Hinge(self.margin)


class Hinge(Objective):
    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        rows = batch.local_rows()
        scores = batch.queries[rows] @ batch.documents.T
        own = batch.owner == rows[:, None]
        own_scores = (scores * own).sum(dim=1, keepdim=True) / own.sum(dim=1, keepdim=True)
        losses = ((scores - own_scores + self.margin).relu() * ~own).mean(dim=1)
        return LossSum(losses.sum(), batch.denominator(), losses.detach())


class InOrder(SingleSourceConfig):
    """Batches of neighbours in the file."""

    def build(self) -> SingleSourcePlanner:
        return InOrderPlanner(self)


class InOrderPlanner(SingleSourcePlanner):
    def groups(self, drawn: object, strata: object, request: object, turn: int) -> Iterator[object]:
        yield np.sort(drawn.order)


class TabbedLines(ReaderBase):
    """Lines of a query, a tab and its positive."""

    path: Path

    def inputs(self) -> dict[str, str]:
        return {self.path.name: self.path.read_text()}

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for number, line in enumerate(self.path.read_text().splitlines(), start=1):
            query, _, positive = line.partition("\t")
            yield Row(self.path.name, number, {"query": query, "positive": positive})
