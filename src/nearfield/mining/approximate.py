"""Approximate search with its recall measured: by cells of k-means (the same on any number of threads), or by FAISS.

The spherical k-means here, in blocks, also makes the strata of cluster-stratified batches (arXiv 2407.18887).
:func:`nearest` is what plans are made of, and so is a function of vectors and seed alone; :func:`approximate_search` is for
mining, where more of the index is left to settings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Floats, Index, Mask, Ragged, Rows, Vectors
from nearfield.errors import BadInputError
from nearfield.mining.search import DEFAULT_MEMORY, ArrayDocuments, Neighbours, check_vectors, ordered, search
from nearfield.provenance import derive_seed, generator

if TYPE_CHECKING:
    from nearfield.mining.config import ApproximateSearch


_BLOCK_BYTES = 64 << 20
_TIE = 1e-6
"""Similarities in float32 that lie closer than this are compared again in float64: GEMMs round by thread count."""
_PAIRS = 1 << 16


@dataclass(frozen=True)
class KMeans:
    """Clusters of unit vectors."""

    labels: Found
    """The cluster of each vector, shape (n,): that of the most similar centroid, the lowest number of equal ones."""
    centroids: Vectors
    """Unit vectors, shape (clusters, d)."""
    sizes: npt.NDArray[np.int64]
    """Vectors in each cluster, shape (clusters,); 0 only where there are too few distinct vectors."""
    objective: npt.NDArray[np.float64]
    """Mean cosine of the (sampled) vectors to their centroids, at each iteration's assignment. It never falls."""


def spherical_kmeans(
    vectors: Vectors, clusters: int, *, seed: int, iterations: int = 20, sample: int | None = None
) -> KMeans:
    """Cluster unit vectors (n, d) by cosine: Lloyd's iterations with centroids scaled to length 1.

     The iterations see ``sample`` vectors drawn by the seed (None: all), then all vectors are assigned; 256 vectors a
     cluster hardly place a centroid worse than more. They begin with k-means++ and end early where nothing moves. A
     cluster that lost its members gets the vector that its own centroid fits worst. Needs some hundred MB above the sample
    ; ``vectors`` may be a memory map.
    """
    check_unit_rows(vectors, "vectors")
    if not 1 <= clusters <= len(vectors):
        raise BadInputError(f"{len(vectors)} vectors cannot make {clusters} clusters", hint="Ask for fewer clusters.")
    if iterations < 1:
        raise BadInputError(f"k-means needs at least one iteration, not {iterations}")
    random = generator(seed, "kmeans")
    wanted = len(vectors) if sample is None else max(sample, clusters)
    whole = wanted >= len(vectors)
    points = vectors if whole else vectors[np.sort(random.choice(len(vectors), size=wanted, replace=False))]
    centroids = _first_centroids(points, clusters, random)
    objective: list[float] = []
    before: Found | None = None
    settled = False
    for _ in range(iterations):
        labels, similarities = assign(points, centroids)
        objective.append(float(similarities.mean()))
        settled = before is not None and bool(np.array_equal(labels, before))
        if settled:
            break
        before = labels.copy()
        _fill_empty(labels, similarities, clusters)
        centroids = _means(points, labels, centroids)
    if not (whole and settled):
        labels, similarities = assign(vectors, centroids)
        if whole:
            objective.append(float(similarities.mean()))
    sizes = np.bincount(labels, minlength=clusters).astype(np.int64)
    return KMeans(labels, centroids, sizes, np.asarray(objective))


def assign(vectors: Vectors, centroids: Vectors) -> tuple[Found, Floats]:
    """The most similar centroid of each vector (the lowest number of equal ones) and the similarity, both (n,)."""
    labels = np.empty(len(vectors), dtype=np.int32)
    similarities = np.empty(len(vectors), dtype=np.float64)
    precise = centroids.astype(np.float64)
    for start, stop in _blocks(len(vectors), len(centroids)):
        block = np.asarray(vectors[start:stop])
        scores = block @ centroids.T
        here = np.arange(len(block))
        best = scores.argmax(axis=1)
        top = scores[here, best]
        # The second best says where to look twice; a mask of all near ones would cost more than the product.
        scores[here, best] = -np.inf
        unsure = np.flatnonzero(scores.max(axis=1) >= top - np.float32(_TIE))
        if len(unsure):
            close = scores[unsure] >= (top[unsure] - np.float32(_TIE))[:, None]
            close[np.arange(len(unsure)), best[unsure]] = True
            best[unsure] = _settle_ties(block[unsure].astype(np.float64), close, precise)
        labels[start:stop] = best
        similarities[start:stop] = np.einsum("nd,nd->n", block, precise[best], dtype=np.float64)
    return labels, similarities


