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
    """That one of the components of these sizes is too large a part of all, in words; None where none is.

    Neither single units nor whole components can be resampled then: intervals of single units would cover far less often
    than they say.
    """
    counts = list(sizes)
    largest, total = max(counts, default=0), sum(counts)
    if largest <= max(2, LARGEST_COMPONENT * total):
        return None
    share = 100 * largest / total
    return f"{_ONE}{largest:,} of {total:,} ({share:.0f} %)"


def is_too_large(reason: str | None) -> bool:
    """Whether a reason for giving no interval is that of :func:`too_large`."""
    return reason is not None and reason.startswith(_ONE)


@dataclass(frozen=True)
class Interval:
    """An interval of a score or of a difference."""

    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """A scale for a score's errors: as it is, ``logit`` for one between 0 and 1, or Fisher's ``z`` for a correlation."""

    name: str = "linear"

    def to(self, score: Floats | float) -> Floats:
        """The score on this scale."""
        at = self._inside(score)
        if self.name == "logit":
            at = np.log(at / (1 - at))
        return np.arctanh(at) if self.name == "z" else at

    def back(self, value: Floats | float) -> Floats:
        """The score of a value on this scale."""
        at = np.asarray(value, dtype=np.float64)
        if self.name == "logit":
            return np.asarray(1 / (1 + np.exp(-np.clip(at, -700, 700))))
        return np.tanh(at) if self.name == "z" else at

    def slope(self, score: Floats | float) -> Floats:
        """How fast the value grows with the score."""
        at = self._inside(score)
        if self.name == "logit":
            return np.asarray(1 / (at * (1 - at)))
        return np.asarray(1 / (1 - at**2)) if self.name == "z" else np.ones_like(at)

    def _inside(self, score: Floats | float) -> Floats:
        at = np.asarray(score, dtype=np.float64)
        if self.name == "logit":
            return np.clip(at, 1e-12, 1 - 1e-12)
        return np.clip(at, -1 + 1e-12, 1 - 1e-12) if self.name == "z" else at


LINEAR, LOGIT, FISHER_Z = Scale(), Scale("logit"), Scale("z")


def t_interval(estimate: float, variance: float, freedom: float, level: float, scale: Scale = LINEAR) -> Interval:
    """Student's t interval on a scale. Where a share of none or all has no variance, Wilson's stands in."""
    from scipy import stats

    if variance <= 0 and scale == LOGIT:
        return score_interval(estimate, 0.0, freedom, level)
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * np.sqrt(variance) * scale.slope(estimate)
    low, high = scale.back(scale.to(estimate) - reach), scale.back(scale.to(estimate) + reach)
    return Interval(float(low), float(high))


def score_interval(mean: float, variance: float, freedom: float, level: float) -> Interval:
    """Wilson's interval of a mean of values between 0 and 1, with as many 0/1 units as would give its variance.

    It holds for means near 0 and 1, where the error is skewed and a variance from a few units is too small. Without
    any variance the units are ``freedom + 1`` of equal 0s or 1s.
    """
    from scipy import stats

    square = float(stats.t.ppf((1 + level) / 2, freedom)) ** 2
    spread = max(mean * (1 - mean), 0.0)
    units = spread / variance if variance > 0 and spread > 0 else freedom + 1
    centre = (mean + square / (2 * units)) / (1 + square / units)
    reach = np.sqrt(square * (spread / units + square / (4 * units**2))) / (1 + square / units)
    return Interval(max(float(centre - reach), 0.0), min(float(centre + reach), 1.0))


FEW_CONTRIBUTIONS = 20
"""Where fewer units than this decide the variance of a score, percentiles of resamples are too narrow."""


def contributions(influence: Floats, clusters: Ints) -> float:
    """How many clusters decide the variance of a score: ``(sum r^2)^2 / sum r^4`` of their residuals.

    It is the number of 1s among many 0s, and a third of all clusters for normal residuals.
    """
    squares = _cluster_residuals(influence, clusters) ** 2
    if squares.max(initial=0.0) <= 1e-20:
        return 0.0
    return float(squares.sum() ** 2 / (squares**2).sum())


