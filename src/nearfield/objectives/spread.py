"""The spread-out regulariser in O(B d^2), without a matrix of similarities (Zhang et al. 2017, arXiv 1708.06320)."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from nearfield.objectives.config import SpreadConfig
from nearfield.objectives.vectors import accumulation_dtype


def spread(config: SpreadConfig, vectors: Tensor) -> Tensor:
    """(n, d) -> () the regulariser of one side.

    The sum of all cosines is the squared length of the sum of the vectors; the sum of their squares is the squared norm of
    the (d, d) matrix of second moments. The n cosines of vectors with themselves, which are 1, are taken off.
    """
    unit = functional.normalize(vectors.to(accumulation_dtype(vectors.dtype)), dim=1)
    count, width = unit.shape
    length = unit.square().sum(dim=1)
    pairs = max(1, count * (count - 1))
    mean = (unit.sum(dim=0).square().sum() - length.sum()) / pairs
    second = ((unit.T @ unit).square().sum() - length.square().sum()) / pairs
    return config.mean * mean.square() + config.second_moment * torch.relu(second - 1 / width)