def check_unit_rows(vectors: Vectors, name: str) -> None:
    """Raise :class:`BadInputError` unless ``vectors`` are finite float32 rows of length 1."""
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise BadInputError(f"the {name} must be a float32 matrix; they are {vectors.dtype} of shape {vectors.shape}")
    for start, stop in _blocks(len(vectors), vectors.shape[1]):
        block = vectors[start:stop]
        lengths = np.einsum("nd,nd->n", block, block)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))
        if len(wrong):
            raise BadInputError(
                f"row {start + wrong[0]} of the {name} has length {float(np.sqrt(lengths[wrong[0]])):.4g}, not 1",
                hint="Normalise the vectors to unit length.",
            )


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose float32 matrix with ``columns`` columns stays within the block's bytes."""
    step = int(np.clip(_BLOCK_BYTES // (4 * max(columns, 1)), 256, 1 << 14))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _settle_ties(rows: Floats, close: npt.NDArray[np.bool_], centroids: Floats) -> npt.NDArray[np.int64]:
    """The best of the columns marked in ``close`` for each row, by float64 products in a fixed order."""
    row, column = np.nonzero(close)
    exact = np.empty(len(row))
    for start in range(0, len(row), _PAIRS):
        part = slice(start, start + _PAIRS)
        exact[part] = np.einsum("nd,nd->n", rows[row[part]], centroids[column[part]])
    order = np.lexsort((column, -exact, row))
    first = np.searchsorted(row[order], np.arange(len(rows)))
    best: npt.NDArray[np.int64] = column[order[first]]
    return best


def _first_centroids(points: Vectors, clusters: int, random: np.random.Generator) -> Vectors:
    """k-means++ on a subset of 16 points a cluster, at most 256 rounds: several centroids a round where there are more.

    Each is drawn with a chance in proportion to its squared distance from the centroids so far, 2 - 2 cos. Where a round
    draws one, it draws 2 + log(clusters) and keeps the one that leaves the least distance (greedy k-means++).
    """
    count = min(len(points), max(16 * clusters, 4096))
    pool = np.asarray(points[np.sort(random.choice(len(points), size=count, replace=False))])
    chosen = [int(random.integers(count))]
    best = pool @ pool[chosen[0]]
    rounds = min(clusters - 1, 255)
    for share in np.array_split(np.arange(clusters - 1), rounds) if rounds else ():
        weights = np.clip(1 - best.astype(np.float64), 0, None)
        # The distance between equal vectors is rounding error: no reason to draw one.
        weights[weights < _TIE] = 0
        # The smallest of exponential draws over weights are a weighted draw without replacement.
        draws = random.exponential(size=count)
        keys = np.divide(draws, weights, out=np.full(count, np.inf), where=weights > 0)
        keys[chosen] = np.nan  # sorts last of all
        tries = len(share) if len(share) > 1 else min(2 + int(np.log(clusters)), count - len(chosen))
        new = np.argsort(keys, kind="stable")[:tries]
        reached = np.maximum(best[:, None], pool @ pool[new].T)
        if len(share) == 1:
            best_trial = int(reached.sum(axis=0, dtype=np.float64).argmax())
            new, reached = new[best_trial : best_trial + 1], reached[:, best_trial : best_trial + 1]
        chosen += new.tolist()
        best = reached.max(axis=1)
    return pool[chosen]


def _fill_empty(labels: Found, similarities: Floats, clusters: int) -> None:
    """Give each empty cluster the vector that its own centroid fits worst, in place; none loses its last member."""
    sizes = np.bincount(labels, minlength=clusters)
    empty = np.flatnonzero(sizes == 0).tolist()
    if not empty:
        return
    for row in np.argsort(similarities, kind="stable"):
        if not empty:
            return
        if sizes[labels[row]] > 1:
            sizes[labels[row]] -= 1
            labels[row] = empty.pop(0)


def _means(points: Vectors, labels: Found, centroids: Vectors) -> Vectors:
    """The normalised mean of each cluster; a cluster whose members cancel out keeps its centroid."""
    sums = cluster_sums(points, labels, len(centroids))
    lengths = np.linalg.norm(sums, axis=1)
    cancelled = lengths < 1e-9
    means: Vectors = (sums / np.where(cancelled, 1, lengths)[:, None]).astype(np.float32)
    means[cancelled] = centroids[cancelled]
    return means


def cluster_sums(points: Vectors, labels: Found, clusters: int) -> Floats:
    """The sum of each cluster's vectors, (clusters, d), in float64 and always in the order of rows."""
    from scipy.sparse import csr_array

    sums = np.zeros((clusters, points.shape[1]))
    for start, stop in _blocks(len(points), points.shape[1]):
        columns = np.arange(stop - start)
        members = csr_array((np.ones(stop - start), (labels[start:stop], columns)), shape=(clusters, stop - start))
        sums += members @ points[start:stop].astype(np.float64)
    return sums


logger = logging.getLogger("nearfield.mining")

_QUERIES = 4_096
_TRAIN_A_LIST = 64


class VectorIndex(Protocol):
    """Documents that are ready to be searched."""

    def search(self, queries: Vectors, k: int) -> tuple[Any, Rows]:
        """Scores, which nothing here reads, and rows [n, k] of the best documents of queries [n, d] that are found; -1 for none."""
        ...


@dataclass(frozen=True)
class Recall:
    """Of the true best documents of a sample of queries, the share that an approximate search found."""

    value: float
    queries: int
    depth: int


def approximate_search(
    queries: Vectors,
    documents: Vectors,
    depth: int,
    config: ApproximateSearch,
    *,
    excluded: Ragged | None = None,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
) -> tuple[Neighbours, Recall]:
    """As :func:`~nearfield.mining.search.search`, but not all of the best are found; which share is measured and logged.

    The results are scored by :func:`~nearfield.mining.search.pair_scores` and ordered as the exact search orders them.
    The index holds a copy of the documents, and HNSW its links beside. On several threads the index may come out
    differently; on one it is a function of the vectors and the seed.
    """
    check_vectors(queries, "the queries")
    check_vectors(documents, "the documents")
    if queries.shape[1] != documents.shape[1]:
        raise BadInputError(f"the documents have {documents.shape[1]} dimensions and the queries {queries.shape[1]}")
    index = config.build(np.ascontiguousarray(documents), seed)
    rows = np.full((len(queries), depth), -1, dtype=np.int64)
    scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)
    source = ArrayDocuments(documents)
    for start in range(0, len(queries), _QUERIES):
        stop = min(start + _QUERIES, len(queries))
        hidden = None if excluded is None else excluded.slice(start, stop)
        # Indexes know no list of exclusions a query: as many more are asked for as are hidden from any of these.
        more = 0 if hidden is None else int(hidden.lengths.max(initial=0))
        _, nearest_rows = index.search(np.ascontiguousarray(queries[start:stop]), min(depth + more, len(documents)))
        nearest_rows = np.where(_listed(nearest_rows, hidden), -1, nearest_rows)
        owner, place = np.nonzero(nearest_rows >= 0)
        exact = np.full(nearest_rows.shape, -np.inf, dtype=np.float32)
        exact[owner, place] = source.pairs(queries, owner + start, nearest_rows[owner, place])
        rows[start:stop], scores[start:stop] = ordered(nearest_rows, exact, depth)
    neighbours = Neighbours(rows, scores)
    recall = measure_recall(neighbours, queries, documents, config.sample, excluded, seed, memory)
    logger.info(
        "%s: %.1f%% of the true best %d found (measured on %d queries)",
        config.kind,
        100 * recall.value,
        depth,
        recall.queries,
    )
    return neighbours, recall


def measure_recall(
    found: Neighbours,
    queries: Vectors,
    documents: Vectors,
    sample: int,
    excluded: Ragged | None = None,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
) -> Recall:
    """The share of the true best of ``sample`` queries, drawn by the seed, that were found."""
    count, depth = found.rows.shape
    chosen = np.sort(generator(seed, "mine", "recall").choice(count, size=min(sample, count), replace=False))
    hidden = _taken(excluded, chosen)
    true = search(queries[chosen], documents, depth, excluded=hidden, memory=memory)
    return Recall(recall(found.rows[chosen], true.rows), len(chosen), depth)


def inverted_lists(documents: Vectors, lists: int | None, probes: int, seed: int) -> VectorIndex:
    """FAISS inverted lists: of documents by their nearest centre; ``probes`` lists are looked at for a query."""
    import faiss

    dimension = documents.shape[1]
    lists = min(lists or max(1, round(4 * np.sqrt(len(documents)))), max(1, len(documents)))
    index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = derive_seed(seed, "mine", "ivf") % (1 << 31)
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAIN_A_LIST
    index.nprobe = min(probes, lists)
    if len(documents):
        index.train(documents)
    return _filled(index, documents)


def small_world(documents: Vectors, links: int, build_width: int, width: int) -> VectorIndex:
    """A graph in which FAISS links each document to others near it and finds the best of a query by walking along them."""
    import faiss

    index: Any = faiss.IndexHNSWFlat(documents.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = build_width
    index.hnsw.efSearch = width
    return _filled(index, documents)


def _filled(index: Any, documents: Vectors) -> VectorIndex:
    if len(documents):
        index.add(documents)
    filled: VectorIndex = index
    return filled


def _listed(rows: Rows, hidden: Ragged | None) -> Mask:
    """[n, k] bool: which of the found rows are hidden from their query."""
    if hidden is None:
        return np.zeros(rows.shape, dtype=bool)
    width = int(max(rows.max(initial=0), hidden.values.max(initial=0))) + 2
    keys = hidden.owners() * width + hidden.values
    listed: Mask = np.isin(np.arange(len(rows))[:, None] * width + rows, keys)
    return listed


Found = npt.NDArray[np.int32]
"""Document rows; -1 for none."""
Method = Literal["exact", "ivf"]

WANTED_RECALL = 0.9
RECALL_AT = 30
_MARGIN = 0.02
"""Probes are chosen for a recall this much higher: they are chosen on other queries than the recall is measured on."""
_FEWEST_PROBES = 8
"""Cells are searched at the speed of matrix products: below this, search is cheaper than finding the cells."""
_MOST_OF_CELLS = 0.5
"""Where a larger share of the cells is needed the vectors have no cells to speak of: all documents are searched."""
_TILE = 64
_CELL_SAMPLE = 64
_CELL_ITERATIONS = 8


@dataclass(frozen=True)
class Nearest:
    """The best documents of each query in falling order; equal float32 scores by the lowest row."""

    rows: Found
    """Document rows, shape (n, k); -1 where a query has fewer."""
    scores: Vectors
    """Inner products, shape (n, k); -inf where a query has fewer."""
    recall: float | None
    """Share of the true best min(k, 30) that was found, over queries that the settings were not chosen on; None: exact."""
    recall_all: float | None = None
    """The same for all k."""
    cells: int | None = None
    probes: int | None = None
    """How many cells the documents lie in, and how many are searched for a query."""


def nearest(
    queries: Vectors,
    documents: Vectors,
    k: int,
    *,
    method: Method,
    seed: int,
    excluded: Ragged | None = None,
    memory: int = 1 << 30,
    recall_sample: int = 1000,
) -> Nearest:
    """The ``k`` documents (m, d) of the highest inner product with each query (n, d), both rows of length 1.

    ``exact`` multiplies all with all in blocks. ``ivf`` puts the documents into about 2 sqrt(m) cells by k-means and
    searches each query's nearest cells, each cell for all of its queries at once: as many as give recall@30 >= 0.9 on ``recall_sample`` queries, at least 8; where that is more than half of the cells, all documents
    are searched. The recall is then measured on as many other queries (on the same where there are too few). ``memory`` bounds the bytes above the vectors and the result; where it is too
    small for one row's work it is exceeded.
    """
    check_unit_rows(queries, "queries")
    check_unit_rows(documents, "documents")
    if queries.shape[1] != documents.shape[1]:
        raise BadInputError(f"queries have {queries.shape[1]} dimensions, documents {documents.shape[1]}")
    if k < 1:
        raise BadInputError(f"k must be at least 1, not {k}")
    if excluded is not None and len(excluded) != len(queries):
        raise BadInputError(f"{len(excluded)} lists of excluded documents for {len(queries)} queries")
    if method == "exact" or len(documents) == 0 or len(queries) == 0:
        return Nearest(*_exact(queries, documents, k, excluded, memory), None)
    return _search_cells(queries, documents, k, seed, excluded, memory, recall_sample)


def _exact(queries: Vectors, documents: Vectors, k: int, excluded: Ragged | None, memory: int) -> tuple[Found, Vectors]:
    """(rows, scores) by the exact search; its bound includes the result, ours does not."""
    best = search(queries, documents, k, excluded=excluded, memory=memory + 12 * k * len(queries))
    return best.rows.astype(np.int32), best.scores


def _search_cells(
    queries: Vectors,
    documents: Vectors,
    k: int,
    seed: int,
    excluded: Ragged | None,
    memory: int,
    recall_sample: int,
) -> Nearest:
    cells = min(len(documents), int(np.ceil(2 * np.sqrt(len(documents)))))
    clusters = spherical_kmeans(
        documents, cells, seed=seed, iterations=_CELL_ITERATIONS, sample=max(_CELL_SAMPLE * cells, 1 << 12)
    )
    random = generator(seed, "neighbours", "recall")
    picked = random.permutation(len(queries))[: 2 * recall_sample]
    tuning, held_out = np.sort(picked[:recall_sample]), np.sort(picked[recall_sample:])
    if len(held_out) < min(recall_sample, len(queries)):
        held_out = tuning
    top = min(k, RECALL_AT)
    truth = _exact(queries[tuning], documents, top, _taken(excluded, tuning), memory)[0]
    order = np.argsort(-(queries[tuning] @ clusters.centroids.T), axis=1, kind="stable").astype(np.int32)
    probes = _choose_probes(truth, clusters.labels, order)
    if probes > _MOST_OF_CELLS * cells:
        return Nearest(*_exact(queries, documents, k, excluded, memory), 1.0, 1.0, cells, cells)
    rows = np.empty((len(queries), k), dtype=np.int32)
    scores = np.empty((len(queries), k), dtype=np.float32)
    by_cell = np.argsort(clusters.labels, kind="stable")
    ends = np.cumsum(clusters.sizes)
    # Half of the memory is for what is found cell by cell, 8 bytes each, and its sorted copy.
    height = max(1, min(len(queries), memory // 2 // (16 * probes * k)))
    for start in range(0, len(queries), height):
        here = np.arange(start, min(start + height, len(queries)))
        found_rows = np.full((len(here), probes, k), -1, dtype=np.int32)
        found_scores = np.full((len(here), probes, k), -np.inf, dtype=np.float32)
        for cell, pairs in _groups(_nearest_cells(queries, here, clusters.centroids, probes).ravel()):
            members = by_cell[ends[cell] - clusters.sizes[cell] : ends[cell]]
            owner, place = np.divmod(pairs, probes)
            found_rows[owner, place], found_scores[owner, place] = _search(
                queries, here[owner], documents, members, k, excluded, memory // 2
            )
        rows[here], scores[here] = _best(found_rows.reshape(len(here), -1), found_scores.reshape(len(here), -1), k)
    truth = _exact(queries[held_out], documents, k, _taken(excluded, held_out), memory)[0]
    return Nearest(
        rows,
        scores,
        recall(rows[held_out, :top], truth[:, :top]),
        recall(rows[held_out], truth),
        cells,
        probes,
    )


def recall(found: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    """The share of the true rows (not counting -1) that were found, over all queries; 1 where there are none."""
    true = truth >= 0
    hits = sum(int(np.isin(t[t >= 0], f).sum()) for f, t in zip(found, truth, strict=True))
    return hits / int(true.sum()) if true.any() else 1.0


def _groups(labels: npt.NDArray[np.integer[Any]]) -> Iterator[tuple[int, Rows]]:
    """Each label that occurs with the rows that bear it, both in rising order."""
    order = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[order], return_index=True)
    for value, part in zip(values, np.split(order, starts[1:]), strict=True):
        yield int(value), part


def _nearest_cells(queries: Vectors, here: Rows, centroids: Vectors, probes: int) -> Rows:
    """The cells of the highest inner products with each of these queries, (len(here), probes)."""
    parts = [
        top_columns(queries[here[start : start + 4096]] @ centroids.T, probes)[0] for start in range(0, len(here), 4096)
    ]
    return np.concatenate(parts)


def _best(rows: Found, scores: Vectors, k: int) -> tuple[Found, Vectors]:
    """The best ``k`` of what was found in several cells; in the order of rows first, so that ties go to the lowest."""
    order = np.argsort(rows, axis=1, kind="stable")
    columns, values = top_columns(np.take_along_axis(scores, order, axis=1), k)
    return np.take_along_axis(np.take_along_axis(rows, order, axis=1), columns, axis=1), values


def _choose_probes(truth: Found, document_cells: Found, order: Found) -> int:
    """The fewest cells, nearest first, that hold the wanted share of the true neighbours of the sampled queries.

    ``order`` (queries, cells) are all cells in the order in which a query searches them.
    """
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(order.shape[1], dtype=np.int32)[None, :], axis=1)
    places = np.take_along_axis(place, document_cells[truth], axis=1)[truth >= 0]
    cells = int(order.shape[1])
    if not len(places):
        return min(_FEWEST_PROBES, cells)
    within = np.cumsum(np.bincount(places, minlength=cells)) / len(places)
    needed = int(np.searchsorted(within, min(WANTED_RECALL + _MARGIN, 1.0))) + 1
    return min(max(needed, _FEWEST_PROBES), cells)


def _search(
    queries: Vectors,
    here: Rows,
    documents: Vectors,
    candidates: Rows,
    k: int,
    excluded: Ragged | None,
    memory: int,
) -> tuple[Found, Vectors]:
    """The best ``k`` of the candidate documents (rising rows) for these queries, in blocks of both."""
    rows = np.full((len(here), k), -1, dtype=np.int32)
    scores = np.full((len(here), k), -np.inf, dtype=np.float32)
    width = max(memory // (8 * queries.shape[1]), 1)
    for first in range(0, len(candidates), width):
        block = candidates[first : first + width]
        # Whole tiles of the product: in a partial one equal documents can get scores that differ in the last bit.
        among = np.zeros((-(-len(block) // _TILE) * _TILE, documents.shape[1]), dtype=np.float32)
        among[: len(block)] = documents[block]
        # Scores, their partitioned copy and the mask are 9 bytes a pair; the rest is for what is found and the queries.
        height = max(1, min(len(here), 1024, max(memory - among.nbytes, 0) // 16 // len(block)))
        for start in range(0, len(here), height):
            part = slice(start, min(start + height, len(here)))
            products = (queries[here[part]] @ among.T)[:, : len(block)]
            if excluded is not None:
                hide(products, here[part], block, excluded)
            columns, values = top_columns(products, k)
            numbers = block[columns].astype(np.int32)
            if first:
                # Earlier blocks have lower rows: with them in front a stable sort keeps ties in order.
                values = np.concatenate([scores[part], values], axis=1)
                numbers = np.concatenate([rows[part], numbers], axis=1)
                best = np.argsort(-values, axis=1, kind="stable")[:, :k]
                values, numbers = np.take_along_axis(values, best, axis=1), np.take_along_axis(numbers, best, axis=1)
            rows[part, : values.shape[1]] = numbers
            scores[part, : values.shape[1]] = values
    rows[np.isneginf(scores)] = -1
    return rows, scores


def _taken(excluded: Ragged | None, chosen: Rows) -> Ragged | None:
    return None if excluded is None else excluded.take(chosen)


def hide(scores: Vectors, chosen: Rows, candidates: Rows, excluded: Ragged) -> None:
    """Put -inf where a chosen query (row) may not find a candidate (column; rising document rows), in place."""
    hidden = excluded.take(chosen)
    column = Index(candidates, rising=True).find(hidden.values)
    scores[hidden.owners()[column >= 0], column[column >= 0]] = -np.inf


def top_columns(scores: Vectors, k: int) -> tuple[Rows, Vectors]:
    """The ``k`` best columns of each row (all, where there are fewer) in falling order, equal ones by the lowest column."""
    height, width = scores.shape
    if width > k:
        least = np.partition(scores, width - k, axis=1)[:, width - k : width - k + 1]
        mask = scores >= least
        crowded = np.flatnonzero(np.count_nonzero(mask, axis=1) > k)
        for row in crowded:
            # More than k by ties with the last: the lowest columns of these stay.
            ties = np.flatnonzero(scores[row] == least[row])
            surplus = int(mask[row].sum()) - k
            mask[row, ties[len(ties) - surplus :]] = False
        # Flat, then taken apart: several times the speed of finding rows and columns.
        columns = (np.flatnonzero(mask) % width).reshape(height, k)
        scores = np.take_along_axis(scores, columns, axis=1)
    else:
        columns = np.broadcast_to(np.arange(width), (height, width))
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1), np.take_along_axis(scores, order, axis=1)
