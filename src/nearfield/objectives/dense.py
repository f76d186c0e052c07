"""The statistics by plain torch: the whole matrix of logits, differentiated by autograd. The reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as functional
from torch import Tensor

from nearfield.objectives.masks import Block, Excluded, excluded_cells, tile_scores
from nearfield.objectives.problem import Problem, RowStatistics, Statistics, floor
from nearfield.objectives.vectors import accumulation_dtype, tiles


def dense_statistics(problem: Problem, queries: Tensor, documents: Tensor, scales: Mapping[str, Tensor]) -> Statistics:
    """(Q, d) and (D, d) embeddings, and (R,) one over the temperature for the rows of each block -> statistics."""
    dtype = accumulation_dtype(queries.dtype)
    excluded = {name: excluded_matrix(problem, block) for name, block in problem.blocks.items()}
    pairs: list[Tensor] = []
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in problem.blocks}
    for number, width in enumerate(problem.vectors.prefixes):
        whole = {**problem.vectors.raw, "query": queries, "document": documents}
        sides = {side: vectors[:, :width].to(dtype) for side, vectors in whole.items()}
        if problem.cosine:
            sides = {side: functional.normalize(part, dim=1) for side, part in sides.items()}
        pairs.append((sides["query"][problem.pair_queries] * sides["document"][problem.pair_documents]).sum(dim=1))
        for name, block in problem.blocks.items():
            rows = sides[block.rows.side][block.rows.part(0, len(block.rows))]
            columns = sides[block.columns.side][block.columns.part(0, len(block.columns))]
            cells, over = excluded[name]
            logits = block_logits(rows, columns, scales[name], block)
            cells.fill(logits, floor(dtype))
            if over:
                logits.masked_fill_(over[number], floor(dtype))
            found[name].append(_row_statistics(logits, problem.sums))
    blocks = {
        name: RowStatistics(*(torch.stack(parts) for parts in zip(*each, strict=True))) for name, each in found.items()
    }
    return Statistics(torch.stack(pairs), blocks)


def block_logits(rows: Tensor, columns: Tensor, scale: Tensor, block: Block) -> Tensor:
    """(R, w) and (C, w) vectors -> (R, C) logits, of cells that are no candidates too."""
    if not block.hardness:
        return (rows * scale[:, None]) @ columns.T
    scores = rows @ columns.T
    weight = scores if block.hardness_gradient else scores.detach()
    return scores * scale[:, None] + block.hardness * weight


def _row_statistics(logits: Tensor, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    lowest = floor(logits.dtype)
    if not logits.shape[1]:
        log_sum = logits.sum(dim=1) + lowest
    else:
        log_sum = logits.logsumexp(dim=1).clamp_min(lowest)
    if not sums:
        return log_sum, log_sum.new_zeros(0), log_sum.new_zeros(0)
    kept = logits.detach() > lowest
    return log_sum, torch.where(kept, logits, 0).sum(dim=1), kept.sum(dim=1).to(logits.dtype)


def excluded_matrix(problem: Problem, block: Block) -> tuple[Excluded, list[Tensor]]:
    """The cells that are no candidates, and for each prefix those that its scores rule out, (R, C) bool."""
    shape, vectors = (len(block.rows), len(block.columns)), problem.vectors
    device = block.rows.index.device
    masked = block.guide is not None or block.row_labels is not None or block.row_sources is not None
    mask = torch.zeros(shape, dtype=torch.bool, device=device) if masked else None
    over = [torch.zeros(shape, dtype=torch.bool, device=device) for _ in vectors.prefixes if block.limit is not None]
    cells: list[tuple[Tensor, Tensor]] = []
    for low, high in tiles(shape[0], problem.tile):
        for start, stop in tiles(shape[1], problem.tile):
            part = excluded_cells(block, low, high, start, stop)
            cells.append((part.row + low, part.column + start))
            if mask is not None and part.mask is not None:
                mask[low:high, start:stop] = part.mask
            if block.limit is not None:
                for number, scores in enumerate(tile_scores(vectors, block, low, high, start, stop)):
                    over[number][low:high, start:stop] = scores > block.limit[number, low:high, None]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    row, column = (torch.cat([none, *(cell[side] for cell in cells)]) for side in (0, 1))
    return Excluded(row, column, mask), over
