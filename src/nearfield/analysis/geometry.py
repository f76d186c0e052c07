"""Isotropy, spectrum, intrinsic dimension, hubness, alignment, uniformity and the plane of embeddings ``[n, d]``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_BLOCK = 1_024


def iso_score(vectors: Floats) -> float:
    """IsoScore (Rudman et al., 2022): 0 where one direction holds all variance, 1 where all hold the same.

    Invariant to rotation, shift and scale. It needs many more points than dimensions: fewer make it too small. Points that
    use k of n axes equally have (k - 1) / (n - 1).
    """
    n = vectors.shape[1]
    if n < 2:
        raise ValueError("IsoScore needs two dimensions or more")
    variances = spectrum(vectors)
    length = np.linalg.norm(variances)
    if length == 0:
        return 0.0
    normal = np.sqrt(n) * variances / length
    defect = np.linalg.norm(normal - 1) / np.sqrt(2 * (n - np.sqrt(n)))
    return float(((n - defect**2 * (n - np.sqrt(n))) ** 2 - n) / (n * (n - 1)))


def spectrum(vectors: Floats) -> Floats:
    """Variances along the principal axes, largest first, one for each dimension ``[d]`` (zeros where n is smaller)."""
    centred = vectors - vectors.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    variances = np.zeros(vectors.shape[1])
    variances[: len(singular)] = singular**2 / max(len(vectors) - 1, 1)
    return variances


def effective_rank(vectors: Floats) -> float:
    """The exponential of the entropy of the singular values' shares (Roy & Vetterli, 2007): from 1 to d."""
    values = np.sqrt(spectrum(vectors))
    shares = values / values.sum() if values.sum() > 0 else np.array([1.0])
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def average_cosine(vectors: Floats) -> float:
    """The mean cosine of two different rows: 0 for directions that are spread evenly, near 1 for a narrow cone."""
    unit = normalised(vectors)
    total, n = unit.sum(axis=0), len(unit)
    return float((total @ total - (unit**2).sum()) / (n * (n - 1)))


def partition_ratio(vectors: Floats) -> float:
    """min Z(c) / max Z(c), Z(c) = sum exp(c . w) over the eigenvectors c of W'W and their opposites: 1 is isotropic.

    From Mu & Viswanath (2018); an eigenvector has no sign, so both are taken. Depends on the vectors' scale.
    """
    _, axes = np.linalg.eigh(vectors.T @ vectors)
    products = vectors @ np.concatenate([axes, -axes], axis=1)
    peak = products.max(axis=0)
    logs = peak + np.log(np.exp(products - peak).sum(axis=0))
    return float(np.exp(logs.min() - logs.max()))


def normalised(vectors: Floats) -> Floats:
    """Rows of unit length; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0), dtype=np.float64)


def nearest(vectors: Floats, others: Floats, k: int, *, itself: bool) -> tuple[Floats, NDArray[np.int64]]:
    """Euclidean distances and row numbers of the k nearest of ``others`` to each row, ``[n, k]``, nearest first.

    ``itself`` says that both are the same rows, of which none counts as its own neighbour. Equal distances: smaller row
    number first. Exact: the distances are taken from differences, not from the expanded square.
    """
    wanted = min(k, len(others) - int(itself))
    squares = (others**2).sum(axis=1)
    near = np.empty((len(vectors), wanted), dtype=np.int64)
    distance = np.empty((len(vectors), wanted))
    spare = min(wanted + 8, len(others))
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        rough = squares - 2 * block @ others.T
        if itself:
            rough[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf
        candidates = np.sort(np.argpartition(rough, spare - 1, axis=1)[:, :spare], axis=1)
        exact = np.linalg.norm(others[candidates] - block[:, None], axis=2)
        if itself:
            exact[candidates == np.arange(start, start + len(block))[:, None]] = np.inf
        order = np.argsort(exact, axis=1, kind="stable")[:, :wanted]
        near[start : start + len(block)] = np.take_along_axis(candidates, order, axis=1)
        distance[start : start + len(block)] = np.take_along_axis(exact, order, axis=1)
    return distance, near


def two_nn(vectors: Floats) -> float:
    """Intrinsic dimension by two neighbours (Facco et al., 2017), the unbiased estimate (N - 1) / sum ln(r2 / r1).

    Equal rows are taken once. Too small on finite samples of many dimensions. Invariant to rotation and scale.
    """
    distinct = np.unique(vectors, axis=0)
    if len(distinct) < 3:
        raise ValueError("TwoNN needs three distinct points")
    distance, _ = nearest(distinct, distinct, 2, itself=True)
    apart = distance[:, 0] > 0
    logs = np.log(distance[apart, 1] / distance[apart, 0])
    return float((apart.sum() - 1) / logs.sum())


def abid(vectors: Floats, k: int = 50) -> float:
    """Intrinsic dimension by the angles between k neighbours (Thordsen & Schubert, 2020), averaged over points.

    k^2 / |U'U|_F^2 for the unit directions U from a point to its neighbours, pairs of a neighbour with itself included.
    """
    distinct = np.unique(vectors, axis=0)
    _, near = nearest(distinct, distinct, k, itself=True)
    dimensions = np.empty(len(distinct))
    for i, neighbours in enumerate(near):
        directions = normalised(distinct[neighbours] - distinct[i])
        gram = directions @ directions.T
        dimensions[i] = len(neighbours) ** 2 / (gram**2).sum()
    return float(dimensions.mean())


@dataclass(frozen=True)
class Hubness:
    """How unevenly rows are neighbours of others: ``skewness`` of the k-occurrences, the largest, the share with none."""

    skewness: float
    largest: int
    orphans: float


def hubness(vectors: Floats, k: int = 10) -> Hubness:
    """Hubness of rows by cosine (Radovanovic et al., 2010): a hub is among the nearest of very many others."""
    unit = normalised(vectors)
    _, near = nearest(unit, unit, k, itself=True)
    counts = np.bincount(near.ravel(), minlength=len(unit)).astype(np.float64)
    spread = counts.std()
    skewness = float((((counts - counts.mean()) / spread) ** 3).mean()) if spread > 0 else 0.0
    return Hubness(skewness, int(counts.max()), float((counts == 0).mean()))


def alignment(first: Floats, second: Floats) -> float:
    """The mean squared distance of unit vectors of pairs that belong together (Wang & Isola, 2020): 0 is best."""
    return float(((normalised(first) - normalised(second)) ** 2).sum(axis=1).mean())


def uniformity(vectors: Floats) -> float:
    """log mean exp(-2 |x - y|^2) over pairs of different rows on the sphere (Wang & Isola, 2020): lower is more even."""
    unit, n = normalised(vectors), len(vectors)
    total = 0.0
    for start in range(0, n, _BLOCK):
        block = unit[start : start + _BLOCK]
        kernel = np.exp(-2 * np.maximum(2 - 2 * block @ unit.T, 0))
        kernel[np.arange(len(block)), np.arange(start, start + len(block))] = 0
        total += float(kernel.sum())
    return float(np.log(total / (n * (n - 1))))


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
