"""How a score is made of its units: means, rank correlations, average precision, F1 of matches, means over classifiers.

Each class computes its score from units, replicates of it, and a paired test of two models. ``values`` are ``[units]``
(``[runs, units]`` for :class:`CrossedMean`), those of several models have a last axis more; ``truth [units]`` is what
predictions are held against. Whole clusters are resampled, models share each resample, and point estimates are never
taken from resamples. The methods and their limits are told in ``docs/statistics.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nearfield.evaluation.statistics import (
    Floats,
    Ints,
    bootstrap_means,
    chunks,
    midranks,
    resample_counts,
    sign_flip_p,
)

Rng = np.random.Generator
_SORTED_CELLS = 200_000_000


@dataclass(frozen=True)
class Estimator:
    """The mean of independent units, and the base of all other scores."""

    scope: str = "other units of the same kind"
    """The quantity that an interval is about."""
    is_mean: bool = True
    """Whether the score is a mean over units, so that one unit has a difference of its own."""

    def value(self, truth: Floats, values: Floats) -> float:
        """The score."""
        return float(values.mean())

    def replicates(self, truth: Floats, values: Floats, clusters: Ints, samples: int, rng: Rng) -> Floats:
        """Replicates of the scores of several models: ``[samples, models]``."""
        return bootstrap_means(values, clusters, samples, rng)

    def p(self, truth: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: Rng) -> float:
        """Two-sided p of a paired test of two models on the same units."""
        return sign_flip_p(second - first, clusters, permutations, rng)

    def freedom(self, values: Floats, clusters: Ints) -> float:
        """Degrees of freedom of the score's interval."""
        return float(clusters.max())

    def rescaled(self, replicates: Floats, centre: float, values: Floats, clusters: Ints) -> Floats:
        """Replicates ``[samples]`` around ``centre``, a score or a difference, with the spread that its ``values`` have."""
        return replicates


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


def _correlation(x: Floats, y: Floats, counts: Floats) -> Floats:
    total = counts.sum(axis=1, keepdims=True)
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    covariance = (counts * x * y).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = covariance / np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    return np.asarray(result, dtype=np.float64)


@dataclass(frozen=True)
class Spearman(Estimator):
    """Spearman's correlation of predictions with gold scores."""

    scope: str = "other pairs of the same kind"
    is_mean: bool = False

    def value(self, truth: Floats, values: Floats) -> float:
        """The correlation; NaN where one side is constant."""
        return float(_correlation(midranks(truth)[None], midranks(values)[None], np.ones((1, len(truth))))[0])

    def replicates(self, truth: Floats, values: Floats, clusters: Ints, samples: int, rng: Rng) -> Floats:
        """Correlations of resampled pairs, which are ranked anew."""
        count = int(clusters.max()) + 1
        gold_ties = _TieGroups(truth)
        model_ties = [_TieGroups(values[:, i]) for i in range(values.shape[1])]
        parts = []
        for rows in chunks(samples, 4 * len(truth)):
            counts = resample_counts(rng, rows, count)[:, clusters]
            ranked = gold_ties.ranks(counts)
            parts.append(np.stack([_correlation(ranked, ties.ranks(counts), counts) for ties in model_ties], axis=1))
        return np.concatenate(parts)

    def p(self, truth: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: Rng) -> float:
        """A permutation test: the models' ranks are swapped for a random half of the clusters.

        Ranks are comparable, as raw scores need not be; the statistic is the difference of the two correlations.
        """
        g = midranks(truth)
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
            correlation = sums[:, 2] / (scale * np.sqrt(sums[:, 1] - sums[:, 0] ** 2 / n))
            lost = other[:, 2] / (scale * np.sqrt(other[:, 1] - other[:, 0] ** 2 / n))
            return np.abs(correlation - lost)

        observed = float(statistic((base + moved.sum(axis=0))[None])[0])
        extreme = 0
        for rows in chunks(permutations, count):
            chosen = rng.integers(2, size=(rows, count), dtype=np.int8).astype(np.float64)
            extreme += int(np.count_nonzero(statistic(base + chosen @ moved) >= observed - 1e-12))
        return (extreme + 1) / (permutations + 1)


