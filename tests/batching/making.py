"""Examples, teachers and clusterings made up for the planners' tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nearfield.arrays import Ragged, Rows
from nearfield.batching.planner import EpochBatches, VectorsOf
from nearfield.batching.streams import SourceExamples


def make_source(number: int, count: int, items: int, seed: int) -> SourceExamples:
    """``count`` examples with 1 to 3 positives and 0 to 3 negatives of ``items`` items; rows are 1000 * number and on."""
    random = np.random.default_rng(seed)
    positives = Ragged.from_lists([random.integers(0, items, size=random.integers(1, 4)) for _ in range(count)])
    negatives = Ragged.from_lists([random.integers(0, items, size=random.integers(0, 4)) for _ in range(count)])
    queries = random.integers(0, items, size=count)
    return SourceExamples(number, f"source{number}", np.arange(count) + 1000 * number, queries, positives, negatives)


def make_apart(number: int, count: int) -> SourceExamples:
    """Examples of one positive that share no item, with any source."""
    start = 100_000 * number
    return SourceExamples(
        number,
        f"source{number}",
        np.arange(count) + 1000 * number,
        np.arange(count) + start,
        Ragged.single(np.arange(count) + start + 50_000),
        Ragged.empty(count),
    )


def known_of(sources: Sequence[SourceExamples]) -> Ragged:
    """The known positives of all sources, as the store has them."""
    pairs: dict[int, set[int]] = {}
    top = 0
    for source in sources:
        for row, query in enumerate(source.queries.tolist()):
            pairs.setdefault(query, set()).update(source.positives[row].tolist())
            top = max(top, query, *source.positives[row].tolist(), *source.negatives[row].tolist(), 0)
    return Ragged.from_lists([sorted(pairs.get(item, ())) for item in range(top + 1)])


def make_vectors(dimension: int = 8, seed: int = 0, spread: int = 5) -> VectorsOf:
    """A teacher: an item's vector depends on its number, and numbers of one remainder are alike."""

    def vectors(role: str, items: Rows) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        made = np.empty((len(items), dimension), dtype=np.float32)
        for place, item in enumerate(items.tolist()):
            centre = np.random.default_rng([seed, item % spread]).normal(size=dimension)
            made[place] = 3 * centre + np.random.default_rng([seed, 1 + item]).normal(size=dimension)
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        return made

    return vectors


def batches_of(epoch: EpochBatches) -> list[list[int]]:
    """The examples of each batch."""
    return [epoch.batch(number).example.tolist() for number in range(len(epoch))]


def items_of(epoch: EpochBatches) -> list[list[list[int]]]:
    """The items of each row of each batch."""
    lists = epoch.rows.items()
    rows = [lists[row].tolist() for row in range(len(lists))]
    return [rows[start:stop] for start, stop in zip(epoch.offsets[:-1], epoch.offsets[1:], strict=True)]
