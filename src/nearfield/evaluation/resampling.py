"""Resampled average precision, F1 of matches, and classification over test items and training samples at once.

As in :mod:`nearfield.evaluation.statistics`, everything is vectorised over resamples, whole clusters are drawn, models
share each resample, and point estimates are never taken from resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nearfield.evaluation.statistics import Floats, Ints, bootstrap_means, chunks, midranks


def average_precision(labels: Floats, scores: Floats) -> float:
    """Average precision of ``scores [units]`` for 0/1 ``labels``, ties taken together, as scikit-learn computes it."""
    return float(_ranked_precision(scores[None], labels)[0])


def _ranked_precision(scores: Floats, labels: Floats) -> Floats:
    """Average precision of each row of ``scores [rows, units]``."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=1)
    found = labels[order]
    size = scores.shape[1]
    last = np.concatenate([ordered[:, 1:] != ordered[:, :-1], np.ones((len(scores), 1), dtype=bool)], axis=1)
    # Each unit's precision is that at the end of its group of ties.
    ends = np.minimum.accumulate(np.where(last, np.arange(size), size)[:, ::-1], axis=1)[:, ::-1]
    precision = np.cumsum(found, axis=1) / np.arange(1, size + 1)
    return np.asarray((found * np.take_along_axis(precision, ends, axis=1)).sum(axis=1) / labels.sum())


def precision_pseudo_values(labels: Floats, scores: Floats) -> Floats:
    """Jackknife pseudo-values ``[units]`` of the average precision: ``n AP - (n - 1) AP(without the unit)``.

    A pair counts with its own precision and with what it does to that of the positives below it (Efron & Stein, 1981).
    """
    order = np.argsort(-scores, kind="stable")
    ordered, found = scores[order], labels[order]
    last = np.concatenate([ordered[1:] != ordered[:-1], [True]])
    group = np.cumsum(np.concatenate([[False], last[:-1]]))
    right, seen = np.cumsum(found)[last], np.flatnonzero(last) + 1.0
    positives = np.diff(right, prepend=0.0)
    fewer = np.maximum(seen - 1, 1)
    at_negative = positives * (right / fewer - right / seen)
    less = np.where(seen > 1, (right - 1) / fewer, 0.0)
    at_positive = positives * (less - right / seen)

    def below(terms: Floats) -> Floats:
        return np.asarray(np.cumsum(terms[::-1])[::-1][group], dtype=np.float64)

    total, size, relevant = float((positives * right / seen).sum()), len(labels), float(labels.sum())
    without = np.where(
        found > 0,
        (total + below(at_positive) - less[group]) / max(relevant - 1, 1),
        (total + below(at_negative)) / relevant,
    )
    values = np.empty(size)
    values[order] = size * total / relevant - (size - 1) * without
    return values


def draws_precision(labels: Floats, scores: Floats, clusters: Ints, samples: int, rng: np.random.Generator) -> Floats:
    """Draws around the average precision of pairs: ``labels [units]``, ``scores [units, models]`` -> ``[samples, models]``.

    Clusters of the pseudo-values are drawn, and their deviations are added on the logit scale, where an average
    precision near its ends is less skewed (Boyd, Eng & Page, 2013). Pairs are not drawn themselves: twice the same pair
    in a ranking raises the score and narrows its interval.
    """
    models = range(scores.shape[1])
    values = np.stack([precision_pseudo_values(labels, scores[:, i]) for i in models], axis=1)
    whole = np.array([average_precision(labels, scores[:, i]) for i in models])
    deviations = bootstrap_means(values, clusters, samples, rng) - values.mean(axis=0)
    inner = np.clip(whole, 1e-12, 1 - 1e-12)
    logits = np.log(inner / (1 - inner)) + deviations / (inner * (1 - inner))
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))), dtype=np.float64)


_SORTED_CELLS = 200_000_000


