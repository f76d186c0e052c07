"""Rows that may not share a batch, and how an order of rows is cut into batches without such a pair.

The order is cut as it is. Few rows then conflict with an earlier one of their batch: only these, and those behind the last
full batch, are placed one by one, into the oldest batch that has room and no conflict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nearfield.arrays import Index, Mask, Ragged, Rows, beside
from nearfield.batching.streams import PlannedRows, known_of

_PATIENCE = 16
"""Failures in a row after which mending is given up: where an item is in too many examples, none can help."""


@dataclass(frozen=True)
class Conflicts:
    """For each row, the items by which it can conflict with another row; items of one row alone are left out."""

    items: Ragged
    """Items that the row brings."""
    forbidden: Ragged
    """Known positives of its query that other rows must not bring."""
    distinct: bool
    """Whether two rows that bring the same item conflict."""

    def take(self, rows: Rows) -> Conflicts:
        """The conflicts of these rows, in this order."""
        return Conflicts(self.items.take(rows), self.forbidden.take(rows), self.distinct)


def find_conflicts(
    rows: PlannedRows, *, distinct: bool, known: Ragged | None, distinct_labels: bool = False
) -> Conflicts:
    """The conflicts of planned rows; ``known`` is None where known positives may meet.

    Two rows conflict if (``distinct``) an item is in both, or if one brings a known positive of the other's query, or
    (``distinct_labels``) if their labels are equal. Graded pairs have no in-batch negatives, so they forbid nothing.
    """
    items = rows.items()
    if distinct_labels:
        # A label is an item of its own kind, numbered behind the real ones.
        base = int(items.values.max(initial=-1)) + 1
        labelled = rows.label >= 0
        items = beside(items, Ragged.from_lengths(labelled, base + rows.label[labelled]))
    forbidden = Ragged.empty(len(rows)) if known is None else _forbidden(rows, known, items if distinct else None)
    largest = max(int(items.values.max(initial=0)), int(forbidden.values.max(initial=0)))
    if largest > 16 * (len(items.values) + len(forbidden.values)) + 2**20:
        # Counting by item number would take far more memory than the items themselves.
        numbers = np.unique(np.concatenate([items.values, forbidden.values]), return_inverse=True)[1]
        items = Ragged(items.offsets, numbers[: len(items.values)])
        forbidden = Ragged(forbidden.offsets, numbers[len(items.values) :])
    size = max(int(items.values.max(initial=-1)), int(forbidden.values.max(initial=-1))) + 1
    brought, shut = np.bincount(items.values, minlength=size), np.bincount(forbidden.values, minlength=size)
    matters = (brought > 0) & (shut > 0)
    if distinct or distinct_labels:
        matters |= brought > 1
    return Conflicts(
        items.keep(matters[items.values]), forbidden.keep(matters[forbidden.values]), distinct or distinct_labels
    )


def _forbidden(rows: PlannedRows, known: Ragged, items: Ragged | None) -> Ragged:
    """Known positives of each row's query, without those that it brings itself where ``items`` are given."""
    lists = known_of(known, rows.query, np.isnan(rows.score))
    if items is None or not len(lists.values):
        return lists
    owners = lists.owners()
    # Most known positives are the row's own first one: it is compared with before any sorting.
    other = lists.values != rows.positives.first()[owners]
    if other.any():
        span = max(int(items.values.max(initial=0)), int(lists.values.max())) + 1
        concerned = np.unique(owners[other])
        own_items = items.take(concerned)
        brought = concerned[own_items.owners()] * span + own_items.values
        other[other] = ~np.isin(owners[other] * span + lists.values[other], brought)
    return lists.keep(other)


def repeats_itself(conflicts: Conflicts) -> Mask:
    """(n,) whether the row brings an item twice (its query is its own positive, say): it can never be distinct."""
    mask: Mask = conflicts.items.distinct().lengths < conflicts.items.lengths
    return mask


def _entries_by_batch(conflicts: Conflicts, batch: Rows) -> tuple[Rows, Rows, Mask]:
    """The items of rows (in an order, whose batches are given) sorted by batch and item.

    Returns, an item of a row an entry: a number that equal (batch, item) share, the row, and whether the row brings the item
    rather than forbids it. Within equal numbers rows rise. Rows of a batch below 0 are left out.
    """
    owners = np.concatenate([conflicts.items.owners(), conflicts.forbidden.owners()])
    values = np.concatenate([conflicts.items.values, conflicts.forbidden.values])
    brings = np.arange(len(values)) < len(conflicts.items.values)
    inside = batch[owners] >= 0
    owners, values, brings = owners[inside], values[inside], brings[inside]
    key = batch[owners] * (int(values.max(initial=0)) + 1) + values
    order = np.lexsort((~brings, owners, key))
    return key[order], owners[order], brings[order]


