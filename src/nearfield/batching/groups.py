"""Batches of examples that are near each other: of one cluster of one source (Embedding And Clustering Your Data, arXiv 2407.18887), or
unions of communities, small groups of examples that are hard negatives of one another (B3, arXiv 2505.11293).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.arrays import Floats, Index, Mask, Ragged, Rows, Vectors, beside, occurrences, starts
from nearfield.batching.planner import Drawn, Request, SingleSourcePlanner
from nearfield.batching.streams import PlannedRows, Stream, known_of
from nearfield.errors import BadInputError
from nearfield.mining.approximate import Found, Method, hide, nearest, spherical_kmeans, top_columns
from nearfield.provenance import derive_seed, generator

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from nearfield.batching.config import CommunitiesConfig, KMeansStrataConfig


logger = logging.getLogger("nearfield.batching")


# Clusters


class KMeansStrataPlanner(SingleSourcePlanner):
    """As single-source batches, but the examples of a batch have one cluster."""

    config: KMeansStrataConfig
    cluster = staticmethod(spherical_kmeans)

    def strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        """The cluster of each row; found once for all epochs. With one cluster no vectors are needed."""
        strata: tuple[Rows, dict[str, Any]] = self.remember(stream, request, lambda: self._strata(stream, request))
        return strata

    def _strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        config = self.config
        vectors_of = request.need_vectors(config.kind)
        # More clusters than batches would leave none that fills a batch.
        clusters = max(1, min(config.clusters, len(stream) // config.batch_size))
        if not len(stream):
            return np.empty(0, dtype=np.int64), {}
        items = stream.queries if config.side == "query" else stream.representatives()
        seed = request.fixed_seed("kmeans", stream.name)
        clustering = self.cluster(
            vectors_of(config.side, items), clusters, seed=seed, iterations=config.iterations, sample=config.sample
        )
        labels = np.asarray(clustering.labels, dtype=np.int64)
        merged = 0
        if config.small == "merge":
            labels, merged = merge_small(labels, np.asarray(clustering.centroids), config.batch_size)
        sizes = np.bincount(labels, minlength=1)
        about = {
            "kind": "kmeans",
            "wanted": config.clusters,
            "clusters": len(sizes),
            "merged": merged,
            "sizes": np.sort(sizes)[::-1].tolist(),
        }
        logger.info(
            "%s: %d clusters of %d to %d examples (%d asked for, %d small ones merged)",
            stream.name, len(sizes), sizes.min(), sizes.max(), config.clusters, merged,
        )  # fmt: skip
        return labels, about

    def groups(self, drawn: Drawn, strata: Rows, request: Request, turn: int) -> Iterator[Rows]:
        """The rows of each cluster, in the order in which a single-source batch would take them."""
        labels = strata[drawn.order]
        by_label = drawn.order[np.argsort(labels, kind="stable")]
        edges = np.searchsorted(np.sort(labels), np.arange(int(strata.max(initial=-1)) + 2))
        for start, stop in itertools.pairwise(edges.tolist()):
            yield by_label[start:stop]


def merge_small(labels: Rows, centroids: Vectors, least: int) -> tuple[Rows, int]:
    """Join clusters with fewer than ``least`` members to the nearest other one, smallest first.

    Returns the labels, numbered anew without gaps, and how many clusters were joined to another.
    """
    sizes = np.bincount(labels, minlength=len(centroids)).astype(np.int64)
    sums = centroids.astype(np.float64) * sizes[:, None]
    target = np.arange(len(centroids))
    alive = sizes > 0
    merged = 0
    while alive.sum() > 1:
        living = np.flatnonzero(alive)
        small = living[np.argmin(sizes[living])]
        if sizes[small] >= least:
            break
        others = living[living != small]
        norms = np.maximum(np.linalg.norm(sums[others], axis=1), 1e-12)
        nearest = others[np.argmax((sums[others] @ sums[small]) / norms)]
        target[target == small] = nearest
        sums[nearest] += sums[small]
        sizes[nearest] += sizes[small]
        alive[small] = False
        merged += 1
    renumbered = np.cumsum(alive) - 1
    result: Rows = renumbered[target[labels]].astype(np.int64)
    return result, merged


# Communities

MOST_EXCLUDED = 1000
"""An item that more examples bring than this is not taken out of rankings: its pairs alone would fill the memory."""
LABEL_BLOCK = 10_000
"""Examples that the label variant links among each other at a time, as in the authors' code."""
LABEL_SHARE = 0.3
"""Share of the labels that an example is linked to, the nearest ones."""


