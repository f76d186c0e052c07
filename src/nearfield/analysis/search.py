"""What similarities are worth as decisions: accuracies, thresholds, overlaps, and whether versions read each other's index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfield.analysis.geometry import Floats, alignment, normalised
from nearfield.analysis.likeness import compatibility, paired_audit
from nearfield.analysis.thresholds import (
    Threshold,
    f1_threshold,
    overlap,
    precision_threshold,
    recall_threshold,
)

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
        own = cosines[list(rows)]
        right[i] = own.mean()
        near[i] = -np.sort(np.partition(-cosines, top - 1)[:top])
        wrong = np.delete(cosines, list(rows))
        random[i] = wrong[rng.integers(len(wrong))] if len(wrong) else np.nan
        ranks[i] = 1 + int((wrong >= own.max()).sum())
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


@dataclass(frozen=True)
class Versions:
    """Whether models in the order given (old to new) read each other's index.

    ``matrix[t][k]`` is the share of questions by model t that find a right document first in the index of model k (null:
    other dimensions); ``kept`` and ``mean`` are CoReS's two figures, null with a null below the diagonal. ``audits`` is
    ``from -> to`` with the share of texts found again by an orthogonal map from some known pairs.
    """

    models: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    kept: float | None
    mean: float | None
    audits: dict[str, tuple[tuple[int, float], ...]]


def versions(models: Mapping[str, Questions]) -> Versions:
    """Cross-model retrieval of each pair of models, and the audit of each pair from the documents that both encoded."""
    names = tuple(models)
    matrix: list[list[float | None]] = []
    for new in names:
        row: list[float | None] = []
        for old in names:
            mixed = Questions(models[new].questions, models[old].documents, models[new].right)
            same = mixed.questions.shape[1] == mixed.documents.shape[1]
            row.append(first_found(mixed) if same else None)
        matrix.append(row)
    lower = [matrix[t][k] for t in range(len(names)) for k in range(t + 1)]
    kept, mean = (None, None)
    if None not in lower:
        kept, mean = compatibility(np.array([[value or 0.0 for value in row] for row in matrix]))
    audits = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            points = audit_curve(models[a].documents, models[b].documents)
            if points:
                audits[f"{a} -> {b}"] = points
    return Versions(names, tuple(tuple(row) for row in matrix), kept, mean, audits)


def first_found(of: Questions) -> float:
    """The share of questions whose nearest document is a right one; a wrong one as near counts against it."""
    questions, documents = normalised(of.questions), normalised(of.documents)
    hits = 0
    for i, rows in enumerate(of.right):
        cosines = documents @ questions[i]
        wrong = np.delete(cosines, list(rows))
        hits += bool(not len(wrong) or cosines[list(rows)].max() > wrong.max())
    return hits / len(of.right)


def audit_curve(
    source: Floats, target: Floats, shares: Sequence[float] = (0.25, 0.5, 1, 2)
) -> tuple[tuple[int, float], ...]:
    """How many texts are found again in another model's space, by the number of known pairs (shares of the dimensions)."""
    d = min(source.shape[1], target.shape[1])
    known = sorted({max(2, round(share * d)) for share in shares})
    x, y = normalised(source - source.mean(axis=0)), normalised(target - target.mean(axis=0))
    return tuple((m, paired_audit(x, y, m)) for m in known if m <= len(source) // 2)
