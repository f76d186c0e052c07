"""The shape of embeddings ``[n, d]``: isotropy, spectrum, intrinsic dimension, hubs, the plane; and what it says in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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


# The figures of models, and what they say

VERSION = 2
NEIGHBOURS = 10
DRAWN = 800
"""Texts of the map, at most: so that the page stays small and its points can be told apart."""
LETTERS = 160
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)


@dataclass(frozen=True)
class Geometry:
    """One model's figures. ``truncation`` is control -> [(dimensions, share of the ten neighbours that is kept)]."""

    dimensions: int
    iso_score: float
    average_cosine: float
    partition_ratio: float
    effective_rank: float
    two_nn: float
    abid: float
    uniformity: float
    hub_skewness: float
    largest_hub: int
    orphans: float
    spectrum: tuple[float, ...]
    """Share of the variance of each principal axis, largest first."""
    truncation: dict[str, list[tuple[int, float]]]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """The texts in the plane: a label and the first words of each, and each model's points and the variance they hold."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    points: tuple[tuple[tuple[float, float], ...], ...]
    shares: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Checked:
    """Texts that a model takes for the same, and the effect of length, with the sentences that say so."""

    duplicates: NearDuplicates
    length: LengthBias
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """Geometry of each model, and of each pair how alike they are (square tables in the order of ``models``).

    ``sweep`` is k -> the table of Jaccard@k. Tables that need texts, questions or a file are empty where these were not given;
    ``extras`` holds those that a caller adds: ``search``, ``versions``, ``associations``, ``rankability``.
    """

    texts: int
    models: tuple[str, ...]
    geometry: tuple[Geometry, ...]
    cka: tuple[tuple[float, ...], ...] = ()
    jaccard: tuple[tuple[float, ...], ...] = ()
    rank_similarity: tuple[tuple[float, ...], ...] = ()
    sentences: tuple[str, ...] = ()
    sweep: dict[int, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    drawing: Drawing | None = None
    checks: tuple[Checked, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of ``--json``."""
        return {"version": VERSION, **asdict(self)}


def analyse(
    vectors: Mapping[str, NDArray[Any]],
    *,
    seed: int = 0,
    texts: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Analysis:
    """Analyse models' vectors ``[texts, dimensions]`` of the same texts, model -> vectors.

    With the texts themselves, near-duplicates and length are looked at and a map is drawn, coloured by ``labels``.
    """
    names = tuple(vectors)
    arrays = [np.asarray(vectors[name], dtype=np.float64) for name in names]
    sizes = {len(array) for array in arrays}
    if len(sizes) != 1 or min(sizes) < 4 * NEIGHBOURS:
        raise ValueError(f"all models must have vectors of the same texts, at least {4 * NEIGHBOURS} of them")
    shapes = tuple(_geometry(name, array, seed) for name, array in zip(names, arrays, strict=True))
    return Analysis(
        len(arrays[0]),
        names,
        shapes,
        drawing=None if texts is None else _drawing(arrays, texts, labels or ["text"] * len(texts), seed),
        checks=() if texts is None else tuple(_checked(n, v, texts, seed) for n, v in zip(names, arrays, strict=True)),
    )


def _drawing(arrays: Sequence[Floats], texts: Sequence[str], labels: Sequence[str], seed: int) -> Drawing:
    """At most ``DRAWN`` of the texts; the axes are those of all of them."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(texts))[:DRAWN]).tolist()
    planes = [plane(array) for array in arrays]
    return Drawing(
        tuple(labels[row] for row in rows),
        tuple(texts[row][:LETTERS] for row in rows),
        tuple(tuple((float(f"{x:.4g}"), float(f"{y:.4g}")) for x, y in one.points[rows]) for one in planes),
        tuple(one.shares for one in planes),
    )


def _checked(name: str, vectors: Floats, texts: Sequence[str], seed: int) -> Checked:
    same = near_duplicates(vectors, texts)
    length = length_bias(vectors, [len(text.split()) for text in texts], NEIGHBOURS, seed=seed)
    return Checked(
        same,
        length,
        (
            f"{name}: {same.texts} of {len(texts)} texts have another within a cosine of {same.cut:g}; {same.unlike} of them "
            "share fewer than half of their words with it. That may be a paraphrase or a blind spot: read the pair.",
            f"{name}: the length of a text and the mean length of its ten nearest correlate by {length.neighbours:+.2f} "
            f"(p = {length.p:.3g}). Texts of one kind are of one length, so this alone is no fault.",
        ),
    )


def truncation_curves(vectors: Floats, seed: int = 0) -> dict[str, list[tuple[int, float]]]:
    """How many of the ten nearest texts stay, for the first, random and principal dimensions.

    Principal axes are fitted on one half of the texts, and all three are judged on the other half.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(vectors))
    fitted, held = vectors[order[: len(order) // 2]], vectors[order[len(order) // 2 :]]
    d = vectors.shape[1]
    _, _, axes = np.linalg.svd(fitted - fitted.mean(axis=0), full_matrices=True)
    principal = (held - fitted.mean(axis=0)) @ axes.T
    # Cosine neighbours need the origin: the mean, turned with the axes, is put back.
    principal = principal + fitted.mean(axis=0) @ axes.T
    shuffled = held[:, rng.permutation(d)]
    whole = _neighbours(held)
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, array in (("first", held), ("random", shuffled), ("principal", principal)):
        points = []
        for m in sorted({max(2, round(share * d)) for share in SHARES}):
            pairs = zip(_neighbours(array[:, :m]), whole, strict=True)
            points.append((m, float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))))
        curves[name] = points
    return curves


