"""A model's score on one task, the units that it is made of, how it is made of them, and what to know of it.

Each :class:`Estimator` computes a score from units, replicates of it, and a paired test of two models. ``values`` are
``[units]`` (``[runs, units]`` for :class:`CrossedMean`), those of several models have a last axis more; ``truth [units]``
is what predictions are held against. Whole clusters are resampled, models share each resample, and point estimates are
never taken from resamples. The methods and their limits are told in ``docs/statistics.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nearfield.errors import Notice
from nearfield.evaluation import statistics
from nearfield.evaluation.sharing import Sharing
from nearfield.evaluation.statistics import (
    FISHER_Z,
    LINEAR,
    LOGIT,
    Floats,
    Interval,
    Ints,
    Scale,
    bootstrap_means,
    chunks,
    cluster_freedom,
    contributions,
    kurtosis_freedom,
    midranks,
    resample_counts,
    sign_flip_p,
)
from nearfield.provenance import generator

Rng = np.random.Generator
_SORTED_CELLS = 200_000_000

_DECIDING_A_MEAN = 3
"""Where fewer units than this decide a mean, its degrees of freedom are counted by the kurtosis."""


@dataclass(frozen=True)
class Estimator:
    """The mean of independent units, and the base of all other scores."""

    scope: str = "other units of the same kind"
    """The quantity that an interval is about."""
    is_mean: bool = True
    """Whether the score is a mean over units, so that one unit has a difference of its own."""
    of_units: bool = True
    """Whether units are all that the score is made of, so that what they share can be counted."""
    fewest_deciding: int = 5
    """Where fewer units decide the error of a score that is no mean, the interval may be too narrow."""

    def value(self, truth: Floats, values: Floats) -> float:
        """The score."""
        return float(values.mean())

    def replicates(self, truth: Floats, values: Floats, clusters: Ints, samples: int, rng: Rng) -> Floats:
        """Replicates of the scores of several models: ``[samples, models]``."""
        return bootstrap_means(values, clusters, samples, rng)

    def p(self, truth: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: Rng) -> float:
        """Two-sided p of a paired test of two models on the same units."""
        return sign_flip_p(second - first, clusters, permutations, rng)

    def influence(self, truth: Floats, values: Floats) -> Floats:
        """The influence of each unit on the score, up to a constant: their mean has the score's error; ``[units]``."""
        return values

    def scale(self, values: Floats) -> Scale:
        """The scale on which the score's error is nearest to symmetric."""
        return LOGIT if len(values) and values.min() >= 0 and values.max() <= 1 else LINEAR

    def freedom(self, influence: Floats, clusters: Ints) -> float:
        """Degrees of freedom of the interval of a score or a difference."""
        return cluster_freedom(influence, clusters) if self.of_units else float(clusters.max())

    def few_freedom(self, influence: Floats, clusters: Ints) -> float:
        """Degrees of freedom where few units decide the variance."""
        binary = self.is_mean and bool(np.isin(influence, (0.0, 1.0)).all())
        if binary or (self.is_mean and contributions(influence, clusters) >= _DECIDING_A_MEAN):
            return self.freedom(influence, clusters)
        return kurtosis_freedom(influence, clusters)

    def rescaled(self, replicates: Floats, centre: float, values: Floats, clusters: Ints) -> Floats:
        """Replicates ``[samples]`` around ``centre``, a score or a difference, with the spread that its ``values`` have."""
        return replicates

    def caution(self, truth: Floats, values: Floats, deciding: float) -> str | None:
        """Why the interval may not hold for scores of this shape, of which ``deciding`` units make the variance."""
        if self.is_mean or deciding >= self.fewest_deciding:
            return None
        return f"about {deciding:.1f} of {len(truth):,} units decide the error, so the interval may be too narrow"


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
    fewest_deciding: int = 10

    def value(self, truth: Floats, values: Floats) -> float:
        """The correlation; NaN where one side is constant."""
        return float(_correlation(midranks(truth)[None], midranks(values)[None], np.ones((1, len(truth))))[0])

    def influence(self, truth: Floats, values: Floats) -> Floats:
        """The influence function of the correlation of midranks: a pair counts with its own ranks and with those that it
        moves."""
        x, y = ((midranks(one) - 0.5) / len(one) - 0.5 for one in (truth, values))

        def moved(by: Floats, weights: Floats) -> Floats:
            _, group = np.unique(by, return_inverse=True)
            sums = np.bincount(group, weights=weights)
            return np.asarray((np.cumsum(sums[::-1])[::-1] - sums / 2)[group] / len(by), dtype=np.float64)

        of_x, of_y = float((x**2).mean()), float((y**2).mean())
        if of_x <= 0 or of_y <= 0:
            return np.zeros(len(x))
        score = float((x * y).mean()) / np.sqrt(of_x * of_y)
        together = x * y + moved(x, y) + moved(y, x)
        alone = (x**2 + 2 * moved(x, x)) / of_x + (y**2 + 2 * moved(y, y)) / of_y
        found = together / np.sqrt(of_x * of_y) - score / 2 * alone
        return np.asarray(score + found - found.mean(), dtype=np.float64)

    def scale(self, values: Floats) -> Scale:
        """Fisher's."""
        return FISHER_Z

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


