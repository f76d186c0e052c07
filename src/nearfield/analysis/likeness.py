"""How alike two models are: CKA, shared neighbours, ranks of shared neighbours, and whether one can read the other's index."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from nearfield.analysis.geometry import Floats, nearest, normalised


def cka(first: Floats, second: Floats) -> float:
    """Linear centred kernel alignment (Kornblith et al., 2019) of two models' vectors of the same texts, ``[n, d1]``, ``[n, d2]``.

    1 for vectors that differ by rotation, shift and scale only. With few texts for the dimensions it rises towards 1
    whatever the models are: then a warning is given.
    """
    if len(first) != len(second):
        raise ValueError("CKA compares two models on the same texts")
    if len(first) < 4 * max(first.shape[1], second.shape[1]):
        warnings.warn("CKA is too large for so few texts: give four times as many as dimensions", stacklevel=2)
    x, y = first - first.mean(axis=0), second - second.mean(axis=0)
    cross = np.linalg.norm(y.T @ x) ** 2
    return float(cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def jaccard(first: Sequence[int], second: Sequence[int]) -> float:
    """|A and B| / |A or B| of two lists of neighbours; 1 for two empty ones."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else 1.0


def rank_similarity(first: Sequence[int], second: Sequence[int]) -> float:
    """How alike the ranks of shared neighbours are: 1 for equal lists, 0 where none is shared.

    It does not see how many are shared: to be read beside :func:`jaccard`.
    """
    places = {item: rank for rank, item in enumerate(second, start=1)}
    shared = [(rank, places[item]) for rank, item in enumerate(first, start=1) if item in places]
    if not shared:
        return 0.0
    harmonic = sum(1 / i for i in range(1, len(shared) + 1))
    return sum(2 / ((1 + abs(a - b)) * (a + b)) for a, b in shared) / harmonic


def neighbour_likeness(first: Floats, second: Floats, k: int = 10) -> tuple[float, float]:
    """Mean Jaccard@k and rank similarity@k of two models' neighbours by cosine, over the same texts."""
    lists = []
    for vectors in (first, second):
        unit = normalised(vectors)
        lists.append(nearest(unit, unit, k, itself=True)[1].tolist())
    pairs = list(zip(*lists, strict=True))
    return (
        float(np.mean([jaccard(a, b) for a, b in pairs])),
        float(np.mean([rank_similarity(a, b) for a, b in pairs])),
    )


def procrustes(source: Floats, target: Floats) -> Floats:
    """The orthogonal map ``[d1, d2]`` that brings ``source @ map`` nearest to ``target`` (Schoenemann, 1966)."""
    left, _, right = np.linalg.svd(source.T @ target, full_matrices=False)
    return np.asarray(left @ right, dtype=np.float64)


def paired_audit(source: Floats, target: Floats, known: int) -> float:
    """The share of texts of one space that are found in another by a map from ``known`` leaked pairs: first hit, the rest.

    What it says: vectors alone can be matched to texts once some pairs are known. A low share is no proof of safety.
    """
    if not 0 < known < len(source):
        raise ValueError("some pairs must be known, and some left to find")
    mapped = normalised(source[known:] @ procrustes(source[:known], target[:known]))
    others = normalised(target[known:])
    found = (mapped @ others.T).argmax(axis=1)
    return float((found == np.arange(len(others))).mean())


def compatibility(matrix: Floats) -> tuple[float, float]:
    """Average compatibility and accuracy (CoReS) of scores M[t, k]: queries by version t, documents by version k <= t.

    The share of older indexes that the newer model reads at least as well as their own model did, and the mean of the
    lower triangle with its diagonal.
    """
    versions = len(matrix)
    pairs = [(t, k) for t in range(versions) for k in range(t)]
    kept = float(np.mean([matrix[t, k] >= matrix[k, k] for t, k in pairs])) if pairs else 1.0
    return kept, float(np.mean([matrix[t, k] for t in range(versions) for k in range(t + 1)]))
