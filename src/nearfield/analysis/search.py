"""Similarities as decisions: accuracies, cuts with their intervals, and how far right and random pairs overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfield.analysis.geometry import Floats, alignment, normalised

TOP = 10
CUTS = (1, 5, 10)
BINS = 40


@dataclass(frozen=True)
class Questions:
    """Vectors of questions ``[q, d]`` and documents ``[n, d]``, and the rows of the right documents of each question."""

    questions: Floats
    documents: Floats
    right: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Accuracy:
    """The share of questions with a right document among the first k, and its 95 % bootstrap interval over questions."""

    k: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Searched:
    """One model's questions: accuracies, three samples of similarities, their overlaps, cuts with intervals.

    ``edges`` and ``counts`` are a histogram of the similarities with right documents, with the first ten, and with random
    ones (shares of each sample). ``alignment`` is that of questions with their right documents. ``precision`` is null where no cut reaches the target.
    """

    questions: int
    documents: int
    alignment: float
    accuracy: tuple[Accuracy, ...]
    edges: tuple[float, ...]
    counts: dict[str, tuple[float, ...]]
    overlaps: dict[str, float]
    recall: Threshold
    precision: Threshold | None
    f1: Threshold


def bootstrap_share(outcomes: Floats, samples: int, rng: np.random.Generator) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean of resampled 0/1 outcomes: the count of a draw is binomial."""
    drawn = rng.binomial(len(outcomes), float(outcomes.mean()), size=samples) / len(outcomes)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def similarities(of: Questions, rng: np.random.Generator) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    """Cosines with right documents (the mean of each question's) ``[q]``, with the first ten ``[q, 10]``, with a random
    wrong one ``[q]``; and the rank of the best right document, from 1, ties counted against it ``[q]``."""
    questions, documents = normalised(of.questions), normalised(of.documents)
    top = min(TOP, len(documents))
    right, near = np.empty(len(questions)), np.empty((len(questions), top))
    random, ranks = np.empty(len(questions)), np.empty(len(questions), dtype=np.int64)
    for i, rows in enumerate(of.right):
        cosines = documents @ questions[i]
        right_cosines = cosines[list(rows)]
        right[i] = right_cosines.mean()
        near[i] = -np.sort(np.partition(-cosines, top - 1)[:top])
        wrong = np.delete(cosines, list(rows))
        random[i] = wrong[rng.integers(len(wrong))] if len(wrong) else np.nan
        ranks[i] = 1 + int((wrong >= right_cosines.max()).sum())
    return right, near, random[~np.isnan(random)], ranks


def searched(of: Questions, *, target: float = 0.95, samples: int = 1_000, seed: int = 0) -> Searched:
    """All of one model's figures. Thresholds are of right against random documents, one for each question."""
    rng = np.random.default_rng(seed)
    right, near, random, ranks = similarities(of, rng)
    accuracy = []
    for k in CUTS:
        hits = (ranks <= k).astype(np.float64)
        accuracy.append(Accuracy(k, float(hits.mean()), *bootstrap_share(hits, samples, rng)))
    named = {"right": right, "first ten": near.ravel(), "random": random}
    every = np.concatenate(list(named.values()))
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-9), BINS + 1)
    counts = {name: tuple((np.histogram(one, edges)[0] / len(one)).tolist()) for name, one in named.items()}
    asked = [question for question, rows in enumerate(of.right) for _ in rows]
    answers = [row for rows in of.right for row in rows]
    pairs = (("right", "random"), ("right", "first ten"), ("first ten", "random"))
    return Searched(
        questions=len(right),
        documents=len(of.documents),
        alignment=alignment(of.questions[asked], of.documents[answers]),
        accuracy=tuple(accuracy),
        edges=tuple(edges.tolist()),
        counts=counts,
        overlaps={f"{a}, {b}": overlap(named[a], named[b]) for a, b in pairs},
        recall=recall_threshold(right, random, target, samples, rng),
        precision=precision_threshold(right, random, target, samples, rng),
        f1=f1_threshold(right, random, min(samples, 200), rng),
    )


