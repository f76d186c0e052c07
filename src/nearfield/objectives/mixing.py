"""Negatives made of a query's own explicit negatives in the space of embeddings (KaLM-Embedding-V2, arXiv 2506.20923).

A mixture of unit vectors is shorter than one, so it is brought back to unit length: otherwise it would be an easier negative,
not a harder one. Full vectors are mixed; prefixes are cut from the mixture. What is drawn depends on the step's seed and on
the number of the query in the whole batch, never on how the batch is spread over processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch
from nearfield.objectives.config import MixingConfig
from nearfield.objectives.vectors import accumulation_dtype
from nearfield.randomness import generator


def mixed_scores(
    config: MixingConfig,
    batch: ContrastiveBatch,
    rows: Tensor,
    documents: Tensor,
    row: Tensor,
    prefixes: Sequence[int],
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """(E,) explicit negatives and which of the R rows each is of -> (M, R, S) scores and (R,) bool: who has any.

    Memory is that of the negatives' embeddings once more.
    """
    if batch.draw is None:
        raise BadInputError(
            "mixing draws at random, and the batch has no seed to draw from",
            where="objective.mixing",
            hint="Give the batch a draw.",
        )
    dtype = accumulation_dtype(batch.queries.dtype)
    device, count = rows.device, len(rows)
    each = torch.bincount(row, minlength=count)
    width = max(1, int(each.max()) if len(each) else 0)
    order = torch.argsort(row, stable=True)
    number = torch.arange(len(row), device=device) - (each.cumsum(0) - each)[row[order]]
    table = torch.zeros((count, width), dtype=torch.int64, device=device)
    there = torch.zeros((count, width), dtype=torch.bool, device=device)
    table[row[order], number], there[row[order], number] = documents[order], True

    negatives = batch.documents[table].to(dtype) * there[..., None]
    queries = batch.queries[rows].to(dtype)
    if cosine:
        negatives = functional.normalize(negatives, dim=-1)
        queries = functional.normalize(queries, dim=-1)
    mixtures: list[Tensor] = []
    if config.pairs:
        mixtures.append(_pairs(config.pairs, batch.draw, batch.place(), rows, negatives, each))
    if config.lists:
        scores = (negatives.detach() @ queries.detach()[..., None]).squeeze(-1) / config.list_temperature
        # A row without negatives gets even shares of nothing.
        share = torch.softmax(scores.masked_fill(~there, torch.finfo(dtype).min), dim=1)
        mixtures.append((share[..., None] * negatives).sum(dim=1, keepdim=True))
    mixture = torch.cat(mixtures, dim=1)
    if cosine:
        mixture = functional.normalize(mixture, dim=-1)
    found = []
    for prefix in prefixes:
        left, right = batch.queries[rows][:, :prefix].to(dtype), mixture[..., :prefix]
        if cosine:
            left, right = functional.normalize(left, dim=-1), functional.normalize(right, dim=-1)
        found.append((right @ left[..., None]).squeeze(-1))
    return torch.stack(found), each > 0


def _pairs(pairs: int, seed: int, place: tuple[int, int], rows: Tensor, negatives: Tensor, each: Tensor) -> Tensor:
    """(R, pairs, d): two different negatives of a query where it has two, else its only one."""
    first_query, queries = place
    random = generator(seed, "mixing")
    drawn = random.beta(2, 2, (queries, pairs)), *random.random((2, queries, pairs))
    share, first, second = (torch.from_numpy(part).to(rows.device)[rows + first_query] for part in drawn)
    count = each[:, None]
    one = (first * count).long()
    other = (one + 1 + (second * (count - 1)).long()) % count.clamp_min(1)
    places = torch.arange(len(rows), device=rows.device)[:, None]
    weight = share[..., None].to(negatives.dtype)
    mixed: Tensor = weight * negatives[places, one] + (1 - weight) * negatives[places, other]
    return mixed
