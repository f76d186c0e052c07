"""Other axes than a model's own, to see what its first dimensions are worth: drawn ones, and those of most variance.

Controls of "truncation" (papers on how far embeddings can be cut): a curve of first dimensions says little without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nearfield.evaluation.config import Axes

FITTED_ON = 5_000
"""Texts that principal axes are fitted on, at most."""


@dataclass(frozen=True)
class Rotation:
    """Vectors less ``mean`` on the columns of ``columns``."""

    mean: NDArray[np.float32]
    """(d,)"""
    columns: NDArray[np.float32]
    """(d, k), the most important axis first."""

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, d) -> (n, k)."""
        return np.asarray((vectors - self.mean) @ self.columns, dtype=np.float32)


def random_rotation(dimensions: int, seed: int = 0) -> Rotation:
    """The dimensions in an order that is drawn, the same for all models of this width."""
    order = np.random.default_rng(seed).permutation(dimensions)
    return Rotation(np.zeros(dimensions, dtype=np.float32), np.eye(dimensions, dtype=np.float32)[:, order])


def principal_rotation(vectors: NDArray[np.float32]) -> Rotation:
    """The principal axes of (n, d) vectors, without whitening; there are at most n."""
    exact: NDArray[np.float64] = vectors.astype(np.float64)
    mean = exact.mean(axis=0)
    _, _, axes = np.linalg.svd(exact - mean, full_matrices=False)
    return Rotation(mean.astype(np.float32), axes.T.astype(np.float32))


def held_out_texts() -> list[str]:
    """The texts that principal axes are fitted on: glosses of the training split of the embedded WordNet, texts of no test split."""
    from nearfield.methods.wordnet import glosses_by_split

    distinct = list(dict.fromkeys(glosses_by_split()["train"]))
    return distinct[:: max(1, len(distinct) // FITTED_ON)][:FITTED_ON]


def rotation_of(axes: Axes, dimensions: int, embed: Callable[[Sequence[str]], NDArray[np.float32]]) -> Rotation | None:
    """The axes of a model of this width, of whose texts ``embed`` makes vectors; None for its own."""
    if axes == "random":
        return random_rotation(dimensions)
    return principal_rotation(embed(held_out_texts())) if axes == "principal" else None
