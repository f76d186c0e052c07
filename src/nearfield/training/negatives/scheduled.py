"""Negatives that get harder with the steps."""

from __future__ import annotations

from collections.abc import Callable

from nearfield.batching.rows import Rows
from nearfield.mining.config import ScheduledNegatives
from nearfield.training.negatives.changing import NegativeInputs, Replacing


class Scheduled(Replacing):
    """A window over the candidates that moves from easy to hard; a function of the step alone."""

    def __init__(
        self,
        inputs: NegativeInputs,
        config: ScheduledNegatives,
        known_positives: Callable[[int], Rows],
        seed: int,
        steps: int,
    ) -> None:
        super().__init__(inputs, known_positives, seed)
        self.config = config
        self.steps = steps

    def first_rank(self, step: int) -> int:
        """The rank that the window begins at."""
        share = min(1.0, step / max(1.0, self.config.over * (self.steps - 1)))
        return round(self.config.start + (self.config.end - self.config.start) * share)

    def orders(self, examples: Rows, step: int) -> list[Rows]:
        """The candidates from the window's rank on; of a list that is too short, its last ones and then harder ones."""
        rank, wanted = self.first_rank(step), self.inputs.wanted
        orders = []
        for candidates in self.inputs.candidates.of(examples):
            begin = max(0, min(rank, len(candidates) - wanted))
            # What clashes is made up for by the next easier one, and at the list's end by the next harder one.
            orders.append(candidates[[*range(begin, len(candidates)), *range(begin - 1, -1, -1)]])
        return orders
