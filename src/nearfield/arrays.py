"""The two shapes that most data here has, without a Python object a row: lists of unequal length, and rows found by key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

Tokens = npt.NDArray[np.int32]
"""Token ids of a text."""
Rows = npt.NDArray[np.int64]
"""Row numbers, or whole numbers such as counts."""
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
"""One vector a row."""


def starts(lengths: npt.ArrayLike) -> Rows:
    """[n + 1] where n lists of these lengths begin when they lie end to end; the last entry is where they end."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(first: Rows, lengths: npt.ArrayLike) -> Rows:
    """The numbers ``first[i]``, ``first[i] + 1``, ... (``lengths[i]`` of them), range after range."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = starts(lengths)
    numbers: Rows = np.arange(offsets[-1]) + np.repeat(np.asarray(first, dtype=np.int64) - offsets[:-1], lengths)
    return numbers


def occurrences(keys: npt.NDArray[Any]) -> Rows:
    """(n,) how many equal keys stand before each key: 0 for the first of its kind."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(keys) else order
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = ranges(np.zeros(len(new), dtype=np.int64), np.diff(np.append(new, len(keys))))
    return ranks


@dataclass(frozen=True)
class Ragged:
    """n lists of numbers in two arrays: list i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: Rows
    """[n + 1], rising from 0."""
    values: npt.NDArray[Any]

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[Any] | npt.NDArray[Any]], dtype: npt.DTypeLike = np.int64) -> Ragged:
        """From lists or arrays, one after another."""
        parts = [np.asarray(part, dtype=dtype) for part in lists]
        return cls(starts([len(part) for part in parts]), np.concatenate([np.empty(0, dtype=dtype), *parts]))

    @classmethod
    def from_lengths(cls, lengths: npt.ArrayLike, values: npt.NDArray[Any]) -> Ragged:
        """From the values in the order of their lists, and how many each list has."""
        return cls(starts(lengths), values)

    @classmethod
    def from_pairs(cls, owners: Rows, values: npt.NDArray[Any], count: int) -> Ragged:
        """From (list, value) pairs in any order: ``count`` rising lists, each value once a list."""
        low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
        if low >= 0 and values.dtype.kind == "i" and count * (high + 1) < 2**63:
            # One number a pair: sorting these takes a third of the time and memory of sorting by two columns.
            joined = np.unique(owners * np.int64(high + 1) + values)
            owners, values = joined // (high + 1), (joined % (high + 1)).astype(values.dtype)
            return cls.from_lengths(np.bincount(owners, minlength=count), values)
        order = np.lexsort((values, owners))
        return cls.from_lengths(np.bincount(owners, minlength=count), values[order]).distinct(ordered=True)

    @classmethod
    def from_arrow(cls, column: pa.Array | pa.ChunkedArray) -> Ragged:
        """From a list or large list column; null is an empty list."""
        import pyarrow.compute as pc

        parts = []
        for chunk in getattr(column, "chunks", [column]):
            lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
            parts.append(cls.from_lengths(lengths, chunk.flatten().to_numpy(zero_copy_only=False)))
        return concatenate(parts) if parts else cls.empty(0, column.type.value_type.to_pandas_dtype())

    @classmethod
    def empty(cls, count: int, dtype: npt.DTypeLike = np.int64) -> Ragged:
        """``count`` lists without a value."""
        return cls(np.zeros(count + 1, dtype=np.int64), np.empty(0, dtype=dtype))

    @classmethod
    def single(cls, values: npt.NDArray[Any]) -> Ragged:
        """One value a list."""
        return cls(np.arange(len(values) + 1, dtype=np.int64), values)

    def to_arrow(self, value_type: pa.DataType | None = None) -> pa.LargeListArray:
        """As an Arrow array with 64-bit offsets."""
        import pyarrow as pa

        return pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), pa.array(self.values, value_type))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Rows:
        """(n,) values a list."""
        lengths: Rows = np.diff(self.offsets)
        return lengths

    def owners(self) -> Rows:
        """The list that each value is in, shape of ``values``."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def ranks(self) -> Rows:
        """The place of each value in its list, from 0, shape of ``values``."""
        return ranges(np.zeros(len(self), dtype=np.int64), self.lengths)

    def places(self, lists: Rows) -> Rows:
        """Where in ``values`` the values of these lists are, list after list."""
        return ranges(self.offsets[lists], self.offsets[lists + 1] - self.offsets[lists])

    def take(self, lists: Rows) -> Ragged:
        """These lists, in this order."""
        return Ragged.from_lengths(self.offsets[lists + 1] - self.offsets[lists], self.values[self.places(lists)])

    def slice(self, start: int, stop: int) -> Ragged:
        """The lists from ``start`` to ``stop`` (not included); values are not copied."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(offsets - offsets[0], self.values[offsets[0] : offsets[-1]])

    def keep(self, mask: Mask) -> Ragged:
        """The values where the mask, one entry a value, is true."""
        return Ragged(starts(mask)[self.offsets], self.values[mask])

    def distinct(self, *, ordered: bool = False) -> Ragged:
        """Rising lists, each value once a list; ``ordered``: they rise already."""
        owners, values = self.owners(), self.values
        if not ordered:
            values = values[np.lexsort((values, owners))]
        new = np.ones(len(values), dtype=np.bool_)
        new[1:] = (owners[1:] != owners[:-1]) | (values[1:] != values[:-1])
        return Ragged(self.offsets, values).keep(new)

    def union(self, other: Ragged) -> Ragged:
        """The values of both lists of each number, rising, each once a list."""
        return beside(self, other).distinct()

    def first(self, default: int | Rows = -1) -> npt.NDArray[Any]:
        """(n,) the first value of each list; an empty one gives the default (a number, or one a list)."""
        firsts: npt.NDArray[Any] = np.full(len(self), default, dtype=self.values.dtype)
        has = self.lengths > 0
        firsts[has] = self.values[self.offsets[:-1][has]]
        return firsts

    def sums(self) -> npt.NDArray[Any]:
        """(n,) the sum of each list of whole numbers."""
        running = np.concatenate([[0], np.cumsum(self.values)])
        sums: npt.NDArray[Any] = running[self.offsets[1:]] - running[self.offsets[:-1]]
        return sums


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The lists of all parts, one after another; without a part none."""
    if not parts:
        return Ragged.empty(0)
    if len(parts) == 1:
        return parts[0]
    return Ragged.from_lengths(
        np.concatenate([part.lengths for part in parts]), np.concatenate([part.values for part in parts])
    )