def overlap(first: Floats, second: Floats, bins: int = 50) -> float:
    """Overlap coefficient of two samples: the shared area of their histograms on one grid, from 0 to 1."""
    low, high = min(first.min(), second.min()), max(first.max(), second.max())
    if low == high:
        return 1.0
    grid = np.linspace(low, high, bins + 1)
    p, q = (np.histogram(sample, grid)[0] / len(sample) for sample in (first, second))
    return float(np.minimum(p, q).sum())


@dataclass(frozen=True)
class Threshold:
    """A cut on similarities with what it gives, and the 95 % interval of the cut over resampled questions."""

    cut: float
    low: float
    high: float
    precision: float
    recall: float


def _rates(right: Floats, wrong: Floats, cut: float) -> tuple[float, float]:
    hits, alarms = float((right >= cut).sum()), float((wrong >= cut).sum())
    return (hits / (hits + alarms) if hits + alarms else 1.0), hits / len(right)


def recall_threshold(
    right: Floats, wrong: Floats, recall: float = 0.95, samples: int = 1_000, rng: np.random.Generator | None = None
) -> Threshold:
    """The cut that keeps ``recall`` of the right pairs ``[questions]``; ``wrong`` are similarities of random pairs.

    The rule is this suite's own: the lower quantile of the right similarities, its interval by bootstrap over questions.
    """
    rng = rng if rng is not None else np.random.default_rng(0)
    cut = float(np.quantile(right, 1 - recall))
    drawn = right[rng.integers(len(right), size=(samples, len(right)))]
    low, high = np.quantile(np.quantile(drawn, 1 - recall, axis=1), [0.025, 0.975])
    return Threshold(cut, float(low), float(high), *_rates(right, wrong, cut))


def _cuts(right: Floats, wrong: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Each cut that differs from the next, falling, with how many right and how many pairs reach it."""
    scores = np.concatenate([right, wrong])
    labels = np.concatenate([np.ones(len(right)), np.zeros(len(wrong))])
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.concatenate([ordered[1:] != ordered[:-1], [True]])
    return ordered[last], np.cumsum(labels[order])[last], np.flatnonzero(last) + 1


def precision_cut(right: Floats, wrong: Floats, precision: float) -> float | None:
    """The lowest cut above which ``precision`` of the pairs are right; None where no cut reaches that."""
    cuts, correct, count = _cuts(right, wrong)
    reached = correct >= precision * count - 1e-9
    return float(cuts[reached][-1]) if reached.any() else None


def precision_threshold(
    right: Floats, wrong: Floats, precision: float = 0.95, samples: int = 1_000, rng: np.random.Generator | None = None
) -> Threshold | None:
    """The lowest cut that reaches ``precision`` among these right and random pairs, its interval over resampled pairs.

    It depends on how many wrong pairs come with a right one: among more of them precision is lower. None where no cut
    reaches it; resamples in which none does are left out of the interval.
    """
    rng = rng if rng is not None else np.random.default_rng(0)
    cut = precision_cut(right, wrong, precision)
    if cut is None:
        return None
    drawn = [
        precision_cut(
            right[rng.integers(len(right), size=len(right))],
            wrong[rng.integers(len(wrong), size=len(wrong))],
            precision,
        )
        for _ in range(samples)
    ]
    low, high = np.quantile([one for one in drawn if one is not None] or [cut], [0.025, 0.975])
    return Threshold(cut, float(low), float(high), *_rates(right, wrong, cut))


def best_f1_cut(right: Floats, wrong: Floats) -> float:
    """The cut between right and wrong similarities with the largest F1 (the lowest of equals)."""
    cuts, correct, count = _cuts(right, wrong)
    f1 = 2 * correct / (count + len(right))
    return float(cuts[f1 >= f1.max() - 1e-12][-1])


def f1_threshold(
    right: Floats, wrong: Floats, samples: int = 1_000, rng: np.random.Generator | None = None
) -> Threshold:
    """The cut between right and random pairs with the largest F1, its interval by bootstrap over questions and pairs."""
    rng = rng if rng is not None else np.random.default_rng(0)
    cut = best_f1_cut(right, wrong)
    cuts = [
        best_f1_cut(right[rng.integers(len(right), size=len(right))], wrong[rng.integers(len(wrong), size=len(wrong))])
        for _ in range(samples)
    ]
    low, high = np.quantile(cuts, [0.025, 0.975])
    return Threshold(cut, float(low), float(high), *_rates(right, wrong, cut))
