"""One training step: encode the batch in chunks, take the loss on all embeddings at once, push its gradient back.

The gradient is that of the whole batch, however it is cut: the loss sees embeddings that are cut from their graph, and
its gradient with respect to them is pushed back chunk by chunk (GradCache, arXiv 2101.06983), either through graphs
that were kept or by encoding each chunk a second time. Each chunk draws its dropout from a generator seeded by (seed,
step, chunk), so that the second time needs no saved random state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfield.batching.planner import Rows
from nearfield.data.tokens import TokenCache
from nearfield.objectives.infonce import ContrastiveBatch, LossSum
from nearfield.randomness import derive_seed
from nearfield.training.chunks import Pool

Features = dict[str, Any]
Encode = Callable[[Features], Tensor]
"""Features of a chunk of n texts -> (n, d) embeddings."""


@dataclass(frozen=True)
class Padding:
    """How rows of tokens become a rectangle."""

    token: int
    side: str
    device: torch.device


@dataclass(frozen=True)
class StepResult:
    """What a step found out; the gradient is in the parameters."""

    loss: LossSum
    queries: Tensor
    documents: Tensor
    """(Q, d) and (D, d), detached: the embeddings that the loss saw."""


def chunk_features(pool: Pool, chunk: Rows, tokens: TokenCache, padding: Padding) -> Features:
    """The padded token ids and the attention mask of a chunk, (n, longest) int64 each, and its prompt's length.

    The length is of use to poolings that leave the prompt out; these need chunks of one prompt each.
    """
    rows = [tokens.tables[int(pool.prompts[i])].tokens(int(pool.items[i])) for i in chunk]
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), padding.token, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for line, row in enumerate(rows):
        span = slice(width - len(row), width) if padding.side == "left" else slice(0, len(row))
        ids[line, span] = row
        mask[line, span] = 1
    return {
        "input_ids": torch.from_numpy(ids).to(padding.device),
        "attention_mask": torch.from_numpy(mask).to(padding.device),
        "prompt_length": tokens.tables[int(pool.prompts[chunk[0]])].prompt_length,
    }


def seed_chunk(seed: int, step: int, chunk: int) -> None:
    """Seed the generators that dropout draws from for one chunk of one step."""
    torch.manual_seed(derive_seed(seed, "dropout", step, chunk))


def contrastive_batch(pool: Pool, embeddings: Tensor, known_positives: Sequence[Rows]) -> ContrastiveBatch:
    """The objective's view of a pool's (n, d) embeddings; ``known_positives`` are item rows, one array a query."""
    device = embeddings.device
    width = max((len(known) for known in known_positives), default=0)
    known = np.full((len(known_positives), max(1, width)), -1, dtype=np.int64)
    for line, rows in enumerate(known_positives):
        known[line, : len(rows)] = rows
    return ContrastiveBatch(
        queries=embeddings[torch.from_numpy(pool.queries).to(device)],
        documents=embeddings[torch.from_numpy(pool.documents).to(device)],
        owner=torch.from_numpy(pool.owner).to(device),
        is_positive=torch.from_numpy(pool.is_positive).to(device),
        document_ids=torch.from_numpy(pool.items[pool.documents]).to(device),
        known_positives=torch.from_numpy(known).to(device),
    )


def run_step(
    encode: Encode,
    objective: Callable[[ContrastiveBatch], LossSum],
    backward: Callable[[Tensor], None],
    pool: Pool,
    features: Sequence[Features],
    chunks: Sequence[Rows],
    known_positives: Sequence[Rows],
    *,
    seed: int,
    step: int,
    keep_graph: bool,
) -> StepResult:
    """Leave the gradient of the mean loss of the batch in the parameters (added to what is there).

    ``backward`` is called with scalars, once a chunk, or once in all when the graph is kept. A loss that is not finite
    is returned before anything is pushed back.
    """
    parts: list[Tensor] = []
    for number, feature in enumerate(features):
        seed_chunk(seed, step, number)
        with torch.set_grad_enabled(keep_graph):
            parts.append(encode(feature).float())
    order = torch.from_numpy(np.argsort(np.concatenate(chunks), kind="stable"))
    joined = torch.cat(parts)
    leaf = joined.detach()[order.to(joined.device)].requires_grad_()
    batch = contrastive_batch(pool, leaf, known_positives)
    loss = objective(batch)
    result = StepResult(loss, batch.queries.detach(), batch.documents.detach())
    if not bool(torch.isfinite(loss.total)):
        return result
    (gradient,) = torch.autograd.grad(loss.total / loss.denominator, leaf)
    gradients = [gradient[torch.from_numpy(chunk).to(gradient.device)] for chunk in chunks]
    if keep_graph:
        backward((joined * torch.cat(gradients)).sum())
        return result
    for number, (feature, part) in enumerate(zip(features, gradients, strict=True)):
        seed_chunk(seed, step, number)
        backward((encode(feature).float() * part).sum())
    return result
