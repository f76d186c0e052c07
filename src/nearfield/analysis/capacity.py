"""How many documents free vectors of d dimensions can serve if every pair of them must be found: LIMIT's best case."""

from __future__ import annotations

import itertools

import numpy as np

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


def best_accuracy(
    documents: int,
    dimensions: int,
    *,
    seed: int = 0,
    relevant: int = 2,
    rate: float = 0.01,
    patience: int = 1_000,
    longest: int = 100_000,
) -> float:
    """The best top-k accuracy of vectors that are fitted to the queries themselves: no encoder can do better.

    One query for each combination of ``relevant`` documents; unit vectors of queries and documents; cross-entropy at
    temperature 0.1 on all at once; Adam. It stops at accuracy 1, or when the loss has not fallen by 1e-5 in ``patience``
    steps. A start may fail where another succeeds: below 1 proves nothing.
    """  # fmt: skip
    import torch

    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor(list(itertools.combinations(range(documents), relevant)))
    queries = torch.nn.functional.normalize(torch.randn(len(pairs), dimensions, generator=generator), dim=1)
    corpus = torch.nn.functional.normalize(torch.randn(documents, dimensions, generator=generator), dim=1)
    queries.requires_grad_(), corpus.requires_grad_()
    optimizer = torch.optim.Adam([queries, corpus], lr=rate)
    lowest, since, best = np.inf, 0, 0.0
    for step in range(1, longest + 1):
        logits = queries @ corpus.T
        loss = -torch.log_softmax(logits / 0.1, dim=1).gather(1, pairs).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            queries.div_(queries.norm(dim=1, keepdim=True))
            corpus.div_(corpus.norm(dim=1, keepdim=True))
        since += 1
        now = loss.item()
        if now < lowest - 1e-5:
            lowest, since = now, 0
        if step % 50 == 0 or since >= patience:
            with torch.no_grad():
                top = (queries @ corpus.T).topk(relevant, dim=1).indices.sort(dim=1).values
                best = max(best, float((top[:, :, None] == pairs[:, None]).any(dim=1).double().mean()))
            if best == 1.0 or since >= patience:
                break
    return best


def solvable(documents: int, dimensions: int, seeds: int = 5) -> bool:
    """Whether one of several starts finds all pairs."""
    return any(best_accuracy(documents, dimensions, seed=seed) == 1.0 for seed in range(seeds))


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