@dataclass(frozen=True)
class Partition:
    """A graph cut into groups of one size."""

    groups: Rows
    """Rows of the nodes, shape (g, size), rising within a group."""
    unplaced: Rows
    """Nodes in no group: all without an edge, and fewer than ``size`` others."""
    isolated: int
    """Nodes without an edge."""
    moved: int
    """Nodes that METIS had put elsewhere and that were moved to make the sizes exact."""


@dataclass(frozen=True)
class Communities:
    """Groups of exactly ``size`` examples; every example is in one group or left over."""

    groups: Rows
    """Rows of the examples, shape (g, size)."""
    left: Rows
    """Examples in no group, fewer than ``size``."""
    cut: float
    """Share of the edges whose two ends are not in one group; 0 where there are no edges."""
    edges: int
    """Undirected (mutual) edges."""
    recall: float | None
    """Recall of the search at min(rank_to, 30); None: exact."""
    seconds: dict[str, float]
    """Wall time of each phase: neighbours, graph, cut."""
    neighbours: Found
    """The rank window of each query, shape (n, rank_to - rank_from); -1 where it has fewer."""
    first: Found
    """The ranks before the window, shape (n, rank_from)."""
    isolated: int
    """Examples without a mutual edge. They fill groups of their own, beside others that point at the same group."""
    moved: int
    """Examples moved to make the sizes exact."""
    recall_all: float | None = None
    """Recall of the search at rank_to."""


def find_communities(
    queries: Vectors,
    documents: Vectors,
    *,
    size: int,
    window: tuple[int, int],
    seed: int,
    method: Method,
    excluded: Ragged | None = None,
    labels: Rows | None = None,
) -> Communities:
    """Put n examples into groups of ``size`` that are strong negatives of one another (B3, steps 1 to 5).

    ``queries`` and ``documents`` (n, d) are the teacher's unit vectors of each example's query and positive. Every query
    ranks all documents but its ``excluded`` ones (its own takes a rank, as in the paper). Ranks before the ``window``
    [rank_from, rank_to) are likely false negatives; those in it become edges where both examples have the other there. METIS
    cuts the graph into parts, which are then made exactly equal.

    With ``labels`` (n,) the variant for classification: in random blocks of 10,000 an example is linked to all examples
    of the 30 % of labels, other than its own, that come first in its ranking. ``rank_from`` has no meaning there, and
    ``neighbours`` holds the nearest rank_to - rank_from documents of these labels in the block.
    """
    rank_from, rank_to = window
    if len(queries) != len(documents):
        raise BadInputError(f"{len(queries)} queries and {len(documents)} documents: an example has one of each")
    if size < 2:
        raise BadInputError(f"a group of {size} has no negatives", hint="Ask for groups of at least 2.")
    if not 0 <= rank_from < rank_to:
        raise BadInputError(f"the rank window [{rank_from}, {rank_to}) is empty")
    if labels is not None:
        return _label_communities(queries, documents, labels, size, rank_to - rank_from, seed, excluded)
    seconds: dict[str, float] = {}
    begun = time.perf_counter()
    neighbours = nearest(queries, documents, rank_to, method=method, seed=seed, excluded=excluded)
    first, edges_to = neighbours.rows[:, :rank_from].copy(), neighbours.rows[:, rank_from:].copy()
    recalls = neighbours.recall, neighbours.recall_all
    del neighbours  # its scores are as large as the graph that comes next
    begun = _lap(seconds, "neighbours", begun)
    graph = mutual_edges(edges_to)
    begun = _lap(seconds, "graph", begun)
    part = partition(graph, size, seed)
    groups, left = _gather(part.groups, part.unplaced, edges_to, size)
    edges, cut = graph.nnz // 2, cut_edges(graph, groups)
    _lap(seconds, "cut", begun)
    share = cut / edges if edges else 0.0
    return Communities(
        groups, left, share, edges, recalls[0], seconds, edges_to, first, part.isolated, part.moved, recalls[1]
    )


