"""Intervals and paired tests over queries, pairs and items; whole clusters are resampled where there are clusters.

Everything is vectorised over resamples and draws from a generator that the caller hands in. Point estimates are never
taken from resamples: they are computed on the data as it is. The methods and their limits are told in
``docs/statistics.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK_CELLS = 4_000_000


LARGEST_COMPONENT = 0.1
"""The largest share of all units that one component of units, which are not independent of each other, may hold."""
_ONE = "one component of units that are not independent holds "


def too_large(sizes: Iterable[int]) -> str | None:
    """Why units in components of these sizes give no interval and no test, or None where they do.

    Neither single units nor whole components can be resampled where one component is a large part of all: intervals of
    single units then cover far less often than they say.
    """
    counts = list(sizes)
    largest, total = max(counts, default=0), sum(counts)
    if largest <= max(2, LARGEST_COMPONENT * total):
        return None
    share = 100 * largest / total
    return f"{_ONE}{largest:,} of {total:,} ({share:.0f} %), and above {100 * LARGEST_COMPONENT:g} % no interval and no test hold"


def is_too_large(reason: str | None) -> bool:
    """Whether a reason for giving no interval is that of :func:`too_large`."""
    return reason is not None and reason.startswith(_ONE)


@dataclass(frozen=True)
class Interval:
    """A percentile interval of a resampled statistic."""

    low: float
    high: float


def cluster_numbers(clusters: Sequence[str | None], ids: Sequence[str]) -> Ints:
    """Number the clusters 0..C-1 in order of first appearance; a unit without a cluster is one of its own.

    ``clusters`` and ``ids`` have one entry a unit; the result has shape ``[units]``.
    """
    numbers: dict[tuple[bool, str], int] = {}
    keys = [(True, c) if c is not None else (False, i) for c, i in zip(clusters, ids, strict=True)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def chunks(total: int, width: int) -> Iterator[int]:
    """Sizes of the parts that ``total`` rows of ``width`` cells are worked on in, to bound the memory."""
    size = max(1, min(total, _CHUNK_CELLS // max(width, 1)))
    for start in range(0, total, size):
        yield min(size, total - start)


def resample_counts(rng: np.random.Generator, rows: int, clusters: int) -> Floats:
    """How often each of ``clusters`` is drawn in each of ``rows`` resamples with replacement; ``[rows, clusters]``."""
    drawn = rng.integers(clusters, size=(rows, clusters))
    drawn += np.arange(rows, dtype=np.int64)[:, None] * clusters
    return np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)


def bootstrap_means(values: Floats, clusters: Ints, samples: int, rng: np.random.Generator) -> Floats:
    """Means of resampled units: ``values [units, models]`` -> ``[samples, models]``.

    Whole clusters are drawn with replacement; a resample's mean is over the units that were drawn, so it is a ratio of
    two sums where clusters differ in size. All models share each resample, which is what makes differences paired.
    """
    count = int(clusters.max()) + 1
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, clusters, values)
    sizes = np.bincount(clusters, minlength=count).astype(np.float64)
    parts = []
    for rows in chunks(samples, count):
        counts = resample_counts(rng, rows, count)
        parts.append((counts @ sums) / (counts @ sizes)[:, None])
    return np.concatenate(parts)


def sign_flip_ps(differences: Floats, clusters: Ints, permutations: int, rng: np.random.Generator) -> Floats:
    """Two-sided p of a paired sign-flip test of each column of ``differences [units, comparisons]``; ``[comparisons]``.

    The signs of whole clusters are flipped; all comparisons share each flip. ``p = (b + 1) / (m + 1)`` with ``b`` of
    ``m`` random flips at least as far from zero as the data (Phipson & Smyth, 2010), so it is never zero and the test
    is valid at any ``m``.
    """
    count = int(clusters.max()) + 1
    sums = np.zeros((count, differences.shape[1]))
    np.add.at(sums, clusters, differences)
    observed = np.abs(sums.sum(axis=0))
    reached = observed - 1e-12 * np.maximum(1.0, np.abs(sums).sum(axis=0))
    moving = sums[(sums != 0).any(axis=1)]
    if moving.size == 0:
        return np.ones(differences.shape[1])
    extreme = np.zeros(differences.shape[1], dtype=np.int64)
    for rows in chunks(permutations, len(moving)):
        signs = rng.integers(2, size=(rows, len(moving)), dtype=np.int8).astype(np.float64) * 2 - 1
        extreme += (np.abs(signs @ moving) >= reached).sum(axis=0)
    return np.asarray((extreme + 1) / (permutations + 1), dtype=np.float64)


def sign_flip_p(differences: Floats, clusters: Ints, permutations: int, rng: np.random.Generator) -> float:
    """:func:`sign_flip_ps` of one comparison, ``differences [units]``."""
    return float(sign_flip_ps(differences[:, None], clusters, permutations, rng)[0])


def midranks(values: Floats) -> Floats:
    """Ranks from 1, ties sharing their mean rank (as in Spearman's correlation); ``[units]``."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return np.asarray((ends - (sizes - 1) / 2)[group], dtype=np.float64)


class _TieGroups:
    """Sorted order of a column and its groups of ties, to rank resamples of it without sorting again."""

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        self.starts = np.flatnonzero(new)
        self.group = np.empty(len(values), dtype=np.int64)
        self.group[self.order] = np.cumsum(new) - 1

    def ranks(self, counts: Floats) -> Floats:
        """Midranks of the units in resamples that hold unit i ``counts[:, i]`` times; ``[rows, units]``."""
        sizes = np.add.reduceat(counts[:, self.order], self.starts, axis=1)
        ends = np.cumsum(sizes, axis=1)
        means = ends - (sizes - 1) / 2
        return np.asarray(means[:, self.group], dtype=np.float64)


def spearman(gold: Floats, predictions: Floats) -> float:
    """Spearman's correlation of two columns ``[units]``; NaN where one is constant."""
    return float(_correlation(midranks(gold)[None], midranks(predictions)[None], np.ones((1, len(gold))))[0])


def _correlation(x: Floats, y: Floats, counts: Floats) -> Floats:
    total = counts.sum(axis=1, keepdims=True)
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    covariance = (counts * x * y).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = covariance / np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    return np.asarray(result, dtype=np.float64)


def bootstrap_spearman(
    gold: Floats, predictions: Floats, clusters: Ints, samples: int, rng: np.random.Generator
) -> Floats:
    """Spearman's correlation of resampled pairs: ``gold [units]``, ``predictions [units, models]`` -> ``[samples, models]``.

    The pairs of a resample are ranked anew. All models share each resample.
    """
    count = int(clusters.max()) + 1
    gold_ties = _TieGroups(gold)
    model_ties = [_TieGroups(predictions[:, i]) for i in range(predictions.shape[1])]
    parts = []
    for rows in chunks(samples, 4 * len(gold)):
        counts = resample_counts(rng, rows, count)[:, clusters]
        ranked_gold = gold_ties.ranks(counts)
        parts.append(np.stack([_correlation(ranked_gold, ties.ranks(counts), counts) for ties in model_ties], axis=1))
    return np.concatenate(parts)


def swap_p(
    gold: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: np.random.Generator
) -> float:
    """Two-sided p of a paired permutation test of two Spearman correlations with the same gold scores.

    The models' ranks (which are comparable, as their raw scores need not be) are swapped for a random half of the
    clusters; the statistic is the difference of the two correlations. All arguments are ``[units]``.
    """
    g = midranks(gold)
    a, b = midranks(first), midranks(second)
    g, a, b = (x - x.mean() for x in (g, a, b))
    if not (g @ g > 0 and a @ a > 0 and b @ b > 0):
        return 1.0
    count = int(clusters.max()) + 1
    total, total_square = float((a + b).sum()), float((a * a + b * b).sum())
    total_product, n = float(g @ (a + b)), len(g)

    def by_cluster(x: Floats) -> Floats:
        return np.asarray(np.bincount(clusters, weights=x, minlength=count), dtype=np.float64)

    moved = np.stack([by_cluster(a - b), by_cluster(a * a - b * b), by_cluster(g * (a - b))], axis=1)
    base = np.array([b.sum(), b @ b, g @ b])
    scale = float(np.sqrt(g @ g))

    def statistic(sums: Floats) -> Floats:
        other = np.array([total, total_square, total_product]) - sums
        kept = sums[:, 2] / (scale * np.sqrt(sums[:, 1] - sums[:, 0] ** 2 / n))
        lost = other[:, 2] / (scale * np.sqrt(other[:, 1] - other[:, 0] ** 2 / n))
        return np.abs(kept - lost)

    observed = float(statistic((base + moved.sum(axis=0))[None])[0])
    extreme = 0
    for rows in chunks(permutations, count):
        chosen = rng.integers(2, size=(rows, count), dtype=np.int8).astype(np.float64)
        extreme += int(np.count_nonzero(statistic(base + chosen @ moved) >= observed - 1e-12))
    return (extreme + 1) / (permutations + 1)


def percentile_interval(resamples: Floats, level: float, freedom: float | None = None) -> Interval:
    """The central ``level`` of resampled statistics ``[samples]``; undefined resamples (NaN) are left out.

    ``freedom``, the number of drawn clusters less one, widens the tails as Student's t and the factor
    ``sqrt(n / (n - 1))`` would widen a normal interval (the expanded percentile interval of Hesterberg, 2015): plain
    percentiles are too narrow for few clusters. Without it, or with many clusters, the plain percentiles are given.
    """
    tail = (1 - level) / 2
    if freedom is not None:
        from scipy import stats

        freedom = max(freedom, 1.0)
        tail = float(stats.norm.cdf(stats.t.ppf(tail, freedom) * np.sqrt((freedom + 1) / freedom)))
    low, high = np.nanquantile(resamples, [tail, 1 - tail])
    return Interval(float(low), float(high))


def equivalence_p(differences: Floats, margin: float) -> float:
    """p of two one-sided tests that a difference lies within ``margin``, from its draws ``[samples]``.

    The larger of the two add-one shares of draws beyond either margin (Schuirmann, 1987); at most 0.05 exactly where
    the 90 % percentile interval lies inside the margins.
    """
    drawn = differences[np.isfinite(differences)]
    beyond = max(int((drawn >= margin).sum()), int((drawn <= -margin).sum()))
    return (beyond + 1) / (len(drawn) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the family-wise error stays below alpha where adjusted p <= alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


class DisjointSets:
    """Connected components by union-find over nodes 0..n-1."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, node: int) -> int:
        """The representative of a node's component."""
        root = node
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[node] != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def join(self, first: int, second: int) -> None:
        """Merge two components; the smaller representative stays, so the result does not depend on the order."""
        a, b = self.find(first), self.find(second)
        if a != b:
            self._parent[max(a, b)] = min(a, b)
