"""Cut an order of examples into batches of which no two members clash.

The order is cut as it is. Few examples then clash with an earlier one of their batch: only these, and those behind the
last full batch, are placed one by one, into the oldest batch that has room and holds nothing against them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.batching.claims import Claims, entries_by_batch
from nearfield.batching.rows import Lists, Rows

_PATIENCE = 16
"""Failures in a row after which mending is given up: where an item is in too many examples, none can help."""


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


def arrange(order: Rows, size: int, claims: Claims, *, keep_small: bool = False) -> Arrangement:
    """Batches of ``size`` from rows in this order; ``claims`` are those of all rows that the numbers in it mean.

    A row that cannot be placed is left over; with ``keep_small`` batches of 2 rows or more that did not fill are kept.
    """
    count, full = len(order), len(order) // size
    batches = -(-count // size) if keep_small else full
    batch = np.arange(count) // size
    batch[batches * size :] = -1
    ordered = claims.take(order)
    clashing = _clashing(ordered, batch)
    if not clashing.any() and (not keep_small or count % size != 1):
        cut = min(batches * size, count)
        sizes = np.full(batches, size, dtype=np.int64)
        if batches > full:
            sizes[-1] = count - full * size
        return Arrangement(order[:cut], sizes, order[cut:], 0)
    fitter = _Fitter(ordered, size, batches, clashing)
    stuck = fitter.fill([*np.flatnonzero(clashing).tolist(), *range(min(batches * size, count), count)])
    stuck = fitter.swap(stuck)
    fitter.dissolve()
    if keep_small:
        fitter.open_for(stuck)
    kept = fitter.result(2 if keep_small else size)
    places = np.concatenate([np.empty(0, dtype=np.int64), *kept])
    sizes = np.asarray([len(part) for part in kept], dtype=np.int64)
    unplaced = np.ones(count, dtype=np.bool_)
    unplaced[places] = False
    moved = int((clashing & ~unplaced).sum())
    return Arrangement(order[places], sizes, order[unplaced], moved)


def _clashing(claims: Claims, batch: Rows) -> npt.NDArray[np.bool_]:
    """(n,) rows to take out of their batches so that none of those that stay clash; seldom more than need be."""
    found = np.zeros(len(batch), dtype=np.bool_)
    key, row, holds = entries_by_batch(claims, batch)
    if not len(key):
        return found
    start = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    group = np.repeat(np.arange(len(start)), np.diff(np.append(start, len(key))))
    later = row != row[start][group]
    any_held, any_shunned = np.logical_or.reduceat(holds, start), np.logical_or.reduceat(~holds, start)
    if claims.distinct:
        # Behind a row that holds the item none may hold or shun it; behind one that shuns it none may hold it.
        out = later & (holds[start][group] | holds)
    else:
        out = later & (any_held & any_shunned)[group]
    found[row[out]] = True
    return found


class _Fitter:
    """Batches with room, and what is in them. Rows are places in the order."""

    def __init__(self, claims: Claims, size: int, batches: int, out: npt.NDArray[np.bool_]) -> None:
        self.claims, self.size, self.batches, self.out = claims, size, batches, out
        self.count = len(out)
        self.staying = [of.keep(~out[of.owners()]) for of in self._claims()]
        """What the rows hold and shun that stay where the order puts them."""
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
        """For an item, the first batch that may take a row that holds it."""

    def _block(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def rows_of(self, number: int) -> list[int]:
        """The members of a batch."""
        if number not in self.members:
            block = self._block(number) if number < self.batches else range(0)
            self.members[number] = [row for row in block if not self.out[row]]
        return self.members[number]

    def has(self, number: int) -> tuple[set[int], set[int]]:
        """Items that the members of a batch hold, and that they shun."""
        if number not in self.held:
            if number in self.members:
                rows = self.members[number]
                holds, shuns = ({item for row in rows for item in of[row].tolist()} for of in self._claims())
            else:
                block = self._block(number)
                holds, shuns = (
                    set(of.values[of.offsets[block.start] : of.offsets[block.stop]].tolist()) for of in self.staying
                )
            self.held[number] = holds, shuns
        return self.held[number]

    def _claims(self) -> tuple[Lists, Lists]:
        return self.claims.holds, self.claims.shuns

    def find(self, number: int) -> int:
        """The first batch from this on that has room."""
        following = self.next_open
        while following[number] != number:
            following[number] = following[following[number]]
            number = following[number]
        return number

    def clash(self, row: int, number: int) -> bool:
        """Whether a batch has something against a row."""
        holds, shuns = self.has(number)
        items = self.claims.holds[row].tolist()
        distinct = self.claims.distinct
        for item in items:
            if item in shuns or (distinct and item in holds):
                if self.find(self.first.get(item, 0)) == number:
                    self.first[item] = number + 1
                return True
        return not holds.isdisjoint(self.claims.shuns[row].tolist())

    def place_for(self, row: int) -> int | None:
        """The first batch with room that a row fits into."""
        items = self.claims.holds[row].tolist()
        number = self.find(max((self.first.get(item, 0) for item in items), default=0))
        end = len(self.next_open) - 1
        while number < end:
            if not self.clash(row, number):
                return number
            number = self.find(number + 1)
        return None

    def put(self, row: int, number: int) -> None:
        """Add a row to a batch."""
        holds, shuns = self.has(number)
        rows = self.rows_of(number)
        rows.append(row)
        holds.update(self.claims.holds[row].tolist())
        shuns.update(self.claims.shuns[row].tolist())
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
        """Rows that clash with all that has room take the place of one that does not; return those that could not."""
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
                if len(self.rows_of(number)) < self.size or self.clash(row, number):
                    continue
                for place, other in enumerate(self.members[number][:64]):
                    if not self.clash(other, roomy):
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