_FEWEST_OF_A_KIND = 20
"""With fewer positives or negatives, intervals of average precision cover 61 to 91 %."""


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

    def influence(self, truth: Floats, values: Floats) -> Floats:
        """The pseudo-values."""
        return self.pseudo_values(truth, values)

    def scale(self, values: Floats) -> Scale:
        """Log odds."""
        return LOGIT

    def caution(self, truth: Floats, values: Floats, deciding: float) -> str | None:
        """Why the interval may not hold: there are few positives, or few pairs decide."""
        few = int(min(truth.sum(), len(truth) - truth.sum()))
        if few < _FEWEST_OF_A_KIND:
            return f"only {few} of {len(truth):,} pairs are of one kind, so the interval may be too narrow"
        return super().caution(truth, values, deciding)

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

    def influence(self, truth: Floats, values: Floats) -> Floats:
        """The pseudo-values."""
        return self.pseudo_values(truth, values)

    def scale(self, values: Floats) -> Scale:
        """Log odds."""
        return LOGIT

    def caution(self, truth: Floats, values: Floats, deciding: float) -> str | None:
        """Why the interval may not hold: there are few sentences."""
        if len(truth) >= _FEWEST_SENTENCES:
            return None
        return f"of {len(truth):,} sentences: below {_FEWEST_SENTENCES} the interval covers about 93 % instead of 95 %"

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


_FEWEST_SENTENCES = 200


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
    of_units: bool = False

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

    def freedom(self, influence: Floats, clusters: Ints) -> float:
        """Satterthwaite's."""
        return CrossedError.of(influence, clusters).freedom

    def rescaled(self, replicates: Floats, centre: float, values: Floats, clusters: Ints) -> Floats:
        """Replicates without the interaction of runs and units, which they count twice."""
        return np.asarray(centre + CrossedError.of(values, clusters).scale * (replicates - centre))


MEAN = Estimator()
MEAN_OF_EXPERIMENTS = Estimator(
    "the task's own experiments (draws of documents and starts of k-means), not other documents", of_units=False
)
SPEARMAN, AVERAGE_PRECISION, MATCH_F1, CROSSED_MEAN = Spearman(), AveragePrecision(), MatchF1(), CrossedMean()


# Scores

Key = tuple[str, str, str]
"""Task, subset, split."""
NOTHING: Floats = np.empty(0)


def title_of(key: Key) -> str:
    """A key in words: the task, with its subset and split where they are not the usual ones."""
    task, subset, split = key
    return task + (f" ({subset})" if subset != "default" else "") + (f" [{split}]" if split != "test" else "")


@dataclass(frozen=True)
class TaskScores:
    """One model's main score on one subset and split, and the units that it is made of (none where ``reason`` says why).

    ``values`` is ``[units]``, for means over classifiers ``[runs, units]``; ``truth [units]`` is what predictions are held
    against: gold scores, 0/1 labels, the numbers of the right sentences.
    """

    metric: str
    score: float
    data_revision: str
    reason: str | None
    estimator: Estimator = MEAN
    ids: tuple[str, ...] = ()
    clusters: tuple[str | None, ...] = ()
    values: Floats = field(default_factory=lambda: NOTHING)
    truth: Floats = field(default_factory=lambda: NOTHING)
    task_type: str = ""
    notices: tuple[Notice, ...] = ()
    """Notices for readers of the score."""
    unit: str = "unit"
    """The unit's kind, in one word."""
    sharing: Sharing | None = None
    """The content that units share, where no part of them is independent of the rest."""

    @property
    def influence(self) -> Floats:
        """The influence of each unit on the score."""
        return self.estimator.influence(self.truth, self.values)

    @property
    def scale(self) -> Scale:
        """The scale of the score's error."""
        return self.estimator.scale(self.values)

    @property
    def resampled(self) -> str | None:
        """The kind of what is resampled, and how many there are; None where nothing is."""
        if self.reason is not None:
            return None
        runs = len(self.values) if self.values.ndim > 1 else 1
        return resampled_in_words(self.unit, len(self.ids), runs, int(self.numbers.max()) + 1, self.sharing)

    @property
    def caution(self) -> str | None:
        """Why the interval may not hold for scores of this shape."""
        if self.reason is not None or not self.estimator.of_units:
            return None
        deciding = statistics.contributions(self.influence, self.numbers)
        return self.estimator.caution(self.truth, self.values, deciding)

    @property
    def numbers(self) -> Ints:
        """The cluster of each unit, numbered from 0."""
        return statistics.cluster_numbers(self.clusters, self.ids)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """How many units and clusters there are."""
        return (None, None) if self.reason is not None else (len(self.ids), int(self.numbers.max()) + 1)

    def own(self, replicates: Floats) -> Floats:
        """This score's own replicates from its column of :func:`joint_replicates`."""
        return self.estimator.rescaled(replicates, self.score, self.values, self.numbers)

    def interval(self, replicates: Floats, level: float) -> Interval:
        """The score's interval from its column of :func:`joint_replicates`."""
        estimator, numbers, influence, scale = self.estimator, self.numbers, self.influence, self.scale
        if self.sharing is not None:
            return self.sharing.interval(self.score, influence, level, scale)
        freedom = estimator.freedom(influence, numbers)
        if estimator.of_units:
            if statistics.few_decide(influence, numbers):
                freedom = estimator.few_freedom(influence, numbers)
                return statistics.few_interval(self.score, influence, numbers, freedom, level, scale)
            if scale == LOGIT and not 1e-9 < self.score < 1 - 1e-9:
                return statistics.score_interval(self.score, 0.0, max(freedom, 1.0), level)
        return statistics.percentile_interval(self.own(replicates), level, freedom)


