"""Association tests of embeddings: WEAT on words, SEAT on sentences (Caliskan et al., 2017; May et al., 2019)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from nearfield.analysis.geometry import Floats, normalised


@dataclass(frozen=True)
class Association:
    """Effect size d (from -2 to 2), the one-sided p of its permutation test, and what there is to know of the test."""

    effect: float
    p: float
    exact: bool
    degenerate: bool
    dropped: int
    """Targets that were left out so that both sides are of one size."""


def weat(
    first: Floats,
    second: Floats,
    a: Floats,
    b: Floats,
    *,
    partitions: int = 100_000,
    rng: np.random.Generator | None = None,
) -> Association:
    """Are targets ``first`` nearer to attributes ``a`` than targets ``second`` are, against attributes ``b``?

    p is the share of equal-sized partitions of the targets whose statistic is at least the observed: all of them where
    that is at most ``partitions``, else ``partitions - 1`` random ones and the observed.
    """
    size = min(len(first), len(second))
    dropped = len(first) + len(second) - 2 * size
    targets = normalised(np.concatenate([first[:size], second[:size]]))
    s = (targets @ normalised(a).T).mean(axis=1) - (targets @ normalised(b).T).mean(axis=1)
    spread = s.std(ddof=1)
    if spread < 1e-12:
        return Association(0.0, 1.0, True, True, dropped)
    effect = float((s[:size].mean() - s[size:].mean()) / spread)
    observed = s[:size].sum() - 1e-12
    exact = math.comb(2 * size, size) <= partitions
    if exact:
        chosen = np.array(list(itertools.combinations(range(2 * size), size)))
        p = float((s[chosen].sum(axis=1) >= observed).mean())
    else:
        rng = rng if rng is not None else np.random.default_rng(0)
        hits = 1
        for start in range(0, partitions - 1, 10_000):
            rows = min(10_000, partitions - 1 - start)
            chosen = np.argsort(rng.random((rows, 2 * size)), axis=1)[:, :size]
            hits += int((s[chosen].sum(axis=1) >= observed).sum())
        p = hits / partitions
    return Association(effect, p, exact, False, dropped)
