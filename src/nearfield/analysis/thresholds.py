"""Similarity thresholds with intervals, and how far right and random pairs overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nearfield.analysis.geometry import Floats


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


def precision_cut(right: Floats, wrong: Floats, precision: float) -> float | None:
    """The lowest cut above which ``precision`` of the pairs are right; None where no cut reaches that."""
    scores = np.concatenate([right, wrong])
    labels = np.concatenate([np.ones(len(right)), np.zeros(len(wrong))])
    order = np.argsort(-scores, kind="stable")
    ordered, found = scores[order], np.cumsum(labels[order])
    last = np.concatenate([ordered[1:] != ordered[:-1], [True]])
    reached = last & (found >= precision * np.arange(1, len(scores) + 1) - 1e-9)
    return float(ordered[np.flatnonzero(reached)[-1]]) if reached.any() else None


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
    scores = np.concatenate([right, wrong])
    labels = np.concatenate([np.ones(len(right)), np.zeros(len(wrong))])
    order = np.argsort(-scores, kind="stable")
    ordered, found = scores[order], np.cumsum(labels[order])
    last = np.concatenate([ordered[1:] != ordered[:-1], [True]])
    f1 = 2 * found / (np.arange(1, len(scores) + 1) + len(right))
    f1 = np.where(last, f1, -1.0)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)[-1]
    return float(ordered[best])


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
