"""Explicit negatives that are drawn for a whole community (B3++, arXiv 2505.11293, step 8)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.batching.rows import Lists, PlannedRows, Rows, beside

if TYPE_CHECKING:
    from nearfield.batching.communities import Communities
    from nearfield.data.store import KnownPositives


def add_cluster_negatives(
    rows: PlannedRows,
    sizes: Rows,
    count: int,
    *,
    communities: Communities,
    representatives: Rows,
    known: KnownPositives | None,
    random: np.random.Generator,
) -> PlannedRows:
    """Give each row of a community ``count`` negatives more, from one distribution a community.

    ``rows`` are batches of these ``sizes``, their strata numbers of ``communities.groups``; ``representatives`` (n,) are the
    documents of the stream's rows. :func:`nearfield.batching.communities.negative_weights` says how likely a document
    is; they are drawn without replacement. One that is in the batch already, or is a known positive of one of its
    queries, is not drawn: so a row may get fewer. Rows of no community get none.
    """
    from nearfield.batching.communities import negative_weights

    strata = rows.stratum
    items, offsets = rows.items(), np.concatenate([[0], np.cumsum(sizes)])
    known_lists = None if known is None else Lists(known.offsets, known.rows)
    counts = np.zeros(len(rows), dtype=np.int64)
    drawn: dict[int, Rows] = {}
    for batch in range(len(sizes)):
        inside = np.arange(offsets[batch], offsets[batch + 1])
        taken = items.values[items.offsets[inside[0]] : items.offsets[inside[-1] + 1]]
        if known_lists is not None:
            queries = rows.query[inside]
            queries = queries[queries < len(known_lists)]
            taken = np.concatenate([taken, known_lists.values[known_lists.positions(queries)]])
        for stratum in np.unique(strata[inside][strata[inside] >= 0]).tolist():
            mine = inside[strata[inside] == stratum]
            candidates, weights = negative_weights(communities, communities.groups[stratum])
            documents, first = np.unique(representatives[candidates], return_index=True)
            free = ~np.isin(documents, taken)
            documents, rates = documents[free], weights[first[free]].astype(np.float64)
            chosen = _draw(documents, rates, count * len(mine), random)
            taken = np.concatenate([taken, chosen])
            # Dealt in turn, so that all rows have as many, or one fewer.
            for place, row in enumerate(mine.tolist()):
                drawn[row] = chosen[place :: len(mine)]
                counts[row] = len(drawn[row])
    values = np.concatenate([np.empty(0, dtype=np.int64), *(drawn[row] for row in sorted(drawn))])
    return dataclasses.replace(rows, negatives=beside(rows.negatives, Lists.from_counts(counts, values)))


def _draw(documents: Rows, weights: npt.NDArray[np.float64], count: int, random: np.random.Generator) -> Rows:
    """Draw without replacement in proportion to the weights: the least of exponential draws with these rates."""
    if not len(documents):
        return documents
    keys = random.exponential(size=len(documents)) / weights
    return documents[np.argsort(keys, kind="stable")[:count]]
