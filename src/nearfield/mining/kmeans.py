"""Spherical k-means in blocks: the strata of cluster-stratified batches (arXiv 2407.18887) and the cells of a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.errors import BadInputError
from nearfield.randomness import generator

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Similarities = npt.NDArray[np.float64]

_BLOCK_BYTES = 64 << 20
_TIE = 1e-6
"""Similarities in float32 that lie closer than this are compared again in float64: GEMMs round by thread count."""
_PAIRS = 1 << 16


@dataclass(frozen=True)
class KMeans:
    """Clusters of unit vectors."""

    labels: Labels
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
    before: Labels | None = None
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


def assign(vectors: Vectors, centroids: Vectors) -> tuple[Labels, Similarities]:
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


def _settle_ties(rows: Similarities, close: npt.NDArray[np.bool_], centroids: Similarities) -> npt.NDArray[np.int64]:
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


def _fill_empty(labels: Labels, similarities: Similarities, clusters: int) -> None:
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


def _means(points: Vectors, labels: Labels, centroids: Vectors) -> Vectors:
    """The normalised mean of each cluster; a cluster whose members cancel out keeps its centroid."""
    sums = cluster_sums(points, labels, len(centroids))
    lengths = np.linalg.norm(sums, axis=1)
    cancelled = lengths < 1e-9
    means: Vectors = (sums / np.where(cancelled, 1, lengths)[:, None]).astype(np.float32)
    means[cancelled] = centroids[cancelled]
    return means


def cluster_sums(points: Vectors, labels: Labels, clusters: int) -> Similarities:
    """The sum of each cluster's vectors, (clusters, d), in float64 and always in the order of rows."""
    from scipy.sparse import csr_array

    sums = np.zeros((clusters, points.shape[1]))
    for start, stop in _blocks(len(points), points.shape[1]):
        columns = np.arange(stop - start)
        members = csr_array((np.ones(stop - start), (labels[start:stop], columns)), shape=(clusters, stop - start))
        sums += members @ points[start:stop].astype(np.float64)
    return sums