def dependent(of: TaskScores, contents: Sequence[Sequence[int] | None]) -> TaskScores:
    """The same with what its units share where one component holds too many of them; without units where that tells
    no error. ``contents`` has those of each unit where the data name no clusters."""
    if of.estimator == MEAN_OF_EXPERIMENTS:
        return of
    reason = statistics.too_large(np.bincount(of.numbers).tolist())
    if reason is None:
        return of
    why = f"and above {100 * statistics.LARGEST_COMPONENT:g} % no interval and no test hold"
    if of.estimator.of_units:
        known = any(contents)
        sharing = Sharing.of(
            tuple(tuple(c or ()) for c in contents) if known else tuple((n,) for n in of.numbers.tolist())
        )
        if sharing.reason is None:
            return replace(of, sharing=sharing)
        why = sharing.reason
    return TaskScores(of.metric, of.score, of.data_revision, f"{reason}, {why}")


SHARED = {"query": "documents", "pair": "texts"}
"""The content that units of a kind share, where the data name no clusters."""


def resampled_in_words(unit: str, units: int, runs: int = 1, clusters: int = 0, sharing: Sharing | None = None) -> str:
    """The parts of a score's error: so many units, in so many clusters, with what they share."""
    many = {"query": "queries"}.get(unit, f"{unit}s")
    if sharing is not None:
        return sharing.in_words(many, SHARED.get(unit, "clusters"))
    whole = f" in {clusters:,} clusters, which are resampled whole" if clusters not in (0, units) else " are resampled"
    more = f", and so are {runs:,} training samples" if runs > 1 else ""
    return f"{units:,} {many}{whole}{more}"


def joint_replicates(
    key: Key, scores: Mapping[str, TaskScores], samples: int, seed: int
) -> Iterator[tuple[str, Floats]]:
    """Replicates ``[samples]`` of the score of each model that has units; models with the same units share every resample."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, of in scores.items():
        if of.reason is None:
            units = (of.ids, of.clusters, of.sharing)
            same = (of.data_revision, of.estimator, units, of.values.shape, of.truth.tobytes())
            groups.setdefault(same, []).append(name)
    for members in groups.values():
        first, rng = scores[members[0]], generator(seed, "bootstrap", *key)
        values = np.stack([scores[name].values for name in members], axis=-1)
        if first.sharing is not None:
            estimates = np.array([scores[name].score for name in members])
            influence = np.stack([scores[name].influence for name in members], axis=1)
            scale = first.estimator.scale(values)
            replicates = first.sharing.replicates(estimates, influence, samples, rng, scale)
        else:
            replicates = first.estimator.replicates(first.truth, values, first.numbers, samples, rng)
        for i, name in enumerate(members):
            yield name, replicates[:, i]


def score_interval(key: Key, of: TaskScores, samples: int, level: float, seed: int) -> Interval | None:
    """The interval of a single model's score; None where it has no units."""
    return next(
        (of.interval(replicates, level) for _, replicates in joint_replicates(key, {"": of}, samples, seed)), None
    )


