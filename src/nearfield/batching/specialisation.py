"""How often to draw each data set, by how much it is like what the model is to be good at (SAIL-Embedding, arXiv 2510.12709).

Training draws one data set a batch (``single_source``); its distribution comes from optimal transport between the clusters of
the data sets' vectors. The paper leaves open how many clusters, how they are weighed, the regularisation, and the temperature
of the softmax: clusters weigh what they hold, and the others are settings here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from nearfield.mining.kmeans import spherical_kmeans

Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


def sinkhorn(cost: Floats, rows: Floats, columns: Floats, regularisation: float, iterations: int = 10_000) -> Floats:
    """The transport plan [n, m] between two distributions of least cost less ``regularisation`` times its entropy (Cuturi, 2013)."""
    kernel = np.exp(-(cost - cost.min()) / regularisation)
    left = np.ones(len(rows))
    for _ in range(iterations):
        right = columns / np.maximum(kernel.T @ left, 1e-300)
        left = rows / np.maximum(kernel @ right, 1e-300)
        plan: Floats = left[:, None] * kernel * right[None, :]
        if np.abs(plan.sum(axis=0) - columns).max() < 1e-9:
            break
    return plan


def transport_similarity(
    first: Vectors, second: Vectors, *, clusters: int = 32, regularisation: float = 0.05, seed: int = 0
) -> float:
    """The mean cosine of what is moved onto what: sum of P * C, with P of least cost 1 - C between the sets' centroids."""
    parts = [spherical_kmeans(vectors, min(clusters, len(vectors)), seed=seed) for vectors in (first, second)]
    cosines = parts[0].centroids.astype(np.float64) @ parts[1].centroids.astype(np.float64).T
    masses = [part.sizes / part.sizes.sum() for part in parts]
    return float((sinkhorn(1 - cosines, masses[0], masses[1], regularisation) * cosines).sum())


def specialised_shares(scores: Mapping[str, Mapping[str, float]], temperature: float) -> dict[str, float]:
    """Softmax of each data set's mean score over the sets that it is compared with; a high temperature makes shares even."""
    means = np.array([np.mean(list(of.values())) for of in scores.values()])
    weights = np.exp((means - means.max()) / temperature)
    return dict(zip(scores, (weights / weights.sum()).tolist(), strict=True))
