"""Probes: what a linear map can read off embeddings (Xue et al. 2023, arXiv 2305.16536, asks for them)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nearfield.randomness import derive_seed

RIDGE = 1e-2


@torch.no_grad()
def probe_accuracy(vectors: Tensor, labels: Tensor, seed: int | None) -> float:
    """(n, d) embeddings and (n,) labels -> the share of texts whose label a ridge regression finds that was fit on the other half.

    The halves are drawn by the seed within each label. Labels of one text are left out; not a number where fewer than two
    are left.
    """
    names, number, count = torch.unique(labels, return_inverse=True, return_counts=True)
    keep = count[number] > 1
    if int((count > 1).sum()) < 2:
        return math.nan
    vectors, number = vectors[keep].double(), number[keep]
    generator = torch.Generator().manual_seed(derive_seed(seed or 0, "probe"))
    order = torch.randperm(len(vectors), generator=generator).to(number.device)
    order = order[torch.argsort(number[order], stable=True)]
    half = torch.empty(len(order), dtype=torch.int64, device=number.device)
    half[order] = torch.arange(len(order), device=number.device) % 2
    targets = torch.nn.functional.one_hot(number, len(names)).double()
    right = 0
    for one in (0, 1):
        fit, test = half == one, half != one
        centre, mean = vectors[fit].mean(dim=0), targets[fit].mean(dim=0)
        seen = vectors[fit] - centre
        gram = seen.T @ seen
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
        weights = torch.linalg.solve(gram, seen.T @ (targets[fit] - mean))
        right += int((((vectors[test] - centre) @ weights + mean).argmax(dim=1) == number[test]).sum())
    return right / len(vectors)


@torch.no_grad()
def class_scatter(vectors: Tensor, labels: Tensor) -> float:
    """Mean squared distance of embeddings to their label's centre, as a share of that to the common centre.

    1 where labels explain nothing, 0 where all texts of a label are one point. Not a number for fewer than two labels.
    """
    _, number, count = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(count) < 2:
        return math.nan
    vectors = vectors.double()
    centres = vectors.new_zeros(len(count), vectors.shape[1]).index_add(0, number, vectors) / count[:, None]
    within = (vectors - centres[number]).square().sum()
    return float(within / (vectors - vectors.mean(dim=0)).square().sum().clamp_min(1e-24))