def swap_precision_p(
    labels: Floats, first: Floats, second: Floats, clusters: Ints, permutations: int, rng: np.random.Generator
) -> float:
    """Two-sided p of a paired permutation test of two average precisions on the same pairs.

    The models' ranks are swapped for a random half of the clusters; the statistic is the difference of the two average
    precisions. Sorting is what it costs: on many pairs fewer permutations are drawn (at least 999).
    """
    permutations = min(permutations, max(999, _SORTED_CELLS // (2 * len(labels))))
    a, b = midranks(first), midranks(second)
    count = int(clusters.max()) + 1
    observed = abs(average_precision(labels, a) - average_precision(labels, b))
    extreme = 0
    for rows in chunks(permutations, 8 * len(labels)):
        swapped = rng.integers(2, size=(rows, count), dtype=np.int8).astype(bool)[:, clusters]
        one, other = np.where(swapped, b, a), np.where(swapped, a, b)
        distance = np.abs(_ranked_precision(one, labels) - _ranked_precision(other, labels))
        extreme += int(np.count_nonzero(distance >= observed - 1e-12))
    return (extreme + 1) / (permutations + 1)


def weighted_f1(counts: Floats, gold: Ints, predicted: Ints) -> Floats:
    """F1 of each label, averaged with the labels' support, for units that count ``counts [rows, units]`` times.

    It is scikit-learn's ``f1_score(average="weighted")``, which mteb scores bitext mining by; ``predicted [rows or 1,
    units]`` may differ from row to row.
    """
    width = int(max(gold.max(), predicted.max())) + 1
    predicted = np.broadcast_to(predicted, counts.shape)
    rows = np.arange(len(counts))[:, None] * width

    def by_label(labels: Ints, weights: Floats) -> Floats:
        cells = (rows + labels).ravel()
        sums = np.bincount(cells, weights=weights.ravel(), minlength=len(counts) * width)
        return np.asarray(sums.reshape(len(counts), width), dtype=np.float64)

    support = by_label(np.broadcast_to(gold, counts.shape), counts)
    right = by_label(np.broadcast_to(gold, counts.shape), counts * (predicted == gold))
    claimed = by_label(predicted, counts)
    f1 = 2 * right / np.maximum(support + claimed, 1e-300)
    return np.asarray((support * f1).sum(axis=1) / support.sum(axis=1), dtype=np.float64)


def f1_pseudo_values(gold: Ints, predicted: Ints) -> Floats:
    """Jackknife pseudo-values ``[units]`` of the F1 of matches ``predicted [units]``.

    A sentence counts with its own match and with the wrong matches that others make to it. ``n F1 - (n - 1) F1(without
    the sentence)`` is what each adds (Efron & Stein, 1981); their spread is the score's. Sentences that are drawn twice
    would be matched with their own copies, so they are never resampled themselves.
    """
    size, width = len(gold), int(max(gold.max(), predicted.max())) + 1
    support = np.bincount(gold, minlength=width).astype(np.float64)
    right = np.bincount(gold[predicted == gold], minlength=width).astype(np.float64)
    claimed = np.bincount(predicted, minlength=width).astype(np.float64)

    def part(support: Floats, right: Floats, claimed: Floats) -> Floats:
        return np.asarray(support * 2 * right / np.maximum(support + claimed, 1e-300))

    total = part(support, right, claimed)
    hit = (predicted == gold).astype(np.float64)
    at_gold = part(support[gold] - 1, right[gold] - hit, claimed[gold] - hit) - total[gold]
    missed = predicted != gold
    at_match = part(support[predicted], right[predicted], claimed[predicted] - 1) - total[predicted]
    without = (total.sum() + at_gold + np.where(missed, at_match, 0.0)) / max(size - 1, 1)
    return np.asarray(size * (total.sum() / size) - (size - 1) * without, dtype=np.float64)


def draws_f1(gold: Ints, predicted: Ints, clusters: Ints, samples: int, rng: np.random.Generator) -> Floats:
    """Draws around the F1 of matches ``predicted [units, models]``: ``[samples, models]``, by its pseudo-values."""
    values = np.stack([f1_pseudo_values(gold, predicted[:, i]) for i in range(predicted.shape[1])], axis=1)
    whole = np.concatenate([weighted_f1(np.ones((1, len(gold))), gold, match[None]) for match in predicted.T])
    return np.asarray(whole + bootstrap_means(values, clusters, samples, rng) - values.mean(axis=0), dtype=np.float64)


def swap_f1_p(
    gold: Ints, first: Ints, second: Ints, clusters: Ints, permutations: int, rng: np.random.Generator
) -> float:
    """Two-sided p of a paired permutation test: the models' matches are swapped for a random half of the clusters."""
    permutations = min(permutations, max(999, _SORTED_CELLS // (2 * len(gold))))
    count = int(clusters.max()) + 1
    ones = np.ones((1, len(gold)))
    observed = abs(float((weighted_f1(ones, gold, first[None]) - weighted_f1(ones, gold, second[None]))[0]))
    extreme = 0
    for rows in chunks(permutations, 8 * len(gold)):
        swapped = rng.integers(2, size=(rows, count), dtype=np.int8).astype(bool)[:, clusters]
        full = np.ones(swapped.shape)
        one = weighted_f1(full, gold, np.where(swapped, second, first))
        other = weighted_f1(full, gold, np.where(swapped, first, second))
        extreme += int(np.count_nonzero(np.abs(one - other) >= observed - 1e-12))
    return (extreme + 1) / (permutations + 1)


@dataclass(frozen=True)
class CrossedError:
    """The error of a mean over runs and units: its variance, degrees of freedom, and the share of the plain draws."""

    variance: float
    freedom: float
    scale: float

    def p(self, mean: float) -> float:
        """Two-sided p of Student's t for a mean of zero."""
        from scipy import stats

        if self.variance <= 0:
            return 1.0 if mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(mean) / np.sqrt(self.variance), self.freedom))


def crossed_error(runs: Floats, clusters: Ints) -> CrossedError:
    """The error of the mean of ``runs [runs, units]`` where both the runs and the units are samples.

    mteb fits a classifier on each of several small training samples (the runs) and scores all test items (the units)
    with each. Two-way analysis of variance with random effects gives the variance ``(MS_runs + MS_units - MS_both) /
    cells`` without counting the interaction twice, with Satterthwaite's degrees of freedom.
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
    return CrossedError(variance / (size * count), freedom, float(np.sqrt(variance / plain)) if plain > 0 else 1.0)


def crossed_draws(runs: Floats, clusters: Ints, samples: int, rng: np.random.Generator) -> Floats:
    """Draws around the mean of ``runs [runs, units, models]``: units and runs are both resampled; ``[samples, models]``.

    A draw is the mean over resampled clusters of units plus the deviation of the mean over resampled runs, the latter
    widened for their small number.
    """
    size = runs.shape[0]
    draws = bootstrap_means(runs.mean(axis=0), clusters, samples, rng)
    if size < 2:
        return draws
    of_runs = bootstrap_means(runs.mean(axis=1), np.arange(size), samples, rng)
    return np.asarray(draws + np.sqrt(size / (size - 1)) * (of_runs - runs.mean(axis=(0, 1))), dtype=np.float64)