def mutual_edges(neighbours: Found) -> csr_array:
    """The graph (n, n) of the pairs that have one another among their neighbours (n, w); -1 and oneself are no neighbours.

    Mutual edges only: one-sided ones would draw clusters around hubs.
    """
    from scipy.sparse import csr_array

    count = len(neighbours)
    ordered = np.sort(neighbours, axis=1)
    real = (ordered >= 0) & (ordered != np.arange(count)[:, None])
    ends = np.concatenate([[0], np.cumsum(np.count_nonzero(real, axis=1))])
    columns = ordered[real]
    del ordered, real
    small = np.int32 if len(columns) < 2**31 else np.int64
    directed = csr_array(
        (np.ones(len(columns), np.int8), columns.astype(small), ends.astype(small)), shape=(count, count)
    )
    directed.has_canonical_format = True
    return directed.multiply(directed.T.tocsr()).tocsr()


def partition(graph: csr_array, size: int, seed: int) -> Partition:
    """Cut a symmetric graph into groups of exactly ``size`` nodes: METIS, then moves that cost the fewest edges.

    Nodes without an edge take no part: METIS would spread them over the groups to balance sizes.
    """
    degrees = np.diff(graph.indptr)
    linked = np.flatnonzero(degrees > 0)
    isolated = np.flatnonzero(degrees == 0)
    count = len(linked) // size
    if count == 0:
        return Partition(np.empty((0, size), np.int64), np.arange(len(degrees)), len(isolated), 0)
    inner = graph if len(isolated) == 0 else graph[linked][:, linked]
    parts = _metis(inner, count, seed)
    before = parts.copy()
    _make_exact(inner, parts, count, size)
    placed = np.flatnonzero(parts >= 0)
    moved = int(np.count_nonzero((parts != before) & (parts >= 0)))
    groups = linked[placed[np.argsort(parts[placed], kind="stable")]].reshape(count, size)
    return Partition(groups, np.sort(np.concatenate([linked[parts < 0], isolated])), len(isolated), moved)


def cut_edges(graph: csr_array, groups: Rows) -> int:
    """How many undirected edges do not have both ends in one group."""
    group_of = _group_of(groups, graph.shape[0])
    inside = 0
    for start in range(0, graph.shape[0], 1 << 16):
        stop = min(start + (1 << 16), graph.shape[0])
        ends = graph.indptr[start : stop + 1]
        there = group_of[graph.indices[ends[0] : ends[-1]]]
        inside += int(np.count_nonzero((there >= 0) & (there == np.repeat(group_of[start:stop], np.diff(ends)))))
    return (int(graph.nnz) - inside) // 2


def _lap(seconds: dict[str, float], phase: str, begun: float) -> float:
    now = time.perf_counter()
    seconds[phase] = seconds.get(phase, 0.0) + now - begun
    return now


def _group_of(groups: Rows, count: int) -> Found:
    """The group of each of ``count`` nodes, -1 without one."""
    group_of = np.full(count, -1, dtype=np.int32)
    group_of[groups.ravel()] = np.repeat(np.arange(len(groups), dtype=np.int32), groups.shape[1])
    return group_of


def _metis(graph: csr_array, count: int, seed: int) -> Found:
    """The part of each node, (n,); parts are only roughly equal.

    Recursive bisection: with many small parts it cuts fewer edges than METIS's direct way, in a fifth of the time.
    """
    import pymetis

    width = pymetis.zero_copy_dtype()
    adjacency = pymetis.CSRAdjacency(graph.indptr.astype(width), graph.indices.astype(width))
    options = pymetis.Options(seed=derive_seed(seed, "communities") % 2**31, ufactor=1)
    parts = pymetis.part_graph(count, adjacency, options=options, recursive=True)
    return np.asarray(parts.vertex_part, dtype=np.int32)