def _swap_p(
    score: Callable[[Floats], Floats],
    first: Floats,
    second: Floats,
    clusters: Ints,
    permutations: int,
    rng: Rng,
) -> float:
    """Two-sided p of a permutation test: the models' values are swapped for a random half of the clusters.

    ``score`` turns ``[rows, units]`` into ``[rows]``; the statistic is the difference of the two scores. On many units
    fewer permutations are made (at least 999).
    """
    permutations = min(permutations, max(999, _SORTED_CELLS // (2 * len(first))))
    count = int(clusters.max()) + 1
    observed = abs(float((score(first[None]) - score(second[None]))[0]))
    extreme = 0
    for rows in chunks(permutations, 8 * len(first)):
        swapped = rng.integers(2, size=(rows, count), dtype=np.int8).astype(bool)[:, clusters]
        distance = np.abs(score(np.where(swapped, second, first)) - score(np.where(swapped, first, second)))
        extreme += int(np.count_nonzero(distance >= observed - 1e-12))
    return (extreme + 1) / (permutations + 1)


def _average_precisions(scores: Floats, labels: Floats) -> Floats:
    """Average precision of each row of ``scores [rows, units]``."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=1)
    positive = labels[order]
    size = scores.shape[1]
    last = np.concatenate([ordered[:, 1:] != ordered[:, :-1], np.ones((len(scores), 1), dtype=bool)], axis=1)
    # Each unit's precision is that at the end of its group of ties.
    ends = np.minimum.accumulate(np.where(last, np.arange(size), size)[:, ::-1], axis=1)[:, ::-1]
    precision = np.cumsum(positive, axis=1) / np.arange(1, size + 1)
    return np.asarray((positive * np.take_along_axis(precision, ends, axis=1)).sum(axis=1) / labels.sum())


@dataclass(frozen=True)
class AveragePrecision(Estimator):
    """Average precision of scores for 0/1 labels, ties taken together, as scikit-learn computes it."""

    scope: str = "other pairs of the same kind"
    is_mean: bool = False

    def value(self, truth: Floats, values: Floats) -> float:
        """The average precision."""
        return float(_average_precisions(values[None], truth)[0])

    def pseudo_values(self, labels: Floats, scores: Floats) -> Floats:
        """Jackknife pseudo-values ``[units]``: ``n AP - (n - 1) AP(without the unit)``.

        A pair counts with its own precision and with what it does to that of the positives below it (Efron & Stein, 1981).
        """
        order = np.argsort(-scores, kind="stable")
        ordered, positive = scores[order], labels[order]
        last = np.concatenate([ordered[1:] != ordered[:-1], [True]])
        group = np.cumsum(np.concatenate([[False], last[:-1]]))
        right, seen = np.cumsum(positive)[last], np.flatnonzero(last) + 1.0
        positives = np.diff(right, prepend=0.0)
        fewer = np.maximum(seen - 1, 1)
        at_negative = positives * (right / fewer - right / seen)
        less = np.where(seen > 1, (right - 1) / fewer, 0.0)
        at_positive = positives * (less - right / seen)

        def below(terms: Floats) -> Floats:
            return np.asarray(np.cumsum(terms[::-1])[::-1][group], dtype=np.float64)

        total, size, relevant = float((positives * right / seen).sum()), len(labels), float(labels.sum())
        without = np.where(
            positive > 0,
            (total + below(at_positive) - less[group]) / max(relevant - 1, 1),
            (total + below(at_negative)) / relevant,
        )
        values = np.empty(size)
        values[order] = size * total / relevant - (size - 1) * without
        return values

    def replicates(self, truth: Floats, values: Floats, clusters: Ints, samples: int, rng: Rng) -> Floats:
        """Resampled clusters of pseudo-values, whose deviations are added on the logit scale.

        There an average precision near its ends is less skewed (Boyd, Eng & Page, 2013). Pairs are not resampled
        themselves: twice the same pair in a ranking raises the score and narrows its interval.
        """
        models = range(values.shape[1])
        pseudo = np.stack([self.pseudo_values(truth, values[:, i]) for i in models], axis=1)
        whole = np.array([self.value(truth, values[:, i]) for i in models])
        deviations = bootstrap_means(pseudo, clusters, samples, rng) - pseudo.mean(axis=0)
        inner = np.clip(whole, 1e-12, 1 - 1e-12)
        logits = np.log(inner / (1 - inner)) + deviations / (inner * (1 - inner))
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))), dtype=np.float64)

    def p(self, truth: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: Rng) -> float:
        """A permutation test that swaps the models' ranks."""
        ranks = (midranks(first), midranks(second))
        return _swap_p(lambda rows: _average_precisions(rows, truth), *ranks, clusters, permutations, rng)


@dataclass(frozen=True)
class MatchF1(Estimator):
    """F1 of each sentence's match, averaged with the right sentences' support: mteb's score of bitext mining.

    It is scikit-learn's ``f1_score(average="weighted")``; truth and values are numbers of sentences.
    """

    scope: str = "other sentences among as many"
    is_mean: bool = False

    def value(self, truth: Floats, values: Floats) -> float:
        """The F1."""
        return float(self.of_rows(truth, values[None])[0])

    def of_rows(self, truth: Floats, matches: Floats) -> Floats:
        """The F1 of each row of ``matches [rows, units]``."""
        gold, predicted = _whole(truth), _whole(matches)
        width = int(max(gold.max(), predicted.max())) + 1
        rows = np.arange(len(predicted))[:, None] * width

        def by_label(labels: Ints, weights: Floats) -> Floats:
            cells = (rows + labels).ravel()
            sums = np.bincount(cells, weights=weights.ravel(), minlength=len(predicted) * width)
            return np.asarray(sums.reshape(len(predicted), width), dtype=np.float64)

        once = np.ones(predicted.shape)
        golds = np.broadcast_to(gold, predicted.shape)
        support, right = by_label(golds, once), by_label(golds, (predicted == gold).astype(np.float64))
        f1 = 2 * right / np.maximum(support + by_label(predicted, once), 1e-300)
        return np.asarray((support * f1).sum(axis=1) / support.sum(axis=1), dtype=np.float64)

    def pseudo_values(self, truth: Floats, values: Floats) -> Floats:
        """Jackknife pseudo-values ``[units]``: ``n F1 - (n - 1) F1(without the sentence)`` (Efron & Stein, 1981).

        A sentence counts with its own match and with the wrong matches that others make to it.
        """
        gold, predicted = _whole(truth), _whole(values)
        size, width = len(gold), int(max(gold.max(), predicted.max())) + 1
        support = np.bincount(gold, minlength=width).astype(np.float64)
        right = np.bincount(gold[predicted == gold], minlength=width).astype(np.float64)
        matched = np.bincount(predicted, minlength=width).astype(np.float64)

        def part(support: Floats, right: Floats, matched: Floats) -> Floats:
            return np.asarray(support * 2 * right / np.maximum(support + matched, 1e-300))

        total = part(support, right, matched)
        hit = (predicted == gold).astype(np.float64)
        at_gold = part(support[gold] - 1, right[gold] - hit, matched[gold] - hit) - total[gold]
        at_match = part(support[predicted], right[predicted], matched[predicted] - 1) - total[predicted]
        without = (total.sum() + at_gold + np.where(predicted != gold, at_match, 0.0)) / max(size - 1, 1)
        return np.asarray(size * (total.sum() / size) - (size - 1) * without, dtype=np.float64)

    def replicates(self, truth: Floats, values: Floats, clusters: Ints, samples: int, rng: Rng) -> Floats:
        """Resampled clusters of pseudo-values: a sentence that is there twice would be matched with its own copy."""
        pseudo = np.stack([self.pseudo_values(truth, values[:, i]) for i in range(values.shape[1])], axis=1)
        whole = np.concatenate([self.of_rows(truth, match[None]) for match in values.T])
        return np.asarray(whole + bootstrap_means(pseudo, clusters, samples, rng) - pseudo.mean(axis=0))

    def p(self, truth: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: Rng) -> float:
        """A permutation test that swaps the models' matches."""
        return _swap_p(lambda rows: self.of_rows(truth, rows), first, second, clusters, permutations, rng)


def _whole(values: Floats) -> Ints:
    return values.astype(np.int64)


@dataclass(frozen=True)
class CrossedError:
    """The error of a mean over runs and units: its variance, degrees of freedom, and the share of the plain replicates."""

    variance: float
    freedom: float
    scale: float

    @classmethod
    def of(cls, runs: Floats, clusters: Ints) -> CrossedError:
        """The error of the mean of ``runs [runs, units]`` where both the runs and the units are samples.

        Two-way analysis of variance with random effects gives the variance ``(MS_runs + MS_units - MS_both) / cells``
        without counting the interaction twice, with Satterthwaite's degrees of freedom.
        """
        count, size = int(clusters.max()) + 1, runs.shape[0]
        grand = runs.mean()
        cells = np.stack([np.bincount(clusters, weights=run - grand, minlength=count) for run in runs])
        cells *= count / runs.shape[1]
        by_run, by_cluster = cells.mean(axis=1), cells.mean(axis=0)
        of_runs = count * float(by_run.var(ddof=1)) if size > 1 else 0.0
        of_clusters = size * float(by_cluster.var(ddof=1)) if count > 1 else 0.0
        rest = cells - by_run[:, None] - by_cluster[None] + cells.mean()
        both = float((rest**2).sum()) / max((size - 1) * (count - 1), 1)
        plain = of_runs + of_clusters
        variance = max(plain - both, of_runs, of_clusters)
        below = of_runs**2 / max(size - 1, 1) + of_clusters**2 / max(count - 1, 1)
        if variance < plain:
            below += both**2 / max((size - 1) * (count - 1), 1)
        freedom = variance**2 / below if below > 0 else float(count - 1)
        return cls(variance / (size * count), freedom, float(np.sqrt(variance / plain)) if plain > 0 else 1.0)

    def p(self, mean: float) -> float:
        """Two-sided p of Student's t for a mean of zero."""
        from scipy import stats

        if self.variance <= 0:
            return 1.0 if mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(mean) / np.sqrt(self.variance), self.freedom))


