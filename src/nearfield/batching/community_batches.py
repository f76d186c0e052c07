"""Batches that are unions of communities of hard examples (B3, arXiv 2505.11293)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.batching.cluster_negatives import add_cluster_negatives
from nearfield.batching.config import CommunitiesConfig
from nearfield.batching.drawing import Stream
from nearfield.batching.planner import Drawn, Request
from nearfield.batching.rows import Lists, PlannedRows, Rows
from nearfield.batching.single_source import SingleSourcePlanner

if TYPE_CHECKING:
    from nearfield.batching.communities import Communities
    from nearfield.data.store import KnownPositives

logger = logging.getLogger("nearfield.batching")

MOST_EXCLUDED = 1000
"""An item that more examples bring than this is not taken out of rankings: its pairs alone would fill the memory."""


def _find_communities(*arguments: Any, **settings: Any) -> Communities:
    from nearfield.batching.communities import find_communities

    return find_communities(*arguments, **settings)


@dataclasses.dataclass(frozen=True)
class _Communities:
    groups: Rows
    """[g, K] rows of the stream."""
    of_row: Rows
    """(n,) the community of each row, -1 for none."""
    found: Communities | None
    about: dict[str, Any]


class CommunityPlanner(SingleSourcePlanner):
    """Each batch is a union of random whole communities of one stream.

    Members that cannot be together (they share an item) and those of broken communities (part of a mixture, say) fill
    what room there is, and are counted as moved. ``find`` stands in for
    :func:`nearfield.batching.communities.find_communities`.
    """

    config: CommunitiesConfig

    def __init__(self, config: CommunitiesConfig, find: Callable[..., Communities] = _find_communities) -> None:
        super().__init__(config)
        self.find = find

    def communities(self, stream: Stream, request: Request) -> _Communities:
        """The communities of a stream; found once for all epochs."""
        found: _Communities = self.keep(stream, request, lambda: self._find(stream, request))
        return found

    def _find(self, stream: Stream, request: Request) -> _Communities:
        config = self.config
        vectors_of = request.need_vectors(config.kind)
        none = np.full(len(stream), -1, dtype=np.int64)
        empty = np.empty((0, config.community_size), dtype=np.int64)
        if len(stream) < 2 * config.community_size:
            return _Communities(empty, none, None, {})
        excluded, shared = excluded_pairs(stream, request.known)
        found = self.find(
            vectors_of("query", stream.queries),
            vectors_of("document", stream.representatives()),
            size=config.community_size,
            rank_from=config.rank_from,
            rank_to=config.rank_to,
            seed=request.fixed_seed("communities", stream.name),
            method=config.search,
            excluded=excluded,
            labels=stream.labels,
        )
        groups = np.asarray(found.groups, dtype=np.int64)
        none[groups] = np.arange(len(groups))[:, None]
        about = {
            "kind": "communities",
            "communities": len(groups),
            "size": config.community_size,
            "left": len(found.left),
            "cut": round(float(found.cut), 6),
            "edges": int(found.edges),
            "without_edge": int(found.isolated),
            "recall": None if found.recall is None else round(float(found.recall), 6),
            "items_in_too_many_examples": shared,
        }
        logger.info(
            "%s: %d communities of %d, %.1f %% of %d edges cut; %s",
            stream.name, len(groups), config.community_size, 100 * found.cut, found.edges,
            ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items()),
        )  # fmt: skip
        return _Communities(groups, none, found, about)

    def strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        """The community of each row."""
        found = self.communities(stream, request)
        return found.of_row, found.about

    def groups(self, drawn: Drawn, strata: Rows, request: Request, turn: int) -> Iterator[Rows]:
        """All whole communities in a new order, then the other rows."""
        groups = self.communities(drawn.stream, request).groups
        usable = np.zeros(len(drawn.stream), dtype=np.bool_)
        usable[drawn.order] = True
        whole = groups[usable[groups].all(axis=1)] if len(groups) else groups
        order = whole[request.random("communities", drawn.stream.name, turn).permutation(len(whole))].ravel()
        usable[order] = False
        yield np.concatenate([order, drawn.order[usable[drawn.order]]])

    def portion(
        self, stream: Stream, available: Rows, wanted: int, request: Request, random: np.random.Generator
    ) -> Rows:
        """Whole communities as long as they fit, then single rows."""
        groups = self.communities(stream, request).groups
        usable = np.zeros(len(stream), dtype=np.bool_)
        usable[available] = True
        whole = groups[usable[groups].all(axis=1)] if len(groups) else groups
        count = min(len(whole), wanted // self.config.community_size)
        taken = whole[random.permutation(len(whole))[:count]].ravel()
        usable[taken] = False
        rest = random.permutation(np.flatnonzero(usable))[: wanted - len(taken)]
        return np.sort(np.concatenate([taken, rest]))

    def finish(self, drawn: Drawn, rows: PlannedRows, sizes: Rows, request: Request) -> PlannedRows:
        """Add the negatives of communities, if there shall be any."""
        found = self.communities(drawn.stream, request).found
        if not self.config.cluster_negatives or found is None:
            return rows
        return add_cluster_negatives(
            rows,
            sizes,
            self.config.cluster_negatives,
            communities=found,
            representatives=drawn.stream.representatives(),
            known=request.known if self.config.known_positives == "forbid" else None,
            random=request.random("cluster negatives", drawn.stream.name),
        )


def excluded_pairs(stream: Stream, known: KnownPositives | None) -> tuple[tuple[Rows, Rows] | None, int]:
    """For each row of a stream, the other rows that are no negatives of it: they have its query, its document or a known
    positive of its query.

    Returns offsets and rows (none where there are no such pairs), and how many items were left alone because more than
    ``MOST_EXCLUDED`` rows bring them.
    """
    count = len(stream)
    documents = stream.representatives()
    own = Lists.single(documents)
    pairs, shared = [], set()
    wanted = [(Lists.single(stream.queries), stream.queries), (own, documents)]
    if known is not None:
        lists = Lists(known.offsets, known.rows)
        inside = stream.queries < len(lists)
        counts = np.zeros(count, dtype=np.int64)
        counts[inside] = lists.lengths[stream.queries[inside]]
        found = Lists.from_counts(counts, lists.values[lists.positions(stream.queries[inside])])
        # The own document is looked up above.
        wanted.append((found.keep(found.values != documents[found.owners()]), documents))
    for lists, items in wanted:
        order = np.argsort(items, kind="stable")
        low = np.searchsorted(items[order], lists.values)
        high = np.searchsorted(items[order], lists.values, side="right")
        many = high - low > MOST_EXCLUDED
        shared |= set(np.unique(lists.values[many]).tolist())
        high = np.where(many, low, high)
        rows = Lists.from_counts(np.diff(np.stack([low, high]), axis=0)[0], order)
        where = np.arange(int(rows.offsets[-1])) + np.repeat(low - rows.offsets[:-1], rows.lengths)
        pairs.append(np.repeat(lists.owners(), rows.lengths) * count + order[where])
    joined = np.unique(np.concatenate(pairs))
    joined = joined[joined // count != joined % count]
    if not len(joined):
        return None, len(shared)
    offsets = np.searchsorted(joined, np.arange(count + 1, dtype=np.int64) * count).astype(np.int64)
    return (offsets, joined % count), len(shared)