def _make_exact(graph: csr_array, parts: Found, count: int, size: int) -> None:
    """Bring every part to exactly ``size`` nodes, in place; nodes without a place get -1.

    Too large parts lose the nodes with the fewest edges inside, the lowest row of equal ones. Too small parts take of
    these the ones with the most edges into them; places that no edge speaks for are filled in order of rows.
    """
    sizes = np.bincount(parts, minlength=count)
    members = np.flatnonzero(sizes[parts] > size)
    inside = _edges_into(graph, members, parts, parts[members])
    order = members[np.lexsort((members, inside, parts[members]))]
    pool = np.sort(order[occurrences(parts[order]) < (sizes - size)[parts[order]]])
    parts[pool] = -1
    room = size - np.bincount(parts[parts >= 0], minlength=count)
    sub = graph[pool]
    there = parts[sub.indices]
    node = np.repeat(np.arange(len(pool)), np.diff(sub.indptr))
    wanted = (there >= 0) & (room[there] > 0)
    pairs, links = np.unique(node[wanted] * np.int64(count) + there[wanted], return_counts=True)
    for pair in pairs[np.argsort(-links, kind="stable")].tolist():
        number, part = divmod(pair, count)
        if room[part] and parts[pool[number]] < 0:
            parts[pool[number]] = part
            room[part] -= 1
    rest = pool[parts[pool] < 0]
    slots = np.repeat(np.arange(count), room)
    parts[rest[: len(slots)]] = slots[: len(rest)]


def _edges_into(graph: csr_array, nodes: Rows, parts: Found, wanted: Found) -> Rows:
    """How many edges each node has into its wanted part."""
    sub = graph[nodes]
    owner = np.repeat(np.arange(len(nodes)), np.diff(sub.indptr))
    return np.bincount(owner[parts[sub.indices] == wanted[owner]], minlength=len(nodes)).astype(np.int64)


def _gather(groups: Rows, unplaced: Rows, neighbours: Found, size: int) -> tuple[Rows, Rows]:
    """Make groups of the unplaced too: those whose first placed neighbour lies in one group come together."""
    near = neighbours[unplaced]
    group_of = _group_of(groups, len(neighbours))
    towards = np.where(near >= 0, group_of[near], -1)
    known = (towards >= 0).argmax(axis=1)[:, None]
    order = unplaced[np.lexsort((unplaced, np.take_along_axis(towards, known, axis=1)[:, 0]))]
    whole = len(order) // size * size
    more = np.sort(order[:whole].reshape(-1, size), axis=1)
    return np.concatenate([groups, more]), np.sort(order[whole:])


