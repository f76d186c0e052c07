"""How alike models are: CKA, shared neighbours and their ranks, and whether versions of a model read each other's index.

Kornblith et al. (2019), CoReS and the audit by known pairs; which figures are set side by side is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfield.analysis.geometry import NEIGHBOURS, Analysis, Floats, nearest, normalised
from nearfield.analysis.search import Questions

SWEEP = (1, 2, 5, 10, 20, 50)
Table = tuple[tuple[float, ...], ...]


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

    A high share means that vectors can be matched to texts once some pairs are known; a low one is no proof of safety.
    """
    if not 0 < known < len(source):
        raise ValueError("some pairs must be known, and some left to find")
    mapped = normalised(source[known:] @ procrustes(source[:known], target[:known]))
    others = normalised(target[known:])
    nearest = (mapped @ others.T).argmax(axis=1)
    return float((nearest == np.arange(len(others))).mean())


def compatibility(matrix: Floats) -> tuple[float, float]:
    """Average compatibility and accuracy (CoReS) of scores M[t, k]: queries by version t, documents by version k <= t.

    The share of older indexes that the newer model reads at least as well as their own model did, and the mean of the
    lower triangle with its diagonal.
    """
    versions = len(matrix)
    pairs = [(t, k) for t in range(versions) for k in range(t)]
    compatible = float(np.mean([matrix[t, k] >= matrix[k, k] for t, k in pairs])) if pairs else 1.0
    return compatible, float(np.mean([matrix[t, k] for t in range(versions) for k in range(t + 1)]))


def add_likeness(analysis: Analysis, vectors: Mapping[str, NDArray[Any]]) -> Analysis:
    """An analysis with how alike its models are, by their vectors ``[texts, dimensions]`` of its texts, model -> vectors."""
    names, arrays = tuple(vectors), [np.asarray(one, dtype=np.float64) for one in vectors.values()]
    size = len(names)
    tables = np.ones((3, size, size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(size):
            for j in range(i + 1, size):
                alike = (cka(arrays[i], arrays[j]), *neighbour_likeness(arrays[i], arrays[j], NEIGHBOURS))
                tables[:, i, j] = tables[:, j, i] = alike
    told = dict.fromkeys(f"{warning.message}." for warning in caught)
    return replace(
        analysis,
        cka=_table(tables[0]),
        jaccard=_table(tables[1]),
        rank_similarity=_table(tables[2]),
        sweep=_sweep(arrays) if size > 1 else {},
        sentences=(*analysis.sentences, *_pair_sentences(names, tables), *told),
    )


def _table(values: Floats) -> Table:
    return tuple(tuple(float(value) for value in row) for row in values)


def _sweep(arrays: Sequence[Floats]) -> dict[int, Table]:
    """Mean Jaccard@k of each pair of models for several k: at small k it is low and noisy, even of like models."""
    widest = min(SWEEP[-1], len(arrays[0]) - 1)
    lists = []
    for array in arrays:
        unit = normalised(array)
        lists.append(nearest(unit, unit, widest, itself=True)[1])
    tables = {}
    for k in (k for k in SWEEP if k <= widest):
        table = np.ones((len(arrays), len(arrays)))
        for i in range(len(arrays)):
            for j in range(i):
                pairs = zip(lists[i][:, :k].tolist(), lists[j][:, :k].tolist(), strict=True)
                table[i, j] = table[j, i] = np.mean([jaccard(a, b) for a, b in pairs])
        tables[k] = _table(table)
    return tables


def _pair_sentences(names: Sequence[str], tables: Floats) -> list[str]:
    return [
        f"{names[i]} and {names[j]}: CKA {tables[0, i, j]:.3f}; of their ten nearest texts they share "
        f"{tables[1, i, j]:.2f} (Jaccard), in like order to {tables[2, i, j]:.2f}. A high CKA does not mean that they "
        "retrieve the same."
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]


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
    compatible, mean = (None, None)
    if None not in lower:
        compatible, mean = compatibility(np.array([[value or 0.0 for value in row] for row in matrix]))
    audits = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            points = audit_curve(models[a].documents, models[b].documents)
            if points:
                audits[f"{a} -> {b}"] = points
    return Versions(names, tuple(tuple(row) for row in matrix), compatible, mean, audits)


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
