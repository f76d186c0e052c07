"""A training that learns nothing while it runs: a gradient of exactly 0, or a loss that stays at chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from nearfield.errors import BadInputError
from nearfield.notices import Notice
from nearfield.objectives.batch import ContrastiveBatch
from nearfield.objectives.objective import Objective
from nearfield.objectives.watching import watched_rows
from nearfield.training.step import StepResult

if TYPE_CHECKING:
    from nearfield.training.engine import Engine

STEPS = 10
"""Steps at the start of a run whose gradients may all be 0 before it is stopped."""
LOOKS = 24
"""Steps of a run whose loss is held against chance, at most."""
LEAST = 12
"""Looks that a verdict wants."""
NEAR = 0.02
"""A loss is at chance where it is less than this share below what embeddings that are all alike give."""


class GradientWatch:
    """Stops a run whose first gradients are all exactly 0."""

    def __init__(self, first: int, steps: int) -> None:
        """``first`` steps are done of ``steps``."""
        self._left = min(STEPS, steps - first) if first < STEPS else 0
        self._all = self._left

    def see(self, norm: float) -> None:
        """Take the norm of a step's gradient, the same on all ranks.

        Raises:
            BadInputError: It and all before it are 0, and there were enough.
        """
        if not self._left:
            return
        self._left = 0 if norm else self._left - 1
        if not norm and not self._left:
            raise BadInputError(
                f"the gradient of the first {self._all} steps is exactly 0: nothing is learnt",
                where="training",
                hint="Are all parameters frozen, all weights 0, all negatives masked, or all margins kept already?",
            )


@dataclass
class ChanceWatch:
    """Holds the loss of some steps against that of embeddings which are all alike."""

    steps: int
    """Of the run."""
    shares: list[float] = field(default_factory=list)
    """Loss over chance, in the order of steps."""

    def wants(self, step: int) -> bool:
        """Whether the step is looked at."""
        every = max(1, self.steps // LOOKS)
        return step % every == 0

    def see(self, engine: Engine, result: StepResult) -> None:
        """Look at a step; *collective*, though rank 0 alone computes."""
        objective, batch = engine.objective, result.batch
        if not objective.contrasts or engine.ring or batch is None:
            return
        with engine.backend.whole([p for p in objective.parameters() if p.requires_grad]):
            if engine.launch.is_main and (chance := loss_of_chance(objective, batch)) > 0:
                self.shares.append(result.loss / chance)

    def notices(self) -> Iterator[Notice]:
        """Whether the loss was at chance all the time."""
        if len(self.shares) < LEAST:
            return
        half = len(self.shares) // 2
        begin, end = (sum(part) / len(part) for part in (self.shares[:half], self.shares[-half:]))
        if min(begin, end) > 1 - NEAR:
            yield Notice(
                "loss-at-chance",
                f"the loss was at chance and did not move: {begin:.1%} of what texts that are all alike give in the first half "
                f"of the steps that were looked at, {end:.1%} in the last",
                "Do queries and positives belong together? Is the learning rate too low, or so high that all embeddings "
                "became alike?",
            )


@torch.no_grad()
def loss_of_chance(objective: Objective, batch: ContrastiveBatch) -> float:
    """The mean loss of a batch whose embeddings are all alike, of its watched rows; 0 where these count nothing."""
    rows = watched_rows(batch)
    alike = [torch.ones_like(side) for side in (batch.queries, batch.documents)]
    found = objective.forward(replace(batch, queries=alike[0], documents=alike[1], rows=rows, ring=None)).rows
    counted = float(len(rows)) if batch.weights is None else float(batch.weights[rows].sum())
    return float(found.sum()) / counted if counted else 0.0
