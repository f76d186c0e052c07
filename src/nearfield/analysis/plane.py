"""A picture of embeddings in the plane: the two principal axes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nearfield.analysis.geometry import Floats


@dataclass(frozen=True)
class Plane:
    """Points ``[n, 2]`` and the share of the variance that each of the two axes holds."""

    points: Floats
    shares: tuple[float, float]


def plane(vectors: Floats) -> Plane:
    """The projection of vectors ``[n, d]`` on their two principal axes; the largest coordinate of each axis is positive.

    Distances in the plane are never larger than the real ones: what lies together here may be far apart.
    """
    centred = vectors - vectors.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    points = centred @ (axes * signs[:, None]).T
    total = float((singular**2).sum())
    shares = [float(value**2) / total if total > 0 else 0.0 for value in singular[:2]]
    if points.shape[1] < 2:
        points, shares = np.column_stack([points, np.zeros(len(points))]), [*shares, 0.0]
    return Plane(points, (shares[0], shares[1]))