def count_conflicts(conflicts: Conflicts, batch: Rows) -> tuple[int, int]:
    """How often, in planned batches, a row brings an item that an earlier row of its batch brought, and how often it
    brings a known positive of another row's query."""
    key, row, brings = _entries_by_batch(conflicts, batch)
    brought = np.flatnonzero(brings)
    repeated = int(((key[brought][1:] == key[brought][:-1]) & (row[brought][1:] != row[brought][:-1])).sum())
    # Of (batch, item): the rows that forbid it, less the row's own.
    others = Index(key[~brings], rising=True).counts(key[brought])
    rank = np.unique(key, return_inverse=True)[1] * len(batch) + row
    by_itself = np.isin(rank[brought], rank[~brings])
    return repeated, int((others > by_itself).sum())


@dataclass(frozen=True)
class Arrangement:
    """Batches of an order of rows."""

    rows: Rows
    """The rows that have a place, batch after batch."""
    sizes: Rows
    """(batches,)"""
    left: Rows
    """The rows that have none."""
    moved: int
    """Rows that stand in another batch than the order would have put them into."""


def assign(order: Rows, size: int, conflicts: Conflicts, *, keep_small: bool = False) -> Arrangement:
    """Batches of ``size`` from rows in this order; ``conflicts`` are those of all rows that the numbers in it mean.

    A row that cannot be placed is left over; with ``keep_small`` batches of 2 rows or more that did not fill are kept.
    """
    count, full = len(order), len(order) // size
    batches = -(-count // size) if keep_small else full
    batch = np.arange(count) // size
    batch[batches * size :] = -1
    ordered = conflicts.take(order)
    conflicting = _conflicting(ordered, batch)
    if not conflicting.any() and (not keep_small or count % size != 1):
        cut = min(batches * size, count)
        sizes = np.full(batches, size, dtype=np.int64)
        if batches > full:
            sizes[-1] = count - full * size
        return Arrangement(order[:cut], sizes, order[cut:], 0)
    fitter = _Batches(ordered, size, batches, conflicting)
    stuck = fitter.fill([*np.flatnonzero(conflicting).tolist(), *range(min(batches * size, count), count)])
    stuck = fitter.swap(stuck)
    fitter.dissolve()
    if keep_small:
        fitter.open_for(stuck)
    parts = fitter.result(2 if keep_small else size)
    places = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    sizes = np.asarray([len(part) for part in parts], dtype=np.int64)
    unplaced = np.ones(count, dtype=np.bool_)
    unplaced[places] = False
    moved = int((conflicting & ~unplaced).sum())
    return Arrangement(order[places], sizes, order[unplaced], moved)


def _conflicting(conflicts: Conflicts, batch: Rows) -> Mask:
    """(n,) rows to take out of their batches so that none of those that stay conflict; seldom more than need be."""
    out_of_batch = np.zeros(len(batch), dtype=np.bool_)
    key, row, brings = _entries_by_batch(conflicts, batch)
    if not len(key):
        return out_of_batch
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(key))))
    later = row != row[first][group]
    if conflicts.distinct:
        # Behind a row that brings the item none may bring or forbid it; behind one that forbids it none may bring it.
        out = later & (brings[first][group] | brings)
    else:
        both = np.logical_or.reduceat(brings, first) & np.logical_or.reduceat(~brings, first)
        out = later & both[group]
    out_of_batch[row[out]] = True
    return out_of_batch