def cluster_variance(influence: Floats, clusters: Ints) -> float:
    """The variance of a mean of units in independent clusters."""
    count = int(clusters.max()) + 1
    squares = float((_cluster_residuals(influence, clusters) ** 2).sum())
    return squares / len(influence) ** 2 * count / max(count - 1, 1)


def few_decide(influence: Floats, clusters: Ints) -> bool:
    """Whether so few clusters decide the variance of a score that percentiles of resamples are too narrow."""
    deciding = contributions(influence, clusters)
    return 0 < deciding < min(FEW_CONTRIBUTIONS, (int(clusters.max()) + 1) / 5)


def few_interval(
    estimate: float, influence: Floats, clusters: Ints, freedom: float, level: float, scale: Scale
) -> Interval:
    """The interval of a score whose variance few clusters decide: Wilson's between 0 and 1, else Student's t on a scale."""
    variance = cluster_variance(influence, clusters)
    if scale == LOGIT:
        return score_interval(estimate, variance, freedom, level)
    return t_interval(estimate, variance, freedom, level, scale)


def _cluster_residuals(influence: Floats, clusters: Ints) -> Floats:
    return np.asarray(np.bincount(clusters, weights=influence - influence.mean()), dtype=np.float64)


def kurtosis_freedom(influence: Floats, clusters: Ints) -> float:
    """Degrees of freedom of a variance to which few clusters contribute: ``2 n / (kurtosis - 1)``."""
    count = int(clusters.max()) + 1
    deciding = contributions(influence, clusters)
    if deciding <= 0:
        return max(count - 1.0, 1.0)
    return float(np.clip(2 * count / max(count / deciding - 1, 2.0), 3.0, max(count - 1, 3)))


_FEWEST_FREEDOM = 8.0


def cluster_freedom(influence: Floats, clusters: Ints) -> float:
    """Degrees of freedom of the variance of a mean over clusters: their number less one where they are of one size.

    Of unequal clusters the large ones decide, the more so the more alike the units of a cluster are (Satterthwaite).
    The formula overdoes it where a handful decides: at least 8 degrees (if there are so many clusters) are counted.
    """
    sizes = np.bincount(clusters).astype(np.float64)
    count, units = len(sizes), len(clusters)
    if sizes.min() == sizes.max() or influence.ndim != 1:
        return float(count - 1)
    total = float(((influence - influence.mean()) ** 2).sum())
    if total <= 0:
        return float(count - 1)
    pairs = float((sizes**2).sum()) - units
    between = float((_cluster_residuals(influence, clusters) ** 2).sum()) - total
    alike = float(np.clip(between / pairs * (units - 1) / total + 1 / units, 0.0, 1.0))
    parts = sizes * (1 + (sizes - 1) * alike)
    return float(max(parts.sum() ** 2 / (parts**2).sum() - 1, min(_FEWEST_FREEDOM, count - 1)))


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


def flip_ps(sums: Floats, permutations: int, rng: np.random.Generator) -> Floats:
    """Two-sided p of flipped signs for each column of summed differences ``[clusters, comparisons]``."""
    observed = np.abs(sums.sum(axis=0))
    reached = observed - 1e-12 * np.maximum(1.0, np.abs(sums).sum(axis=0))
    moving = sums[(sums != 0).any(axis=1)]
    if moving.size == 0:
        return np.ones(sums.shape[1])
    extreme = np.zeros(sums.shape[1], dtype=np.int64)
    for rows in chunks(permutations, len(moving)):
        signs = rng.integers(2, size=(rows, len(moving)), dtype=np.int8).astype(np.float64) * 2 - 1
        extreme += (np.abs(signs @ moving) >= reached).sum(axis=0)
    return np.asarray((extreme + 1) / (permutations + 1), dtype=np.float64)