def not_paired(first: TaskScores, second: TaskScores) -> str | None:
    """Why two models' scores cannot be tested against each other, or None."""
    if first.data_revision != second.data_revision:
        return "the two were scored on different data"
    if first.metric != second.metric:
        return f"the two were scored by different metrics ({first.metric}, {second.metric})"
    if first.reason is not None or second.reason is not None:
        return first.reason or second.reason
    units = [(of.ids, of.clusters, of.sharing, of.estimator) for of in (first, second)]
    if units[0] != units[1]:
        return "the two have scores of different units"
    if first.values.shape != second.values.shape:
        return "the two have scores of different experiments"
    if not np.array_equal(first.truth, second.truth):
        return "the two have different gold scores"
    return None


@dataclass(frozen=True)
class Contrast:
    """A paired difference of two models on the same units: its interval and its tests.

    ``replicates [samples]`` are of the difference of the two scores.
    """

    of: TaskScores
    reference: TaskScores
    replicates: Floats

    @property
    def difference(self) -> float:
        """The score minus that of the reference."""
        return self.of.score - self.reference.score

    @property
    def _influence(self) -> Floats:
        return self.of.influence - self.reference.influence

    @property
    def _own(self) -> Floats:
        values = self.of.values - self.reference.values
        return self.of.estimator.rescaled(self.replicates, self.difference, values, self.of.numbers)

    def interval(self, level: float) -> Interval:
        """The interval of the difference."""
        of, influence = self.of, self._influence
        if of.sharing is not None:
            return of.sharing.interval(self.difference, influence, level)
        if of.estimator.is_mean and of.estimator.of_units and statistics.few_decide(influence, of.numbers):
            return statistics.plus_minus_interval(influence, of.numbers, level)
        return statistics.percentile_interval(self._own, level, of.estimator.freedom(influence, of.numbers))

    def p(self, permutations: int, rng: Rng) -> float:
        """Two-sided p of no difference."""
        of, reference = self.of, self.reference
        if of.sharing is not None:
            return of.sharing.p(self.difference, self._influence)
        return of.estimator.p(of.truth, reference.values, of.values, of.numbers, permutations, rng)

    def equivalence_p(self, margin: float) -> float:
        """p of a difference beyond the margin."""
        if self.of.sharing is not None:
            return self.of.sharing.equivalence_p(self.difference, self._influence, margin)
        return statistics.equivalence_p(self._own, margin)


@dataclass(frozen=True)
class Effect:
    """How large a difference is: in standard deviations of the units' differences, and in units won, even and lost."""

    size: float | None = None
    won: int | None = None
    even: int | None = None
    lost: int | None = None

    @classmethod
    def of(cls, scores: TaskScores, reference: TaskScores) -> Effect:
        """The effect of a paired difference; without a mean over units there is none."""
        if not scores.estimator.is_mean:
            return cls()
        difference = scores.values - reference.values
        if isinstance(scores.estimator, CrossedMean):
            difference = difference.mean(axis=0)
        spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
        tolerance = 1e-9
        return cls(
            float(difference.mean()) / spread if spread > tolerance else None,
            int((difference > tolerance).sum()),
            int((np.abs(difference) <= tolerance).sum()),
            int((difference < -tolerance).sum()),
        )


MARK = " *"
"""The mark behind a score that has a notice."""
_NAMED = 6


@dataclass(frozen=True)
class ScoreNotice:
    """A notice of one model's scores on ``tasks``; ``everywhere`` if these are all that are shown of it."""

    model: str
    code: str
    what: str
    hint: str | None
    tasks: tuple[str, ...]
    everywhere: bool

    @property
    def sentence(self) -> str:
        """The notice in one line, as tables have it below them."""
        return f"* {self.model} on {tasks_in_words(self.tasks, self.everywhere)}: {self.what}"


def tasks_in_words(tasks: Sequence[str], everywhere: bool) -> str:
    """Names of tasks; of many only the first ones."""
    if everywhere and len(tasks) > 1:
        return "all tasks"
    more = f" and {len(tasks) - _NAMED} more" if len(tasks) > _NAMED else ""
    return ", ".join(tasks[:_NAMED]) + more


def score_notices(read: Mapping[str, Mapping[Key, TaskScores]], keys: Iterable[Key]) -> tuple[ScoreNotice, ...]:
    """The notices of each model's scores under these keys."""
    shown = list(keys)
    made = []
    for model, scores in read.items():
        model_keys = [key for key in shown if key in scores]
        tasks: dict[Notice, dict[str, None]] = {}
        for key in model_keys:
            for notice in scores[key].notices:
                tasks.setdefault(notice, {})[key[0]] = None
        scored = {key[0] for key in model_keys}
        made += [
            ScoreNotice(model, notice.code, notice.what, notice.hint, tuple(of), set(of) == scored)
            for notice, of in tasks.items()
        ]
    return tuple(made)


def noticed(notices: Iterable[ScoreNotice]) -> set[tuple[str, str]]:
    """Model and task of each score that has a notice."""
    return {(notice.model, task) for notice in notices for task in notice.tasks}
