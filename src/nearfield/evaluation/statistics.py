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
    """p of two one-sided tests that a difference lies within ``margin``, from its replicates ``[samples]``.

    The larger of the two add-one shares of replicates beyond either margin (Schuirmann, 1987); at most 0.05 exactly where
    the 90 % percentile interval lies inside the margins.
    """
    drawn = differences[np.isfinite(differences)]
    beyond = max(int((drawn >= margin).sum()), int((drawn <= -margin).sum()))
    return (beyond + 1) / (len(drawn) + 1)


def paired_interval(differences: Sequence[float], level: float) -> tuple[float, float, float]:
    """Student's t interval of the mean of paired differences and the two-sided p of zero: ``(low, high, p)``."""
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    if error <= 1e-15:
        return mean, mean, 1.0 if abs(mean) <= 1e-15 else 0.0
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))


def detectable(differences: Sequence[float], level: float = 0.95, power: float = 0.8) -> float:
    """The true mean difference that a paired t-test of so many pairs finds with ``power``, by the spread of these."""
    from scipy import optimize, stats

    count = len(differences)
    bar = float(stats.t.ppf((1 + level) / 2, count - 1))

    def missing(shift: float) -> float:
        # That it is found with the wrong sign is as good as impossible at any power worth asking for.
        return float(stats.nct.sf(bar, count - 1, shift)) - power

    enough = 1.0
    while missing(enough) < 0:
        enough *= 2
    error = float(np.std(differences, ddof=1) / np.sqrt(count))
    return float(optimize.brentq(missing, 0.0, enough)) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the family-wise error stays below alpha where adjusted p <= alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


_ROUND = 1e-12


def task_ranks(scores: Floats) -> Floats:
    """Ranks from 1 (best) within each task, ties sharing their mean rank: ``[..., models, tasks]``; NaN stays NaN."""
    greater = scores[..., None, :, :] > scores[..., :, None, :] + _ROUND
    equal = np.abs(scores[..., None, :, :] - scores[..., :, None, :]) <= _ROUND
    ranks = greater.sum(axis=-2) + (equal.sum(axis=-2) + 1) / 2
    return np.asarray(np.where(np.isnan(scores), np.nan, ranks), dtype=np.float64)


def borda(scores: Floats) -> Floats:
    """Borda points ``[..., models]`` of ``scores [..., models, tasks]``: models minus rank, summed over tasks.

    It is how mteb ranks a leaderboard; a missing score (NaN) earns nothing. The points depend on which models are in
    the table.
    """
    points = scores.shape[-2] - task_ranks(scores)
    return np.asarray(np.nansum(points, axis=-1), dtype=np.float64)


def places(points: Floats) -> NDArray[np.int64]:
    """Places from 1 by points ``[models]``, most points first; ties share the smallest place."""
    better = (points[None, :] > points[:, None] + _ROUND).sum(axis=1)
    return np.asarray(better + 1, dtype=np.int64)


@dataclass(frozen=True)
class RankSets:
    """Ranks that are compatible with the data, ``low`` to ``high`` for each model, for all models at once.

    ``above[i, j]`` says that model i is above model j beyond doubt. That two models cannot be told apart is not
    transitive: A may not be separable from B, nor B from C, while A is above C. So there are no groups of equals.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    above: NDArray[np.bool_]


def rank_sets(estimates: Floats, replicates: Floats, level: float = 0.95) -> RankSets:
    """Simultaneous confidence sets of ranks from ``estimates [models]`` and joint replicates around them ``[samples, models]``.

    All pairwise differences are tested at once by the largest standardised deviation of the replicates, step by step (Romano
    & Wolf, 2005); a model's rank lies between one plus the models above it and the number of those not below it
    (Mogstad, Romano, Shaikh & Wilhelm, 2024). All true ranks are in their sets with probability ``level``.
    """
    models = len(estimates)
    above = np.zeros((models, models), dtype=bool)
    first, second = np.triu_indices(models, 1)
    if len(first):
        centred = replicates - replicates.mean(axis=0)
        spread = np.empty(len(first))
        standard = np.empty((len(replicates), len(first)), dtype=np.float32)
        for pair, (i, j) in enumerate(zip(first, second, strict=True)):
            deviation = centred[:, i] - centred[:, j]
            spread[pair] = deviation.std()
            standard[:, pair] = np.abs(deviation) / spread[pair] if spread[pair] > _ROUND else 0.0
        difference = estimates[first] - estimates[second]
        # Without spread nothing is known of the error: such a pair is never separated.
        distance = np.where(spread > _ROUND, np.abs(difference) / np.maximum(spread, _ROUND), 0.0)
        apart = np.zeros(len(first), dtype=bool)
        while not apart.all():
            largest = standard[:, ~apart].max(axis=1)
            separated = ~apart & (distance > np.quantile(largest, level)) & (distance > 0)
            if not separated.any():
                break
            apart |= separated
        above[first, second] = apart & (difference > 0)
        above[second, first] = apart & (difference < 0)
    low = 1 + above.sum(axis=0)
    high = models - above.sum(axis=1)
    return RankSets(np.asarray(low, dtype=np.int64), np.asarray(high, dtype=np.int64), above)