@dataclass(frozen=True)
class CrossedMean(Estimator):
    """The mean over runs and units: mteb fits a classifier on each of several small training samples (the runs) and
    scores all test items (the units) with each."""

    scope: str = "other items and other training samples"

    def replicates(self, truth: Floats, values: Floats, clusters: Ints, samples: int, rng: Rng) -> Floats:
        """Means over resampled clusters of units plus the deviation of the mean over resampled runs.

        The latter is widened for the small number of runs.
        """
        size = values.shape[0]
        of_units = bootstrap_means(values.mean(axis=0), clusters, samples, rng)
        if size < 2:
            return of_units
        of_runs = bootstrap_means(values.mean(axis=1), np.arange(size), samples, rng)
        return np.asarray(of_units + np.sqrt(size / (size - 1)) * (of_runs - values.mean(axis=(0, 1))))

    def p(self, truth: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: Rng) -> float:
        """Student's t on the difference, with its :class:`CrossedError`."""
        difference = second - first
        return CrossedError.of(difference, clusters).p(float(difference.mean()))

    def freedom(self, values: Floats, clusters: Ints) -> float:
        """Satterthwaite's."""
        return CrossedError.of(values, clusters).freedom

    def rescaled(self, replicates: Floats, centre: float, values: Floats, clusters: Ints) -> Floats:
        """Replicates without the interaction of runs and units, which they count twice."""
        return np.asarray(centre + CrossedError.of(values, clusters).scale * (replicates - centre))


MEAN = Estimator()
MEAN_OF_EXPERIMENTS = Estimator(
    "the task's own experiments (draws of documents and starts of k-means), not other documents"
)
SPEARMAN, AVERAGE_PRECISION, MATCH_F1, CROSSED_MEAN = Spearman(), AveragePrecision(), MatchF1(), CrossedMean()