class _Batches:
    """Batches with room, and what is in them. Rows are places in the order."""

    def __init__(self, conflicts: Conflicts, size: int, batches: int, out: Mask) -> None:
        self.conflicts, self.size, self.batches, self.out = conflicts, size, batches, out
        self.count = len(out)
        self.staying = [of.keep(~out[of.owners()]) for of in self._both()]
        """Items that are brought and forbidden by the rows that stay where the order puts them."""
        self.members: dict[int, list[int]] = {}
        """Of the batches that were touched; the others are blocks of the order."""
        self.held: dict[int, tuple[set[int], set[int]]] = {}
        # next_open[b] leads to the first batch from b on that has room; the last entry is behind all batches.
        self.next_open = [*range(1, batches + 1), batches]
        roomy = np.unique(np.flatnonzero(out) // size).tolist()
        if batches and len(self._block(batches - 1)) < size:
            roomy.append(batches - 1)
        for number in roomy:
            self.next_open[number] = number
        self.first: dict[int, int] = {}
        """For an item, the first batch that may take a row that brings it."""

    def _block(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def rows_of(self, number: int) -> list[int]:
        """The members of a batch."""
        if number not in self.members:
            block = self._block(number) if number < self.batches else range(0)
            self.members[number] = [row for row in block if not self.out[row]]
        return self.members[number]

    def has(self, number: int) -> tuple[set[int], set[int]]:
        """Items that the members of a batch bring, and that they forbid."""
        if number not in self.held:
            if number in self.members:
                rows = self.members[number]
                brought, forbidden = ({item for row in rows for item in of[row].tolist()} for of in self._both())
            else:
                block = self._block(number)
                brought, forbidden = (
                    set(of.values[of.offsets[block.start] : of.offsets[block.stop]].tolist()) for of in self.staying
                )
            self.held[number] = brought, forbidden
        return self.held[number]

    def _both(self) -> tuple[Ragged, Ragged]:
        return self.conflicts.items, self.conflicts.forbidden

    def find(self, number: int) -> int:
        """The first batch from this on that has room."""
        following = self.next_open
        while following[number] != number:
            following[number] = following[following[number]]
            number = following[number]
        return number

    def conflict(self, row: int, number: int) -> bool:
        """Whether a row conflicts with a batch."""
        brought, forbidden = self.has(number)
        items = self.conflicts.items[row].tolist()
        distinct = self.conflicts.distinct
        for item in items:
            if item in forbidden or (distinct and item in brought):
                if self.find(self.first.get(item, 0)) == number:
                    self.first[item] = number + 1
                return True
        return not brought.isdisjoint(self.conflicts.forbidden[row].tolist())

    def place_for(self, row: int) -> int | None:
        """The first batch with room that a row fits into."""
        items = self.conflicts.items[row].tolist()
        number = self.find(max((self.first.get(item, 0) for item in items), default=0))
        end = len(self.next_open) - 1
        while number < end:
            if not self.conflict(row, number):
                return number
            number = self.find(number + 1)
        return None

    def put(self, row: int, number: int) -> None:
        """Add a row to a batch."""
        brought, forbidden = self.has(number)
        rows = self.rows_of(number)
        rows.append(row)
        brought.update(self.conflicts.items[row].tolist())
        forbidden.update(self.conflicts.forbidden[row].tolist())
        if len(rows) == self.size:
            self.next_open[number] = number + 1

    def fill(self, rows: list[int]) -> list[int]:
        """Place rows one by one; return those that found no place."""
        stuck = []
        for row in rows:
            number = self.place_for(row)
            if number is None:
                stuck.append(row)
            else:
                self.put(row, number)
        return stuck

    def swap(self, stuck: list[int]) -> list[int]:
        """Rows that conflict with every batch with room take the place of one that does not; return those that could not."""
        left, failures = [], 0
        for row in stuck:
            if failures >= _PATIENCE or not self._swap_in(row):
                left.append(row)
                failures += 1
            else:
                failures = 0
        return left

    def _swap_in(self, row: int) -> bool:
        end = len(self.next_open) - 1
        roomy = self.find(0)
        for _ in range(8):
            if roomy >= end:
                return False
            for turn in range(1, min(64, end)):
                number = (roomy + turn) % end
                if len(self.rows_of(number)) < self.size or self.conflict(row, number):
                    continue
                for place, other in enumerate(self.members[number][:64]):
                    if not self.conflict(other, roomy):
                        self.members[number][place] = row
                        del self.held[number]
                        self.first.clear()
                        self.put(other, roomy)
                        return True
            roomy = self.find(roomy + 1)
        return False

    def dissolve(self) -> None:
        """Take the emptiest batches apart to fill the others, as long as that fills any."""
        self.first.clear()
        end = len(self.next_open) - 1
        with_room = []
        number = self.find(0)
        while number < end:
            with_room.append(number)
            number = self.find(number + 1)
        failures = 0
        for number in sorted(with_room, key=lambda n: (len(self.rows_of(n)), -n)):
            if len(self.rows_of(number)) == self.size:
                continue
            self.next_open[number] = number + 1
            if self.find(0) >= end or failures >= _PATIENCE:
                break
            rows = self.members[number]
            self.members[number] = self.fill(rows)
            failures = failures + 1 if len(self.members[number]) == len(rows) else 0
            self.held.pop(number, None)

    def open_for(self, rows: list[int]) -> None:
        """Place rows, with a new batch for each that fits nowhere."""
        self.first.clear()
        end = len(self.next_open) - 1
        for number in range(end):
            roomy = number in self.members and len(self.members[number]) < self.size
            self.next_open[number] = number if roomy else number + 1
        for row in rows:
            place = self.place_for(row)
            if place is None:
                place = len(self.next_open) - 1
                self.next_open.append(place + 1)
                self.members[place] = []
            self.put(row, place)

    def result(self, least: int) -> list[Rows]:
        """The members of all batches that have at least so many."""
        parts = []
        for number in range(len(self.next_open) - 1):
            if number in self.members:
                part = np.asarray(self.members[number], dtype=np.int64)
            else:
                block = self._block(number)
                part = np.arange(block.start, block.stop, dtype=np.int64)
            if len(part) >= least:
                parts.append(part)
        return parts
