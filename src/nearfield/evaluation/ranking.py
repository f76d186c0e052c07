"""Rank models over tasks: Borda points, mean ranks, and confidence sets of ranks that hold for all models at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfield.evaluation.statistics import Floats

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


def rank_sets(estimates: Floats, draws: Floats, level: float = 0.95) -> RankSets:
    """Simultaneous confidence sets of ranks from ``estimates [models]`` and joint draws around them ``[samples, models]``.

    All pairwise differences are tested at once by the largest standardised deviation of the draws, step by step (Romano
    & Wolf, 2005); a model's rank lies between one plus the models above it and the number of those not below it
    (Mogstad, Romano, Shaikh & Wilhelm, 2024). All true ranks are in their sets with probability ``level``.
    """
    models = len(estimates)
    above = np.zeros((models, models), dtype=bool)
    first, second = np.triu_indices(models, 1)
    if len(first):
        centred = draws - draws.mean(axis=0)
        spread = np.empty(len(first))
        standard = np.empty((len(draws), len(first)), dtype=np.float32)
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
            found = ~apart & (distance > np.quantile(largest, level)) & (distance > 0)
            if not found.any():
                break
            apart |= found
        above[first, second] = apart & (difference > 0)
        above[second, first] = apart & (difference < 0)
    low = 1 + above.sum(axis=0)
    high = models - above.sum(axis=1)
    return RankSets(np.asarray(low, dtype=np.int64), np.asarray(high, dtype=np.int64), above)
