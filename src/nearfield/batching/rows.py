"""Examples and planned rows as columns: no Python object a row, so that a million of them are a few arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Lists:
    """n lists of integers in two arrays: list i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: Rows
    """[n + 1], from 0."""
    values: Rows

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | Rows]) -> Lists:
        """From a sequence of lists."""
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in lists], out=offsets[1:])
        parts = [np.asarray(part, dtype=np.int64) for part in lists]
        return cls(offsets, np.concatenate([np.empty(0, dtype=np.int64), *parts]))

    @classmethod
    def empty(cls, count: int) -> Lists:
        """``count`` lists without a value."""
        return cls(np.zeros(count + 1, dtype=np.int64), np.empty(0, dtype=np.int64))

    @classmethod
    def single(cls, values: Rows) -> Lists:
        """One value a list."""
        return cls(np.arange(len(values) + 1, dtype=np.int64), np.asarray(values, dtype=np.int64))

    @classmethod
    def from_counts(cls, counts: Rows, values: Rows) -> Lists:
        """Values in the order of their lists, and how many each list has."""
        offsets = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        return cls(offsets, values)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Rows:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Rows:
        """(n,) values a list."""
        lengths: Rows = np.diff(self.offsets)
        return lengths

    def owners(self) -> Rows:
        """The list that each value is in."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def positions(self, rows: Rows) -> Rows:
        """Where in ``values`` the values of these lists are, list after list."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        if total == len(rows) and (lengths == 1).all():
            return starts
        places: Rows = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
        return places

    def take(self, rows: Rows) -> Lists:
        """These lists, in this order."""
        return Lists.from_counts(self.offsets[rows + 1] - self.offsets[rows], self.values[self.positions(rows)])

    def keep(self, mask: npt.NDArray[np.bool_]) -> Lists:
        """The values where the mask, one entry a value, is true."""
        kept = np.zeros(len(mask) + 1, dtype=np.int64)
        np.cumsum(mask, out=kept[1:])
        return Lists(kept[self.offsets], self.values[mask])

    def first(self) -> Rows:
        """The first value of each list; no list may be empty."""
        return self.values[self.offsets[:-1]]


def join_lists(parts: Sequence[Lists]) -> Lists:
    """The lists of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    empty = np.empty(0, dtype=np.int64)
    counts = np.concatenate([empty, *(part.lengths for part in parts)])
    return Lists.from_counts(counts, np.concatenate([empty, *(part.values for part in parts)]))


def beside(left: Lists, right: Lists) -> Lists:
    """Each list of ``left`` with that of ``right`` behind it."""
    if not len(right.values):
        return left
    counts = left.lengths + right.lengths
    values = np.empty(len(left.values) + len(right.values), dtype=np.int64)
    offsets = Lists.from_counts(counts, values).offsets
    values[np.arange(len(left.values)) + np.repeat(offsets[:-1] - left.offsets[:-1], left.lengths)] = left.values
    second = offsets[:-1] + left.lengths
    values[np.arange(len(right.values)) + np.repeat(second - right.offsets[:-1], right.lengths)] = right.values
    return Lists(offsets, values)


@dataclass(frozen=True)
class SourceExamples:
    """The examples of one source that an epoch draws from. Item numbers are rows of the store's items."""

    source: int
    name: str
    examples: Rows
    """Row numbers of the examples in the store, shape (n,)."""
    queries: Rows
    """The query item of each, shape (n,); of graded pairs the first item, of labelled examples the item."""
    positives: Lists
    negatives: Lists
    scores: Floats | None = None
    """The score of each graded pair, shape (n,)."""
    labels: Rows | None = None
    """The label of each labelled example, shape (n,): a number that no other source uses for another label."""
    positive_scores: Floats | None = None
    """A teacher's score of each value of ``positives``."""
    negative_scores: Floats | None = None
    """A teacher's score of each value of ``negatives``."""
    samples: Rows | None = None
    """What each example is of, shape (n,): a number that sources share; where the planner asks for it."""

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class PlannedRows:
    """n examples with the positives and negatives that were chosen for each: the columns of a plan."""

    source: Rows
    example: Rows
    query: Rows
    positives: Lists
    negatives: Lists
    stratum: Rows
    """The cluster or community that the row was drawn from, -1 for none."""
    score: Floats
    """Not a number where the example has none."""
    label: Rows
    """-1 where the example has none."""

    @classmethod
    def of(
        cls,
        source: Sequence[int] | Rows,
        example: Sequence[int] | Rows,
        query: Sequence[int] | Rows,
        positives: Lists,
        negatives: Lists,
        *,
        stratum: Rows | None = None,
        score: Floats | None = None,
        label: Rows | None = None,
    ) -> PlannedRows:
        """Rows with the columns that are left out filled in."""
        count = len(example)
        none = np.full(count, -1, dtype=np.int64)
        return cls(
            np.asarray(source, dtype=np.int64),
            np.asarray(example, dtype=np.int64),
            np.asarray(query, dtype=np.int64),
            positives,
            negatives,
            none if stratum is None else stratum,
            np.full(count, np.nan) if score is None else score,
            none if label is None else label,
        )

    def __len__(self) -> int:
        return len(self.example)

    def take(self, rows: Rows) -> PlannedRows:
        """These rows, in this order."""
        return PlannedRows(
            self.source[rows],
            self.example[rows],
            self.query[rows],
            self.positives.take(rows),
            self.negatives.take(rows),
            self.stratum[rows],
            self.score[rows],
            self.label[rows],
        )

    def documents(self) -> Lists:
        """Each row's positives, then its negatives."""
        return beside(self.positives, self.negatives)

    def items(self) -> Lists:
        """All items of each row: the query, the positives, the negatives."""
        return beside(Lists.single(self.query), self.documents())


def join_rows(parts: Sequence[PlannedRows]) -> PlannedRows:
    """The rows of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return PlannedRows.of([], [], [], Lists.empty(0), Lists.empty(0))
    return PlannedRows(
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.example for part in parts]),
        np.concatenate([part.query for part in parts]),
        join_lists([part.positives for part in parts]),
        join_lists([part.negatives for part in parts]),
        np.concatenate([part.stratum for part in parts]),
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.label for part in parts]),
    )
