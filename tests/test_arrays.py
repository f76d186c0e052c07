"""Ragged lists and the index of keys against plain Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.arrays import Index, Ragged, beside, concatenate, occurrences, ranges, starts

NUMBERS = st.integers(-5, 5)
LISTS = st.lists(st.lists(NUMBERS, max_size=4), max_size=6)
EXTREMES = st.sampled_from([-(2**63), -(2**62) - 1, -(2**53) - 1, 0, 2**53, 2**53 + 1, 2**62, 2**63 - 1])


def plain(ragged: Ragged) -> list[list[int]]:
    """Each list by itself, as the two arrays say it."""
    assert ragged.offsets[0] == 0 and ragged.offsets[-1] == len(ragged.values) and ragged.offsets.dtype == np.int64
    return [ragged[i].tolist() for i in range(len(ragged))]


@given(LISTS)
def test_lists_are_what_they_were_made_of(lists: list[list[int]]) -> None:
    ragged = Ragged.from_lists(lists)
    assert plain(ragged) == lists and len(ragged) == len(lists)
    assert ragged.lengths.tolist() == [len(part) for part in lists]
    assert ragged.owners().tolist() == [i for i, part in enumerate(lists) for _ in part]
    assert ragged.ranks().tolist() == [rank for part in lists for rank, _ in enumerate(part)]
    assert ragged.first().tolist() == [part[0] if part else -1 for part in lists]
    assert ragged.first(np.arange(len(lists))).tolist() == [part[0] if part else i for i, part in enumerate(lists)]
    assert ragged.sums().tolist() == [sum(part) for part in lists]
    assert plain(ragged.distinct()) == [sorted(set(part)) for part in lists]
    assert plain(Ragged.from_lengths(ragged.lengths, ragged.values)) == lists


@given(LISTS, st.data())
def test_taking_slicing_and_keeping(lists: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.from_lists(lists)
    rows = data.draw(st.lists(st.integers(0, max(0, len(lists) - 1)), max_size=8)) if lists else []
    taken = np.asarray(rows, dtype=np.int64)
    assert plain(ragged.take(taken)) == [lists[row] for row in rows]
    assert ragged.values[ragged.places(taken)].tolist() == [value for row in rows for value in lists[row]]
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    assert plain(ragged.slice(start, stop)) == lists[start:stop]
    assert plain(ragged.keep(ragged.values > 0)) == [[value for value in part if value > 0] for part in lists]


@given(st.lists(st.tuples(st.lists(NUMBERS, max_size=4), st.lists(NUMBERS, max_size=4)), max_size=6))
def test_joining(pairs: list[tuple[list[int], list[int]]]) -> None:
    left, right = (Ragged.from_lists([pair[side] for pair in pairs]) for side in (0, 1))
    assert plain(beside(left, right)) == [one + other for one, other in pairs]
    assert plain(left.union(right)) == [sorted({*one, *other}) for one, other in pairs]
    assert plain(concatenate([left, right])) == plain(left) + plain(right)
    owners, values = left.owners(), left.values
    order = np.random.default_rng(0).permutation(len(values))
    assert plain(Ragged.from_pairs(owners[order], values[order], len(left))) == plain(left.distinct())


def test_empty_and_single() -> None:
    assert plain(Ragged.empty(2)) == [[], []] and plain(concatenate([])) == []
    assert plain(Ragged.single(np.array([4, 2]))) == [[4], [2]]
    assert starts([2, 0, 3]).tolist() == [0, 2, 2, 5] and starts([]).tolist() == [0]
    with pytest.raises(ValueError, match="2 lists cannot stand beside 1"):
        beside(Ragged.empty(2), Ragged.empty(1))


@given(st.lists(st.tuples(NUMBERS, st.integers(0, 4)), max_size=6))
def test_ranges(parts: list[tuple[int, int]]) -> None:
    first, lengths = (np.asarray([part[i] for part in parts], dtype=np.int64) for i in (0, 1))
    assert ranges(first, lengths).tolist() == [first + i for first, length in parts for i in range(length)]


@given(st.lists(NUMBERS))
def test_occurrences(keys: list[int]) -> None:
    assert occurrences(np.asarray(keys, dtype=np.int64)).tolist() == [keys[:i].count(key) for i, key in enumerate(keys)]


@given(LISTS, st.integers(0, 3))
def test_arrow_both_ways(lists: list[list[int]], cut: int) -> None:
    ragged = Ragged.from_lists(lists)
    array = ragged.to_arrow()
    assert array.type == pa.large_list(pa.int64()) and array.to_pylist() == lists
    for kind in (pa.large_list(pa.int64()), pa.list_(pa.int64())):
        column = pa.array([None, *lists], kind)
        assert plain(Ragged.from_arrow(column)) == [[], *lists]
        # A slice has offsets that do not begin at 0.
        assert plain(Ragged.from_arrow(column[1:])) == lists
        assert plain(Ragged.from_arrow(pa.chunked_array([column[1 : 1 + cut], column[1 + cut :]]))) == lists
    assert Ragged.from_arrow(pa.chunked_array([], pa.list_(pa.float32()))).values.dtype == np.float32
    assert ragged.to_arrow(pa.int32()).type == pa.large_list(pa.int32())


@given(st.lists(NUMBERS | EXTREMES), st.lists(NUMBERS | EXTREMES))
def test_index_of_numbers(keys: list[int], wanted: list[int]) -> None:
    array = np.asarray(keys, dtype=np.int64)
    asked = np.asarray(wanted, dtype=np.int64)
    index = Index(array)
    rows = [[row for row, key in enumerate(keys) if key == one] for one in wanted]
    assert index.find(asked).tolist() == [found[0] if found else -1 for found in rows] and len(index) == len(keys)
    assert index.has(asked).tolist() == [bool(found) for found in rows]
    assert index.counts(asked).tolist() == [len(found) for found in rows]
    assert plain(index.all(asked)) == rows
    assert plain(index.all(asked, most=1)) == [found if len(found) < 2 else [] for found in rows]
    sorted_keys = np.sort(array)
    rising = Index(sorted_keys, rising=True)
    assert plain(rising.all(asked)) == [np.flatnonzero(sorted_keys == one).tolist() for one in wanted]
    assert rising.find(asked).tolist() == [sorted(keys).index(one) if one in keys else -1 for one in wanted]


@given(st.lists(st.binary(min_size=2, max_size=2)), st.lists(st.binary(min_size=2, max_size=2)))
def test_index_of_bytes_keeps_zeros_at_the_end(keys: list[bytes], wanted: list[bytes]) -> None:
    def array(parts: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(parts), dtype="V2") if parts else np.empty(0, dtype="V2")

    assert Index(array(keys)).find(array(wanted)).tolist() == [keys.index(one) if one in keys else -1 for one in wanted]


def test_absent_keys_are_said() -> None:
    index = Index(np.array([b"ab", b"cd"]))
    # A longer string is not cut to the width of the keys.
    assert index.find(np.array([b"abx", b"cd"])).tolist() == [-1, 1]
    assert index.find([]).tolist() == [] and index.find(np.array([[b"cd"]])).tolist() == [[1]]
    with pytest.raises(KeyError, match="texts without a vector"):
        index.rows(np.array([b"ab", b"x"]), "texts without a vector")
    assert index.rows(np.array([b"cd"])).tolist() == [1]
    with pytest.raises(TypeError, match="keys are uint64, and int64 are looked up"):
        Index(np.array([1], dtype=np.uint64)).find(np.array([1]))
