"""Which cells of the logits are no candidates: decided once, detached, by the same code for every implementation.

Ids are compared by sorting the columns of a tile, so that no matrix of comparisons is made. Scores are compared with a
row's limit; **a tie is kept**: a candidate is dropped only where it exceeds the limit by more than ``TIE`` units of the
last place, so that a copy of the positive is never dropped for the order in which a product was summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfield.objectives.config import ScoreMaskConfig
from nearfield.objectives.vectors import Lines, Vectors

TIE = 32
CELLS_AT_ONCE = 2048
"""Rows and columns of the tiles in which scores are compared: all implementations compare in the same tiles, so their
scores are the same bits."""


def limits(positive: Tensor, config: ScoreMaskConfig) -> Tensor:
    """(M, R) scores of the positives -> (M, R) the greatest score that a candidate may have.

    ``relative`` moves the limit by a share of the score's size, so that a negative score moves it the same way.
    """
    if config.rule == "absolute":
        limit = positive + config.margin
    elif config.rule == "relative":
        limit = positive + positive.abs() * config.margin
    else:
        limit = torch.full_like(positive, config.margin)
    return limit + TIE * torch.finfo(positive.dtype).eps * limit.abs().clamp_min(1)


class Join:
    """Cells whose row and column have an id in common."""

    def __init__(self, rows: Tensor, columns: Tensor, tile: int = CELLS_AT_ONCE) -> None:
        """(R, K) and (C, L) int64 ids; negative ones are none."""
        self.rows, self.columns, self.tile = rows, columns, tile
        self.sorted = [torch.sort(columns[low : low + tile].reshape(-1)) for low in range(0, len(columns), tile)]
        self.width = columns.shape[1]

    def cells(self, low: int, high: int, start: int) -> tuple[Tensor, Tensor]:
        """Rows ``low`` to ``high`` in the column tile that begins at ``start`` -> (n,) rows and columns within the tile."""
        ids, order = self.sorted[start // self.tile]
        wanted = self.rows[low:high].reshape(-1)
        first, last = torch.searchsorted(ids, wanted), torch.searchsorted(ids, wanted, right=True)
        count = (last - first).masked_fill_(wanted < 0, 0)
        hit = count.nonzero().squeeze(1)
        count, first = count[hit], first[hit]
        row = (hit // self.rows.shape[1]).repeat_interleave(count)
        before = count.cumsum(0) - count
        place = torch.arange(len(row), device=row.device) + (first - before).repeat_interleave(count)
        return row, order[place] // self.width


@dataclass(frozen=True)
class Guide:
    """A guide model's verdict on the cells of a block."""

    vectors: Vectors
    limit: Tensor
    """(R,)."""


@dataclass(frozen=True)
class Block:
    """Queries or documents against queries or documents: the candidates that a tile holds."""

    rows: Lines
    columns: Lines
    joins: Sequence[Join]
    row_labels: Tensor | None = None
    """(R,) int64, -1 for none."""
    column_labels: Tensor | None = None
    """(C,) int64, -1 for none."""
    row_sources: Tensor | None = None
    """(R,) int64, -1 for unknown: where it is given, no cell joins two sources."""
    column_sources: Tensor | None = None
    """(C,) int64, -1 for unknown."""
    guide: Guide | None = None
    limit: Tensor | None = None
    """(M, R): the greatest score of a candidate by the student's own score of each prefix."""
    hardness: float = 0.0
    """Added to the logit times the score."""
    hardness_gradient: bool = False
    """Whether the gradient flows through that as well."""


@dataclass
class Excluded:
    """The cells of a tile that are no candidates."""

    row: Tensor
    column: Tensor
    """(n,) int64: cells by number; some may be named twice."""
    mask: Tensor | None
    """(r, c) bool: further cells."""

    def fill(self, tile: Tensor, value: float, scores: Tensor | None = None, limit: Tensor | None = None) -> Tensor:
        """Fill the cells of a tile of logits in place, and those whose score (r, c) is above the limit (r,)."""
        if scores is not None and limit is not None:
            over = scores > limit[:, None]
            tile.masked_fill_(over if self.mask is None else over | self.mask, value)
        elif self.mask is not None:
            tile.masked_fill_(self.mask, value)
        if len(self.row):
            tile[self.row, self.column] = value
        return tile


def excluded_cells(block: Block, low: int, high: int, start: int, stop: int) -> Excluded:
    """Cells of rows ``low`` to ``high`` and columns ``start`` to ``stop`` that ids, labels or the guide rule out."""
    found = [join.cells(low, high, start) for join in block.joins]
    none = torch.zeros(0, dtype=torch.int64, device=block.rows.index.device)
    row = torch.cat([cells[0] for cells in found]) if found else none
    column = torch.cat([cells[1] for cells in found]) if found else none
    mask: Tensor | None = None
    if block.row_labels is not None and block.column_labels is not None:
        labels = block.row_labels[low:high, None]
        mask = (labels == block.column_labels[None, start:stop]) & (labels >= 0)
    if block.row_sources is not None and block.column_sources is not None:
        rows, columns = block.row_sources[low:high, None], block.column_sources[None, start:stop]
        apart = (rows != columns) & (rows >= 0) & (columns >= 0)
        mask = apart if mask is None else mask | apart
    if block.guide is not None:
        vectors = block.guide.vectors
        left = vectors.take(block.rows.side, block.rows.part(low, high))
        right = vectors.take(block.columns.side, block.columns.part(start, stop))
        over = left @ right.T > block.guide.limit[low:high, None]
        mask = over if mask is None else mask | over
    return Excluded(row, column, mask)


def tile_scores(vectors: Vectors, block: Block, low: int, high: int, start: int, stop: int) -> list[Tensor]:
    """(r, c) the student's scores of each prefix, from the product that all implementations compare with limits."""
    rows, columns = block.rows.part(low, high), block.columns.part(start, stop)
    left, right = vectors.take(block.rows.side, rows), vectors.take(block.columns.side, columns)
    out = [left.new_empty(high - low, stop - start) for _ in vectors.prefixes]
    vectors.products(left, right, out)
    scale_products(vectors, block, rows, columns, out)
    return out


def scale_products(
    vectors: Vectors, block: Block, rows: Tensor | slice, columns: Tensor | slice, out: Sequence[Tensor]
) -> None:
    """Products of taken vectors -> similarities, in place."""
    left, right = vectors.factors(block.rows.side, rows), vectors.factors(block.columns.side, columns)
    if left is not None and right is not None:
        for number, target in enumerate(out):
            target.mul_(left[number][:, None]).mul_(right[number][None, :])