def _label_communities(
    queries: Vectors,
    documents: Vectors,
    labels: Rows,
    size: int,
    width: int,
    seed: int,
    excluded: Ragged | None,
) -> Communities:
    if len(labels) != len(queries):
        raise BadInputError(f"{len(labels)} labels for {len(queries)} examples")
    count = len(queries)
    wanted = int(np.ceil(LABEL_SHARE * len(np.unique(labels))))
    neighbours = np.full((count, width), -1, dtype=np.int32)
    groups: list[Rows] = [np.empty((0, size), dtype=np.int64)]
    unplaced: list[Rows] = []
    seconds: dict[str, float] = {}
    edges = inside = isolated = moved = 0
    shuffled = generator(seed, "communities", "blocks").permutation(count)
    for block in np.array_split(shuffled, max(1, -(-count // LABEL_BLOCK))):
        rows = np.sort(block)
        begun = time.perf_counter()
        codes = np.unique(labels[rows], return_inverse=True)[1]
        linked, neighbours[rows] = _label_ranking(queries, documents, rows, codes, wanted, width, excluded)
        begun = _lap(seconds, "neighbours", begun)
        graph = _label_graph(linked, codes)
        begun = _lap(seconds, "graph", begun)
        part = partition(graph, size, seed)
        _lap(seconds, "cut", begun)
        groups.append(rows[part.groups])
        unplaced.append(rows[part.unplaced])
        edges += graph.nnz // 2
        inside += graph.nnz // 2 - cut_edges(graph, part.groups)
        isolated += part.isolated
        moved += part.moved
    made, left = _gather(np.concatenate(groups), np.sort(np.concatenate(unplaced)), neighbours, size)
    share = 1 - inside / edges if edges else 0.0
    first = np.empty((count, 0), dtype=np.int32)
    return Communities(made, left, share, edges, None, seconds, neighbours, first, isolated, moved)


def _label_ranking(
    queries: Vectors,
    documents: Vectors,
    rows: Rows,
    codes: Rows,
    wanted: int,
    width: int,
    excluded: Ragged | None,
) -> tuple[Mask, Found]:
    """For each example of a block: which labels its ranking links it to, (b, labels), and their nearest documents.

    The order of labels in a ranking is that of their best documents, so a maximum over each label's documents will do.
    """
    by_label = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[by_label], np.arange(codes.max(initial=-1) + 1))
    linked = np.zeros((len(rows), len(starts)), dtype=bool)
    nearest_rows = np.full((len(rows), width), -1, dtype=np.int32)
    among = np.asarray(documents[rows])
    for start in range(0, len(rows), 1024):
        part = slice(start, min(start + 1024, len(rows)))
        here = np.arange(part.start, part.stop)
        scores = queries[rows[part]] @ among.T
        if excluded is not None:
            hide(scores, rows[part], rows, excluded)
        best = np.maximum.reduceat(scores[:, by_label], starts, axis=1)
        best[here - start, codes[part]] = -np.inf
        columns, values = top_columns(best, wanted)
        near = ~np.isneginf(values)
        linked[np.broadcast_to(here[:, None], columns.shape)[near], columns[near]] = True
        scores[~linked[part][:, codes]] = -np.inf
        columns, values = top_columns(scores, width)
        nearest_rows[part, : columns.shape[1]] = np.where(np.isneginf(values), -1, rows[columns])
    return linked, nearest_rows


def _label_graph(linked: Mask, codes: Rows) -> csr_array:
    """The graph of a block: an edge where each of two examples is linked to the other's label."""
    from scipy.sparse import csr_array

    to = linked[:, codes]
    return csr_array((to & to.T).astype(np.int8))


def negative_weights(communities: Communities, members: Rows, excluded: Ragged | None = None) -> tuple[Found, Rows]:
    """Documents (rising rows) of positive weight for a group, and the weights : as often as it stands in the rankings of the
    group's members up to ``rank_to``, less two for each time that it stands before the window. The members' own documents and
    those ``excluded`` for a member weigh nothing."""
    before, window = communities.first[members].ravel(), communities.neighbours[members].ravel()
    candidates, where = np.unique(np.concatenate([before, window]), return_inverse=True)
    # Before the window a document counts once and costs two.
    steps = np.concatenate([np.full(len(before), -1), np.ones(len(window), dtype=np.int64)])
    weights = np.bincount(where, weights=steps, minlength=len(candidates)).astype(np.int64)
    weights[(candidates < 0) | np.isin(candidates, members)] = 0
    if excluded is not None:
        weights[np.isin(candidates, excluded.take(members).values)] = 0
    return candidates[weights > 0].astype(np.int32), weights[weights > 0]


# Batches of communities


@dataclass(frozen=True)
class _StreamCommunities:
    groups: Rows
    """[g, K] rows of the stream."""
    of_row: Rows
    """(n,) the community of each row, -1 for none."""
    found: Communities | None
    about: dict[str, Any]


class CommunityPlanner(SingleSourcePlanner):
    """Each batch is a union of random whole communities of one stream.

    Members that cannot be together (they share an item) and those of broken communities (part of a mixture, say) fill
    what room there is, and are counted as moved.
    """

    config: CommunitiesConfig

    whole_groups = True
    find = staticmethod(find_communities)

    def communities(self, stream: Stream, request: Request) -> _StreamCommunities:
        """The communities of a stream; found once for all epochs."""
        known: _StreamCommunities = self.remember(stream, request, lambda: self._find(stream, request))
        return known

    def _find(self, stream: Stream, request: Request) -> _StreamCommunities:
        config = self.config
        vectors_of = request.need_vectors(config.kind)
        none = np.full(len(stream), -1, dtype=np.int64)
        empty = np.empty((0, config.community_size), dtype=np.int64)
        if len(stream) < 2 * config.community_size:
            return _StreamCommunities(empty, none, None, {})
        excluded, shared = excluded_pairs(stream, request.known)
        communities = self.find(
            vectors_of("query", stream.queries),
            vectors_of("document", stream.representatives()),
            size=config.community_size,
            window=(config.rank_from, config.rank_to),
            seed=request.fixed_seed("communities", stream.name),
            method=config.search,
            excluded=excluded,
            labels=stream.labels,
        )
        groups = np.asarray(communities.groups, dtype=np.int64)
        none[groups] = np.arange(len(groups))[:, None]
        about = {
            "kind": "communities",
            "communities": len(groups),
            "size": config.community_size,
            "left": len(communities.left),
            "cut": round(float(communities.cut), 6),
            "edges": int(communities.edges),
            "without_edge": int(communities.isolated),
            "recall": None if communities.recall is None else round(float(communities.recall), 6),
            "items_in_too_many_examples": shared,
        }
        logger.info(
            "%s: %d communities of %d, %.1f %% of %d edges cut; %s",
            stream.name, len(groups), config.community_size, 100 * communities.cut, communities.edges,
            ", ".join(f"{name} {seconds:.1f} s" for name, seconds in communities.seconds.items()),
        )  # fmt: skip
        return _StreamCommunities(groups, none, communities, about)

    def strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        """The community of each row."""
        communities = self.communities(stream, request)
        return communities.of_row, communities.about

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
        """Add the negatives of communities, if any are asked for."""
        communities = self.communities(drawn.stream, request).found
        if not self.config.cluster_negatives or communities is None:
            return rows
        return add_cluster_negatives(
            rows,
            sizes,
            self.config.cluster_negatives,
            communities=communities,
            representatives=drawn.stream.representatives(),
            known=request.known if self.config.known_positives == "forbid" else None,
            random=request.random("cluster negatives", drawn.stream.name),
        )


def excluded_pairs(stream: Stream, known: Ragged | None) -> tuple[Ragged | None, int]:
    """For each row of a stream, the other rows that are no negatives of it: they have its query, its document or a known
    positive of its query.

    Returns them (None where there are no such pairs), and how many items were left alone because more than
    ``MOST_EXCLUDED`` rows bring them.
    """
    count, documents = len(stream), stream.representatives()
    wanted = [(Ragged.single(stream.queries), stream.queries), (Ragged.single(documents), documents)]
    if known is not None:
        positives = known_of(known, stream.queries)
        # The own document is looked up above.
        wanted.append((positives.keep(positives.values != documents[positives.owners()]), documents))
    owners, rows, shared = [], [], set()
    for lists, items in wanted:
        index = Index(items)
        shared |= set(np.unique(lists.values[index.counts(lists.values) > MOST_EXCLUDED]).tolist())
        bearers = index.all(lists.values, most=MOST_EXCLUDED)
        owners.append(lists.owners()[bearers.owners()])
        rows.append(bearers.values)
    owner, row = np.concatenate(owners), np.concatenate(rows)
    pairs = Ragged.from_pairs(owner[owner != row], row[owner != row], count)
    return (pairs if len(pairs.values) else None), len(shared)


def add_cluster_negatives(
    rows: PlannedRows,
    sizes: Rows,
    count: int,
    *,
    communities: Communities,
    representatives: Rows,
    known: Ragged | None,
    random: np.random.Generator,
) -> PlannedRows:
    """Give each row of a community ``count`` negatives more, from one distribution a community.

    ``rows`` are batches of these ``sizes``, their strata numbers of ``communities.groups``; ``representatives`` (n,) are the
    documents of the stream's rows. :func:`negative_weights` says how likely a document
    is; they are drawn without replacement. One that is in the batch already, or is a known positive of one of its
    queries, is not drawn: so a row may get fewer. Rows of no community get none.
    """
    strata = rows.stratum
    items, offsets = rows.items(), starts(sizes)
    counts = np.zeros(len(rows), dtype=np.int64)
    drawn: dict[int, Rows] = {}
    for batch in range(len(sizes)):
        inside = np.arange(offsets[batch], offsets[batch + 1])
        taken = items.values[items.offsets[inside[0]] : items.offsets[inside[-1] + 1]]
        if known is not None:
            taken = np.concatenate([taken, known_of(known, rows.query[inside]).values])
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
    return dataclasses.replace(rows, negatives=beside(rows.negatives, Ragged.from_lengths(counts, values)))


def _draw(documents: Rows, weights: Floats, count: int, random: np.random.Generator) -> Rows:
    """Draw without replacement in proportion to the weights: the least of exponential draws with these rates."""
    if not len(documents):
        return documents
    keys = random.exponential(size=len(documents)) / weights
    return documents[np.argsort(keys, kind="stable")[:count]]
