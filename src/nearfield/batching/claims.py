"""What keeps two examples out of one batch: an item that both bring, or one that is a known positive of the other's query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.batching.rows import Lists, PlannedRows, Rows, beside

if TYPE_CHECKING:
    from nearfield.data.store import KnownPositives


@dataclass(frozen=True)
class Claims:
    """For each row, the items by which it can clash with another row; items of one row alone are left out."""

    holds: Lists
    """Items that the row brings."""
    shuns: Lists
    """Known positives of its query that other rows must not bring."""
    distinct: bool
    """Whether two rows that hold the same item clash."""

    def take(self, rows: Rows) -> Claims:
        """The claims of these rows, in this order."""
        return Claims(self.holds.take(rows), self.shuns.take(rows), self.distinct)


def make_claims(
    rows: PlannedRows,
    *,
    distinct: bool,
    known: KnownPositives | None,
    distinct_labels: bool = False,
) -> Claims:
    """The claims of planned rows; ``known`` is none where known positives may meet.

    Two rows clash if (``distinct``) an item is in both, or if one brings a known positive of the other's query, or
    (``distinct_labels``) if their labels are equal. Graded pairs have no in-batch negatives, so they shun nothing.
    """
    holds = rows.items()
    if distinct_labels:
        # A label is an item of its own kind, numbered behind the real ones.
        base = int(holds.values.max(initial=-1)) + 1
        labelled = rows.label >= 0
        holds = beside(holds, Lists.from_counts(labelled.astype(np.int64), base + rows.label[labelled]))
    shuns = _shunned(rows, known, holds if distinct else None) if known is not None else Lists.empty(len(rows))
    used = np.unique(np.concatenate([holds.values, shuns.values])) if _sparse(holds, shuns) else None
    if used is not None:
        holds = Lists(holds.offsets, np.searchsorted(used, holds.values))
        shuns = Lists(shuns.offsets, np.searchsorted(used, shuns.values))
    size = max(int(holds.values.max(initial=-1)), int(shuns.values.max(initial=-1))) + 1
    held, shunned = np.bincount(holds.values, minlength=size), np.bincount(shuns.values, minlength=size)
    matters = (held > 0) & (shunned > 0)
    if distinct or distinct_labels:
        matters |= held > 1
    return Claims(holds.keep(matters[holds.values]), shuns.keep(matters[shuns.values]), distinct or distinct_labels)


def _sparse(holds: Lists, shuns: Lists) -> bool:
    """Whether counting by item number would take far more memory than the items themselves."""
    largest = max(int(holds.values.max(initial=0)), int(shuns.values.max(initial=0)))
    return largest > 16 * (len(holds.values) + len(shuns.values)) + 2**20


def _shunned(rows: PlannedRows, known: KnownPositives, holds: Lists | None) -> Lists:
    """Known positives of each row's query, without those that it holds itself where these are given."""
    all_known = Lists(known.offsets, known.rows)
    inside = (rows.query < len(all_known)) & np.isnan(rows.score)
    counts = np.zeros(len(rows), dtype=np.int64)
    counts[inside] = all_known.lengths[rows.query[inside]]
    lists = Lists.from_counts(counts, all_known.values[all_known.positions(rows.query[inside])])
    if holds is None or not len(lists.values):
        return lists
    owners = lists.owners()
    # Most known positives are the row's own first one: it is compared with before any sorting.
    with_positive = rows.positives.lengths > 0
    first = np.full(len(rows), -1, dtype=np.int64)
    first[with_positive] = rows.positives.values[rows.positives.offsets[:-1][with_positive]]
    other = lists.values != first[owners]
    if other.any():
        span = max(int(holds.values.max(initial=0)), int(lists.values.max())) + 1
        concerned = np.unique(owners[other])
        own = holds.take(concerned)
        held = concerned[own.owners()] * span + own.values
        other[other] = ~np.isin(owners[other] * span + lists.values[other], held)
    return lists.keep(other)


def repeats_itself(claims: Claims) -> npt.NDArray[np.bool_]:
    """(n,) whether the row holds an item twice (its query is its own positive, say): it can never be distinct."""
    owners, values = claims.holds.owners(), claims.holds.values
    order = np.lexsort((values, owners))
    owners, values = owners[order], values[order]
    twice = (owners[1:] == owners[:-1]) & (values[1:] == values[:-1])
    found = np.zeros(len(claims.holds), dtype=np.bool_)
    found[owners[1:][twice]] = True
    return found


def entries_by_batch(claims: Claims, batch: Rows) -> tuple[Rows, Rows, npt.NDArray[np.bool_]]:
    """The claims of rows (in an order, whose batches are given) sorted by batch and item.

    Returns, a claim an entry: a number that equal (batch, item) share, the row, and whether the row holds the item rather
    than shuns it. Within equal numbers rows rise. Rows of a batch below 0 are left out.
    """
    owners = np.concatenate([claims.holds.owners(), claims.shuns.owners()])
    values = np.concatenate([claims.holds.values, claims.shuns.values])
    holds = np.arange(len(values)) < len(claims.holds.values)
    inside = batch[owners] >= 0
    owners, values, holds = owners[inside], values[inside], holds[inside]
    key = batch[owners] * (int(values.max(initial=0)) + 1) + values
    order = np.lexsort((~holds, owners, key))
    return key[order], owners[order], holds[order]


def count_clashes(claims: Claims, batch: Rows) -> tuple[int, int]:
    """How often, in planned batches, a row brings an item that an earlier row of its batch brought, and how often it
    brings a known positive of another row's query."""
    key, row, holds = entries_by_batch(claims, batch)
    if not len(key):
        return 0, 0
    held = np.flatnonzero(holds)
    repeated = int(((key[held][1:] == key[held][:-1]) & (row[held][1:] != row[held][:-1])).sum())
    # Of (batch, item): those who shun it, less the row's own.
    pairs = key[~holds]
    low, high = np.searchsorted(pairs, key[held]), np.searchsorted(pairs, key[held], side="right")
    rank = np.unique(key, return_inverse=True)[1] * len(batch) + row
    own = np.isin(rank[held], rank[~holds])
    return repeated, int(((high - low) > own).sum())
