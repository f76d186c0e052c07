"""What a model takes for the same, and what the length of a text does to its vector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nearfield.analysis.geometry import Floats, nearest, normalised


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

    found = of_neighbours(length)
    chance = [abs(of_neighbours(rng.permutation(length))) for _ in range(permutations)]
    p = (1 + sum(value >= abs(found) - 1e-12 for value in chance)) / (permutations + 1)
    return LengthBias(
        _correlation(length, stats.rankdata(mean_cosine)), _correlation(length, stats.rankdata(counts)), found, float(p)
    )


def _correlation(x: Floats, y: Floats) -> float:
    """Pearson's, 0 where a side does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 1e-12 else 0.0
