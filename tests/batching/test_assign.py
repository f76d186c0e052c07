"""Batches without clashes, against plain loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.arrays import Ragged
from nearfield.batching.assign import Arrangement, Conflicts, assign, count_conflicts, find_conflicts, repeats_itself
from nearfield.batching.streams import PlannedRows

Case = tuple[PlannedRows, Ragged]


def make_case(count: int, items: int, skewed: bool, seed: int) -> Case:
    random = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        # Skewed: few items are in most rows.
        share = random.random(size) ** (3 if skewed else 1)
        return (share * items).astype(np.int64)

    rows = PlannedRows.of(
        np.zeros(count, dtype=np.int64),
        np.arange(count),
        draw(count),
        Ragged.from_lists([draw(int(random.integers(1, 3))) for _ in range(count)]),
        Ragged.from_lists([draw(int(random.integers(0, 2))) for _ in range(count)]),
        score=np.where(random.random(count) < 0.1, 0.5, np.nan),
        label=random.integers(-1, 4, size=count),
    )
    known = Ragged.from_lists([np.unique(draw(int(random.integers(0, 3)))) for _ in range(items)])
    return rows, Ragged(known.offsets, known.values)


cases = st.builds(make_case, st.integers(1, 45), st.integers(3, 200), st.booleans(), st.integers(0, 10**6))


def items_of(rows: PlannedRows, row: int) -> set[int]:
    return {int(rows.query[row]), *rows.positives[row].tolist(), *rows.negatives[row].tolist()}


def meets_known(rows: PlannedRows, known: Ragged, one: int, other: int) -> bool:
    """Whether ``other`` brings a known positive of the query of ``one``."""
    if not np.isnan(rows.score[one]):
        return False
    return not set(known[int(rows.query[one])].tolist()).isdisjoint(items_of(rows, other))


def clash(rows: PlannedRows, known: Ragged | None, one: int, other: int, *, distinct: bool, labels: bool) -> bool:
    if distinct and not items_of(rows, one).isdisjoint(items_of(rows, other)):
        return True
    if labels and rows.label[one] == rows.label[other] >= 0:
        return True
    return known is not None and (meets_known(rows, known, one, other) or meets_known(rows, known, other, one))


def members(made: Arrangement) -> list[list[int]]:
    edges = np.concatenate([[0], np.cumsum(made.sizes)])
    return [made.rows[start:stop].tolist() for start, stop in pairwise(edges)]


@given(
    case=cases,
    size=st.integers(2, 9),
    keep_small=st.booleans(),
    rule=st.sampled_from(["both", "items", "known", "nothing", "labels"]),
)
@settings(max_examples=100, deadline=None)
def test_no_batch_has_two_rows_that_clash(case: Case, size: int, keep_small: bool, rule: str) -> None:
    rows, known = case
    distinct, labels = rule in ("both", "items", "labels"), rule == "labels"
    used = known if rule in ("both", "known", "labels") else None
    conflicts = find_conflicts(rows, distinct=distinct, known=used, distinct_labels=labels)
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    if distinct:
        twice = repeats_itself(conflicts)
        plain = [len(items_of(rows, row)) < 1 + len(rows.positives[row]) + len(rows.negatives[row]) for row in order]
        assert twice[order].tolist() == plain
        order = order[~twice[order]]
    made = assign(order, size, conflicts, keep_small=keep_small)
    assert sorted([*made.rows.tolist(), *made.left.tolist()]) == sorted(order.tolist())
    assert made.sizes.sum() == len(made.rows)
    assert all(count == size or (keep_small and 2 <= count < size) for count in made.sizes)
    for batch in members(made):
        for place, one in enumerate(batch):
            for other in batch[:place]:
                assert not clash(rows, used, one, other, distinct=distinct, labels=labels)
    if rule == "nothing":
        assert made.moved == 0
        assert made.rows.tolist() == order[: len(made.rows)].tolist()
    if keep_small and len(made.left):
        # A row is left over only if it is alone: any two of them clash.
        left = made.left.tolist()
        assert all(
            clash(rows, used, one, other, distinct=distinct, labels=labels)
            for place, one in enumerate(left)
            for other in left[:place]
        )


def first_fit(rows: PlannedRows, order: list[int], size: int) -> int:
    """How many batches fill when each row goes to the oldest open batch that has none of its items."""
    open_batches: list[list[int]] = []
    full = 0
    for row in order:
        for batch in open_batches:
            if all(not clash(rows, None, row, other, distinct=True, labels=False) for other in batch):
                batch.append(row)
                break
        else:
            open_batches.append([row])
        full += sum(len(batch) == size for batch in open_batches)
        open_batches = [batch for batch in open_batches if len(batch) < size]
    return full


def test_it_fills_as_many_batches_as_first_fit() -> None:
    ours = plain = 0
    for seed in range(60):
        rows, _ = make_case(60, 40 + 2 * seed, seed % 2 == 0, seed)
        conflicts = find_conflicts(rows, distinct=True, known=None)
        order = np.random.default_rng(seed).permutation(60)
        order = order[~repeats_itself(conflicts)[order]]
        ours += len(assign(order, 4, conflicts).sizes)
        plain += first_fit(rows, order.tolist(), 4)
    assert ours >= plain


def test_one_clash_costs_no_batch() -> None:
    """Two rows with one query are in a batch, and there is no row to spare: they are exchanged with another batch's."""
    query = np.array([0, 0, 2, 3, 4, 5, 6, 7])
    rows = PlannedRows.of(query * 0, np.arange(8), query, Ragged.single(np.arange(10, 18)), Ragged.empty(8))
    made = assign(np.arange(8), 4, find_conflicts(rows, distinct=True, known=None))
    assert made.sizes.tolist() == [4, 4]
    assert len(made.left) == 0
    assert made.moved == 1