def _neighbours(vectors: Floats) -> list[list[int]]:
    unit = normalised(vectors)
    rows: list[list[int]] = nearest(unit, unit, NEIGHBOURS, itself=True)[1].tolist()
    return rows


def _geometry(name: str, vectors: Floats, seed: int) -> Geometry:
    n, d = vectors.shape
    variances = spectrum(vectors)
    shares = variances / variances.sum() if variances.sum() > 0 else variances
    hubs = hubness(vectors, NEIGHBOURS)
    curves = truncation_curves(vectors, seed)
    half = next(share for m, share in curves["first"] if m >= d / 2)
    iso, cosine = iso_score(vectors), average_cosine(vectors)
    rank, inner = effective_rank(vectors), two_nn(vectors)
    axes = int(np.searchsorted(np.cumsum(shares), 0.9) + 1)
    sentences = [
        f"{name}: two different texts have a cosine of {cosine:.3f} on average. "
        + ("The vectors lie in a narrow cone: thresholds on cosines do not carry over." if cosine > 0.5 else "")
        + "It says nothing of the order of neighbours.",
        f"{name}: {axes} of {d} principal axes hold 90 % of the variance; effective rank {rank:.0f}, IsoScore {iso:.3f}. "
        "An even spectrum is not a better model.",
        f"{name}: neighbourhoods have about {inner:.0f} dimensions (TwoNN, too small on samples of this size).",
        f"{name}: the first half of the dimensions keeps {100 * half:.0f} % of the ten nearest texts "
        f"(random: {100 * next(s for m, s in curves['random'] if m >= d / 2):.0f} %, principal: "
        f"{100 * next(s for m, s in curves['principal'] if m >= d / 2):.0f} %). What it costs a task, nearfield eval --dims tells.",
        f"{name}: one text is among the ten nearest of {hubs.largest} others, and {100 * hubs.orphans:.1f} % of the texts of none.",
    ]
    if n < 10 * d:
        sentences.append(
            f"{name}: {n} texts are few for {d} dimensions: IsoScore and effective rank come out too small."
        )
    return Geometry(
        dimensions=d,
        iso_score=iso,
        average_cosine=cosine,
        partition_ratio=partition_ratio(vectors),
        effective_rank=rank,
        two_nn=inner,
        abid=abid(vectors, min(50, n - 2)),
        uniformity=uniformity(vectors),
        hub_skewness=hubs.skewness,
        largest_hub=hubs.largest,
        orphans=hubs.orphans,
        spectrum=tuple(float(share) for share in shares),
        truncation=curves,
        sentences=tuple(sentences),
    )


# Texts that a model takes for the same, and the effect of a text's length on its vector


@dataclass(frozen=True)
class NearDuplicates:
    """Texts that have another within a cosine of ``cut``; of these, those that share fewer than half of their words."""

    cut: float
    texts: int
    unlike: int
    example: tuple[str, str] | None
    """The nearest pair of texts with few words in common."""


def near_duplicates(vectors: Floats, texts: Sequence[str], cut: float = 0.95) -> NearDuplicates:
    """Are texts that the model can hardly tell apart alike in words? By each text's nearest other text.

    Vectors and texts ``[n]``; words are compared as sets, in lower case.
    """
    unit = normalised(vectors)
    near = nearest(unit, unit, 1, itself=True)[1][:, 0]
    cosines = (unit * unit[near]).sum(axis=1)
    words = [frozenset(re.findall(r"\w+", text.lower())) for text in texts]
    close = np.flatnonzero(cosines >= cut - 1e-9)
    unlike = [i for i in close.tolist() if 2 * len(words[i] & words[near[i]]) < len(words[i] | words[near[i]])]
    best = max(unlike, key=lambda i: cosines[i], default=None)
    return NearDuplicates(cut, len(close), len(unlike), None if best is None else (texts[best], texts[near[best]]))


@dataclass(frozen=True)
class LengthBias:
    """Spearman correlations of a text's length with its mean cosine, with how often it is a neighbour, and with the mean
    length of its ten nearest; ``p`` is of the last one, by permutation of the lengths."""

    cosine: float
    hubness: float
    neighbours: float
    p: float


def length_bias(
    vectors: Floats, lengths: Sequence[int], k: int = 10, permutations: int = 999, seed: int = 0
) -> LengthBias:
    """Does the length of a text decide what is near it? ``lengths`` in words or characters ``[n]``."""
    from scipy import stats

    unit, n = normalised(vectors), len(vectors)
    length = stats.rankdata(np.asarray(lengths, dtype=np.float64))
    mean_cosine = (unit @ unit.sum(axis=0) - (unit**2).sum(axis=1)) / (n - 1)
    near = nearest(unit, unit, k, itself=True)[1]
    counts = np.bincount(near.ravel(), minlength=n)
    rng = np.random.default_rng(seed)

    def of_neighbours(values: Floats) -> float:
        return _correlation(values, values[near].mean(axis=1))

    correlation = of_neighbours(length)
    chance = [abs(of_neighbours(rng.permutation(length))) for _ in range(permutations)]
    p = (1 + sum(value >= abs(correlation) - 1e-12 for value in chance)) / (permutations + 1)
    return LengthBias(
        _correlation(length, stats.rankdata(mean_cosine)),
        _correlation(length, stats.rankdata(counts)),
        correlation,
        float(p),
    )


def _correlation(x: Floats, y: Floats) -> float:
    """Pearson's, 0 where a side does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 1e-12 else 0.0
