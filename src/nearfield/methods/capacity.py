"""How many documents free vectors of d dimensions can serve if every pair of them must be found: LIMIT's best case."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED = {
    4: 10,
    5: 14,
    6: 19,
    7: 24,
    8: 28,
    10: 36,
    12: 47,
    15: 70,
    20: 120,
    25: 184,
    30: 261,
    35: 352,
    40: 460,
    45: 626,
}
"""Dimensions -> the largest number of documents that was solved with k = 2 (Weller et al., 2025)."""


def published_fit(dimensions: int) -> float:
    """The polynomial that is published with these numbers, for the dimensions between them."""
    return -10.5322 + 4.0309 * dimensions + 0.0520 * dimensions**2 + 0.0037 * dimensions**3


TEMPERATURE = 0.1
RATE, BETAS, EPSILON = 0.01, (0.9, 0.999), 1e-8
"""Of Adam."""


def best_accuracies(
    documents: int,
    dimensions: int,
    *,
    seeds: Sequence[int] = (0,),
    relevant: int = 2,
    patience: int = 1_000,
    longest: int = 100_000,
) -> list[float]:
    """The best top-k accuracy of vectors that are fitted to the queries themselves, of each start: no encoder can do better.

    One query for each combination of ``relevant`` documents; unit vectors of queries and documents; cross-entropy at
    temperature 0.1 on all at once; Adam. A start ends when its loss has not fallen by 1e-5 in ``patience`` steps, and all
    end when one has found every pair. A start may fail where another succeeds: below 1 proves nothing.

    The starts go side by side in one tensor, with the gradient written out, as the calls cost more than the sums.
    """
    import torch

    pairs = torch.tensor(list(itertools.combinations(range(documents), relevant)))
    count = len(pairs)
    vectors = torch.stack([_start(count, documents, dimensions, seed) for seed in seeds])
    wanted = pairs.expand(len(seeds), -1, -1)
    first, second = torch.zeros_like(vectors), torch.zeros_like(vectors)
    active = np.arange(len(seeds))
    lowest, since, best = np.full(len(seeds), np.inf), np.zeros(len(seeds), dtype=int), np.zeros(len(seeds))
    with torch.inference_mode():
        for step in range(1, longest + 1):
            loss, gradient = _loss_and_gradient(vectors, wanted, count)
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
            vectors.addcdiv_(first, scale, value=-RATE / (1 - BETAS[0] ** step))
            vectors.div_(vectors.norm(dim=2, keepdim=True))
            now = loss.double().numpy()
            fell = now < lowest[active] - 1e-5
            lowest[active] = np.where(fell, now, lowest[active])
            since[active] = np.where(fell, 0, since[active] + 1)
            spent = since[active] >= patience
            if step % 50 and not spent.any():
                continue
            queries, corpus = vectors[:, :count], vectors[:, count:]
            top = (queries @ corpus.mT).topk(relevant, dim=2).indices
            hits = (top[..., :, None] == wanted[..., None, :]).any(dim=2).double().mean(dim=(1, 2)).numpy()
            best[active] = np.maximum(best[active], hits)
            if best.max() == 1.0 or spent.all():
                break
            if spent.any():
                unsolved = torch.from_numpy(np.flatnonzero(~spent))
                vectors, first, second, wanted = (part[unsolved] for part in (vectors, first, second, wanted))
                active = active[~spent]
    return [float(one) for one in best]


def _start(queries: int, documents: int, dimensions: int, seed: int) -> Tensor:
    """Random unit vectors [queries + documents, d]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, dimensions, generator=generator) for count in (queries, documents)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def _loss_and_gradient(vectors: Tensor, wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each start: the mean cross-entropy [s] of its wanted documents, and its gradient [s, queries + documents, d]."""
    import torch

    queries, corpus = vectors[:, :count], vectors[:, count:]
    logits = (queries @ corpus.mT).div_(TEMPERATURE)
    right = logits.gather(2, wanted)
    # Cosines over 0.1 are at most 10, so that no largest one need be taken off.
    shares = logits.exp_()
    total = shares.sum(dim=2, keepdim=True)
    loss = (total.log() - right).mean(dim=(1, 2))
    relevant = wanted.shape[2]
    slope = shares.mul_(relevant / total)
    slope.scatter_add_(2, wanted, slope.new_full((1, 1, 1), -1.0).expand_as(right))
    slope.div_(relevant * count * TEMPERATURE)
    return loss, torch.cat([slope @ corpus, slope.mT @ queries], dim=1)


def solvable(documents: int, dimensions: int, seeds: int = 5) -> bool:
    """Whether one of several starts finds all pairs."""
    return max(best_accuracies(documents, dimensions, seeds=range(seeds))) == 1.0


def critical_documents(dimensions: int, seeds: int = 5, start: int = 4) -> int:
    """The largest number of documents that is solved: gallop, bisect, then look a few further, as noise may hide one."""
    low, step = start, 1
    while solvable(low + step, dimensions, seeds):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if solvable(middle, dimensions, seeds) else (low, middle)
    return max([low, *(n for n in range(low + 2, low + 4) if solvable(n, dimensions, seeds))])