def test_an_order_without_clashes_stays_as_it_is() -> None:
    rows = PlannedRows.of([0] * 7, np.arange(7), np.arange(7), Ragged.single(np.arange(10, 17)), Ragged.empty(7))
    conflicts = find_conflicts(rows, distinct=True, known=None)
    order = np.array([3, 1, 4, 6, 5, 2, 0])
    made = assign(order, 3, conflicts)
    assert (made.rows.tolist(), made.left.tolist(), made.moved) == ([3, 1, 4, 6, 5, 2], [0], 0)
    assert assign(order[:6], 4, conflicts, keep_small=True).sizes.tolist() == [4, 2]
    assert assign(order, 3, conflicts, keep_small=True).left.tolist() == [0]


def test_an_item_of_most_rows_ends_soon() -> None:
    """20,000 rows bring one of 5 items: no batch of 64 can fill, and that is found out without trying all pairs."""
    count = 20_000
    document = count + np.arange(count) % 5
    rows = PlannedRows.of(np.zeros(count, dtype=np.int64), np.arange(count), np.arange(count), Ragged.single(document), Ragged.empty(count))  # fmt: skip
    conflicts = find_conflicts(rows, distinct=True, known=None)
    assert len(assign(np.arange(count), 64, conflicts).left) == count
    kept = assign(np.arange(count), 64, conflicts, keep_small=True)
    assert set(kept.sizes.tolist()) == {5}
    assert len(kept.left) == 0


@given(case=cases, size=st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_clashes_are_counted_as_a_loop_counts_them(case: Case, size: int) -> None:
    rows, known = case
    batch = np.arange(len(rows)) // size
    repeated = met = 0
    for start in range(0, len(rows), size):
        inside = range(start, min(start + size, len(rows)))
        seen: set[int] = set()
        for row in inside:
            repeated += len(seen & items_of(rows, row))
            seen |= items_of(rows, row)
            shunned = [set(known[int(rows.query[o])].tolist()) for o in inside if o != row and np.isnan(rows.score[o])]
            met += sum(any(item in of for of in shunned) for item in items_of(rows, row))
    conflicts = find_conflicts(rows, distinct=True, known=None)
    clean = ~repeats_itself(conflicts)
    if clean.all():
        assert count_conflicts(conflicts, batch)[0] == repeated
        assert count_conflicts(find_conflicts(rows, distinct=False, known=known), batch)[1] == met


@pytest.mark.parametrize("base", [0, 10**12])
def test_items_may_have_any_numbers(base: int) -> None:
    """The numbers of items are no sizes of arrays."""
    query = np.array([base, base + 1, base, base + 3])
    rows = PlannedRows.of([0] * 4, np.arange(4), query, Ragged.single(query + 100), Ragged.empty(4))
    conflicts = find_conflicts(rows, distinct=True, known=None)
    assert [conflicts.items[row].size for row in range(4)] == [2, 0, 2, 0]
    assert isinstance(conflicts, Conflicts)
    made = assign(np.array([0, 2, 1, 3]), 2, conflicts)
    assert sorted(map(sorted, members(made))) in ([[0, 1], [2, 3]], [[0, 3], [1, 2]])