def sign_flip_ps(differences: Floats, clusters: Ints, permutations: int, rng: np.random.Generator) -> Floats:
    """Two-sided p of a paired sign-flip test of each column of ``differences [units, comparisons]``; ``[comparisons]``.

    The signs of whole clusters are flipped; all comparisons share each flip. ``p = (b + 1) / (m + 1)`` with ``b`` of
    ``m`` random flips at least as far from zero as the data (Phipson & Smyth, 2010), so it is never zero and the test
    is valid at any ``m``. Where few or skewed differences decide, it is at least :func:`studentised_p`.
    """
    count = int(clusters.max()) + 1
    sums = np.zeros((count, differences.shape[1]))
    np.add.at(sums, clusters, differences)
    p = flip_ps(sums, permutations, rng)
    sizes = np.bincount(clusters, minlength=count).astype(np.float64)
    for column in np.flatnonzero(_skewed(sums, sizes)):
        p[column] = max(p[column], studentised_p(sums[:, column], sizes, permutations, rng))
    return p


_SKEWED = 0.2
"""Skewness over the root of the number of clusters from which signs are no longer exchangeable enough."""
_UNLIKE = 1.5
"""The ratio of the mean gain to the mean loss, or the other way round, from which they differ in size."""


def _skewed(sums: Floats, sizes: Floats) -> NDArray[np.bool_]:
    """Whether sums of differences ``[clusters, comparisons]`` are so skewed and few that sign flips are too bold.

    Gains and losses must also differ in size: wins and losses of one size are exchangeable however many there are of each.
    """
    residuals = sums - sizes[:, None] * (sums.sum(axis=0) / sizes.sum())
    spread = np.maximum((residuals**2).mean(axis=0) ** 1.5, 1e-300)
    skewed = np.abs((residuals**3).mean(axis=0)) / spread > _SKEWED * np.sqrt(len(sizes))
    sides = [(np.maximum(side, 0).sum(axis=0), (side > 0).sum(axis=0)) for side in (sums, -sums)]
    (gain, won), (loss, lost) = sides
    unlike = np.maximum(gain * lost, loss * won) > _UNLIKE * np.minimum(gain * lost, loss * won)
    return np.asarray(skewed & unlike & (won > 0) & (lost > 0))


def studentised_p(sums: Floats, sizes: Floats, samples: int, rng: np.random.Generator) -> float:
    """Two-sided p of a mean of zero by the studentised bootstrap of whole clusters, ``sums`` and ``sizes [clusters]``.

    It holds for skewed differences, where equal means are not exchangeable scores: a 0/1 score against a steady one.
    """
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    centred = sums - mean * sizes

    def statistic(total: Floats, square: Floats, crossed: Floats, size: Floats, sizes_squared: Floats) -> Floats:
        found = total / size
        variance = np.maximum(square - 2 * found * crossed + found**2 * sizes_squared, 0.0) / size**2
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(found) / np.sqrt(variance)
        return np.asarray(np.where(variance > 1e-24, ratio, np.where(np.abs(found) > 1e-12, np.inf, 0.0)))

    error = float(np.sqrt((centred**2).sum())) / float(sizes.sum())
    if error <= 1e-15:
        return 1.0 if abs(mean) <= 1e-15 else 1 / (samples + 1)
    moments = np.stack([centred, centred**2, centred * sizes, sizes, sizes**2], axis=1)
    extreme = 0
    for rows in chunks(samples, count):
        drawn = statistic(*(resample_counts(rng, rows, count) @ moments).T)
        extreme += int((drawn >= abs(mean) / error - 1e-12).sum())
    return (extreme + 1) / (samples + 1)


def plus_minus_interval(differences: Floats, clusters: Ints, level: float) -> Interval:
    """Student's t interval of a mean of few differences that are not zero, with one more won and one more lost.

    As Agresti & Min (2005) have it for pairs of 0s and 1s; the two added units are as large as the largest difference.
    """
    from scipy import stats

    n, count = len(differences), int(clusters.max()) + 1
    largest = float(np.abs(differences).max())
    variance = (n**2 * cluster_variance(differences, clusters) + 2 * largest**2) / (n + 2) ** 2
    mean = float(differences.sum()) / (n + 2)
    reach = float(stats.t.ppf((1 + level) / 2, max(count - 1, 1))) * np.sqrt(variance)
    return Interval(mean - reach, mean + reach)


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
