"""Does a direction of the embedding space order items by an attribute? (2507.03683)"""

from __future__ import annotations

import numpy as np

from nearfield.analysis.geometry import Floats

PENALTIES = tuple(10.0**power for power in range(-3, 5))


def ridge_axis(vectors: Floats, values: Floats, penalties: tuple[float, ...] = PENALTIES) -> Floats:
    """The direction ``[d]`` whose projection predicts an attribute best, by ridge regression.

    The penalty is the one with the least leave-one-out error on these items alone, in closed form; so it may be fitted
    on fewer items than dimensions.
    """
    x = vectors - vectors.mean(axis=0)
    y = values - values.mean()
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    projected = left.T @ y
    best, axis = np.inf, np.zeros(vectors.shape[1])
    for penalty in penalties:
        shrink = singular**2 / (singular**2 + penalty)
        fitted = left @ (shrink * projected)
        leverage = (left**2 * shrink).sum(axis=1) + 1 / len(y)
        error = float((((y - fitted) / np.maximum(1 - leverage, 1e-9)) ** 2).mean())
        if error < best:
            best, axis = error, right.T @ (singular / (singular**2 + penalty) * projected)
    return axis


def extremes_axis(vectors: Floats, values: Floats, count: int = 1) -> Floats:
    """The mean of the ``count`` items with the largest values minus that of the smallest."""
    order = np.argsort(values, kind="stable")
    return np.asarray(vectors[order[-count:]].mean(axis=0) - vectors[order[:count]].mean(axis=0), dtype=np.float64)


def rankability(axis: Floats, vectors: Floats, values: Floats) -> float:
    """Spearman's correlation of the projections on an axis with an attribute, on items that it was not fitted on."""
    from scipy import stats

    return float(stats.spearmanr(vectors @ axis, values).statistic)
