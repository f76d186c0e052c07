"""A softmax over candidates as an implementation sees it, and the statistics of its rows that it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nearfield.objectives.masks import Block
from nearfield.objectives.vectors import Vectors


@dataclass(frozen=True)
class Problem:
    """What is to be computed from the embeddings of a batch."""

    vectors: Vectors
    pair_queries: Tensor
    """(N,) int64: the query of each pair whose score is asked for: own positives, then own explicit negatives."""
    pair_documents: Tensor
    """(N,) int64."""
    blocks: dict[str, Block]
    cosine: bool
    sums: bool
    """Whether the sum and the number of the candidates' logits are asked for."""
    tile: int
    """Rows and columns of a tile."""
    triton: bool = False
    """Whether tiles are worked on by Triton's kernels."""


@dataclass(frozen=True)
class RowStatistics:
    """Of the candidates of a block that are kept, for M prefixes and R rows."""

    log_sum: Tensor
    """(M, R) logarithm of the sum of the exponentials of the logits; ``floor`` where no candidate is kept."""
    total: Tensor
    """(M, R) sum of the logits; of no row where it is not asked for."""
    count: Tensor
    """(M, R) number of candidates; of no row where it is not asked for."""


@dataclass(frozen=True)
class Statistics:
    """All that the loss needs to know of the similarities."""

    pairs: Tensor
    """(M, N) scores of the pairs."""
    blocks: dict[str, RowStatistics]


def floor(dtype: torch.dtype) -> float:
    """The logit of what is no candidate: minus infinity would make a gradient of a row that keeps nothing not a number."""
    return torch.finfo(dtype).min / 2