def beside(left: Ragged, right: Ragged) -> Ragged:
    """Each list of ``left`` with that of ``right`` behind it."""
    if len(left) != len(right):
        raise ValueError(f"{len(left)} lists cannot stand beside {len(right)}")
    if not len(right.values):
        return left
    joined = concatenate([left, right])
    count = len(left)
    return Ragged(
        starts(left.lengths + right.lengths),
        joined.values[joined.places(np.arange(2 * count).reshape(2, -1).T.ravel())],
    )


class Index:
    """Rows by their key: numbers, or byte strings of one width. Exact about keys that no row has.

    ``rising`` says that the keys are sorted already, so that nothing is copied (a mapped file, say).
    """

    def __init__(self, keys: npt.NDArray[Any], *, rising: bool = False) -> None:
        self._order: Rows | None = None if rising else np.argsort(keys, kind="stable")
        self._keys = keys if self._order is None else keys[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, wanted: npt.ArrayLike) -> Rows:
        """The row of each wanted key, shape of ``wanted``: the first of those that have it, -1 where none has."""
        wanted = self._comparable(wanted)
        if not len(self._keys):
            return np.full(wanted.shape, -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        rows = places if self._order is None else self._order[places]
        return np.where(self._keys[places] == wanted, rows, -1).astype(np.int64)

    def rows(self, wanted: npt.ArrayLike, absent: str = "keys that no row has") -> Rows:
        """As :meth:`find`, where every key must be there; raise :class:`KeyError` with the words of ``absent`` otherwise."""
        places = self.find(wanted)
        if (places < 0).any():
            raise KeyError(absent)
        return places

    def has(self, wanted: npt.ArrayLike) -> Mask:
        """Whether any row has the key, shape of ``wanted``."""
        return self.find(wanted) >= 0

    def counts(self, wanted: npt.ArrayLike) -> Rows:
        """(n,) how many rows have each key."""
        low, high = self._bounds(wanted)
        return high - low

    def all(self, wanted: npt.ArrayLike, most: int | None = None) -> Ragged:
        """All rows, rising, that have each of the keys (n,); none of a key that more than ``most`` rows have."""
        low, high = self._bounds(wanted)
        if most is not None:
            high = np.where(high - low > most, low, high)
        places = ranges(low, high - low)
        return Ragged.from_lengths(high - low, places if self._order is None else self._order[places])

    def _bounds(self, wanted: npt.ArrayLike) -> tuple[Rows, Rows]:
        wanted = self._comparable(wanted)
        low = np.searchsorted(self._keys, wanted).astype(np.int64)
        return low, np.searchsorted(self._keys, wanted, side="right").astype(np.int64)

    def _comparable(self, wanted: npt.ArrayLike) -> npt.NDArray[Any]:
        keys = np.asarray(wanted)
        if not keys.size:
            return np.empty(keys.shape, dtype=self._keys.dtype)
        if keys.dtype.kind != self._keys.dtype.kind:
            # NumPy would compare signed and unsigned numbers as floats, which takes different ones for equal.
            raise TypeError(f"keys are {self._keys.dtype}, and {keys.dtype} are looked up")
        return keys


@dataclass(frozen=True)
class ListsByKey:
    """Lists found by a key, on disk or in memory."""

    rows: Rows
    """The keys, rising."""
    lists: Ragged
    """One for each key."""
    absent: str = "keys that no row has"
    """Said of a key that is not there."""
    check: Callable[[int, int], None] = lambda start, stop: None
    """Called with the bytes of the values that are about to be read."""

    @cached_property
    def _index(self) -> Index:
        return Index(self.rows, rising=True)

    def positions(self, rows: Rows) -> Rows:
        """The place of each key, which must be there; :class:`KeyError` otherwise."""
        return self._index.rows(rows, self.absent)

    def lengths(self, rows: Rows) -> Rows:
        """The length of each key's list, int64 of the shape of ``rows``."""
        positions, offsets = self.positions(rows), self.lists.offsets
        return np.asarray(offsets[positions + 1] - offsets[positions])

    def of(self, row: int) -> npt.NDArray[Any]:
        """The list of a key."""
        position = int(self.positions(np.asarray([row], dtype=np.int64))[0])
        start, stop = self.lists.offsets[position : position + 2].tolist()
        size = self.lists.values.itemsize
        self.check(start * size, stop * size)
        return np.asarray(self.lists[position])
