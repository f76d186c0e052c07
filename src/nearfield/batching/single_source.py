"""Shuffled global batches of one source each, no item twice in a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from nearfield.batching.config import SingleSourceConfig
from nearfield.batching.planner import EpochBatches, PlannedRow, Rows, SourceExamples
from nearfield.randomness import generator


class SingleSourcePlanner:
    """First fit: an example goes to the oldest open batch that holds none of its items.

    Every example is placed once an epoch. What stays in batches that never fill is dropped and counted, or kept as
    smaller batches. The order of the batches is shuffled over the sources, so that each source comes in proportion.
    """

    def __init__(self, config: SingleSourceConfig) -> None:
        self.config = config

    def plan(self, sources: Sequence[SourceExamples], seed: int, epoch: int) -> EpochBatches:
        """The batches of one epoch; the same arguments always give the same batches."""
        batches: list[list[PlannedRow]] = []
        dropped: Counter[str] = Counter()
        for source in sources:
            rows = self._rows(source, seed, epoch)
            for batch in first_fit(
                rows, self.config.batch_size, distinct=self.config.duplicates == "forbid", dropped=dropped
            ):
                if len(batch) == self.config.batch_size or (not self.config.drop_last and len(batch) >= 2):
                    batches.append(batch)
                else:
                    dropped["in a batch that did not fill"] += len(batch)
        order = generator(seed, "plan", "order", epoch).permutation(len(batches))
        return EpochBatches([batches[i] for i in order], dropped)

    def _rows(self, source: SourceExamples, seed: int, epoch: int) -> Iterator[PlannedRow]:
        random = generator(seed, "plan", source.name, epoch)
        for index in random.permutation(len(source.examples)):
            positives = choose(source.positives[index], self.config.positives, random)
            negatives = choose(source.negatives[index], self.config.negatives, random)
            yield PlannedRow(
                source.source, int(source.examples[index]), int(source.queries[index]), positives, negatives
            )


def choose(items: Rows, count: int, random: np.random.Generator) -> Rows:
    """``count`` of the items, drawn without replacement; all of them, in order, where there are no more."""
    if len(items) <= count:
        return items
    return items[np.sort(random.choice(len(items), size=count, replace=False))]


def first_fit(
    rows: Iterable[PlannedRow], batch_size: int, *, distinct: bool, dropped: Counter[str]
) -> Iterator[list[PlannedRow]]:
    """Put each row into the oldest open batch that holds none of its items; yield batches as they fill, then the rest.

    A row that repeats an item in itself (its query is its own positive, say) can never be distinct: it is dropped and
    counted.
    """
    open_batches: list[tuple[list[PlannedRow], set[int]]] = []
    for row in rows:
        items = row.items()
        if distinct and len(set(items)) < len(items):
            dropped["repeats an item in itself"] += 1
            continue
        fits = (i for i, (_, seen) in enumerate(open_batches) if not distinct or seen.isdisjoint(items))
        position = next(fits, len(open_batches))
        if position == len(open_batches):
            open_batches.append(([], set()))
        batch, seen = open_batches[position]
        batch.append(row)
        seen.update(items)
        if len(batch) == batch_size:
            del open_batches[position]
            yield batch
    for batch, _ in open_batches:
        yield batch
