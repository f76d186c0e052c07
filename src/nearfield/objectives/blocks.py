"""Blocks of logits: the vectors they are products of, the cells that are no candidates, and the statistics asked of their rows.

Cells are ruled out once, detached, by the same code for every implementation. Ids are compared by sorting the columns of a
tile, so that no matrix of comparisons is made. Scores are compared with a row's limit; **a tie is kept**: a candidate is
dropped only where it exceeds the limit by more than ``TIE`` units of the last place, so that a copy of the positive is never
dropped for the order in which a product was summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from nearfield.objectives.config import ScoreMaskConfig

Side = Literal["query", "document", "queue"]

SMALLEST_NORM = 1e-12
"""Shorter vectors are divided by it, as ``torch.nn.functional.normalize`` does."""
PAIRS_AT_ONCE = 4096
LOGITS_AT_ONCE = 2**22
"""Logits that a loss holds at once where it makes them again in the backward."""


@dataclass(frozen=True)
class Lines:
    """Some vectors of one side, as rows or columns of a block of logits."""

    side: Side
    index: Tensor
    """(n,) int64."""
    start: int | None
    """Where they begin if they follow each other: then a part of them is a view."""

    @classmethod
    def of(cls, side: Side, index: Tensor) -> Lines:
        """The lines with these numbers."""
        if not len(index):
            return cls(side, index, None)
        first = int(index[0])
        follow = bool((index == torch.arange(first, first + len(index), device=index.device)).all())
        return cls(side, index, first if follow else None)

    def __len__(self) -> int:
        return len(self.index)

    def part(self, low: int, high: int) -> Tensor | slice:
        """What picks the lines ``low`` to ``high`` from their side."""
        return self.index[low:high] if self.start is None else slice(self.start + low, self.start + high)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: never half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles(count: int, size: int) -> Iterator[tuple[int, int]]:
    """The edges of tiles of ``size``, the last one ragged."""
    return ((low, min(low + size, count)) for low in range(0, count, size))


def in_tiles(part: Callable[[Tensor], Tensor], rows: Tensor, columns: int, like: Tensor) -> Tensor:
    """``part`` of some rows at a time; nothing of the size of the logits is kept, the backward makes them again."""
    done = [like.new_zeros(0)]
    for low, high in tiles(len(rows), max(1, LOGITS_AT_ONCE // max(1, columns))):
        done.append(checkpoint(part, rows[low:high], use_reentrant=False))
    return torch.cat(done)


class Vectors:
    """The sides of a batch, cut from their graph, with the norms of their prefixes and no copy of themselves."""

    def __init__(
        self, queries: Tensor, documents: Tensor, prefixes: Sequence[int], cosine: bool, queue: Tensor | None = None
    ) -> None:
        self.raw: dict[Side, Tensor] = {"query": queries.detach(), "document": documents.detach()}
        if queue is not None:
            self.raw["queue"] = queue
        self.prefixes = tuple(prefixes)
        self.widest = max(prefixes)
        self.dtype = accumulation_dtype(queries.dtype)
        self.inverse: dict[Side, Tensor] | None = None
        """(M, n) a side: one over the norm of each prefix; none for dot products."""
        if cosine:
            self.inverse = {side: self._inverse(raw) for side, raw in self.raw.items()}

    def _inverse(self, raw: Tensor) -> Tensor:
        norms = [torch.linalg.vector_norm(raw[:, :width], dim=1, dtype=self.dtype) for width in self.prefixes]
        return torch.stack(norms).clamp_min_(SMALLEST_NORM).reciprocal_()

    def take(self, side: Side, which: Tensor | slice) -> Tensor:
        """(n, widest) vectors; of unit length where there is one prefix and similarity is the cosine."""
        found = self.raw[side][which][:, : self.widest].to(self.dtype)
        if self.inverse is not None and len(self.prefixes) == 1:
            return found * self.inverse[side][0][which][:, None]
        return found

    def factors(self, side: Side, which: Tensor | slice) -> Tensor | None:
        """(M, n) what products of taken vectors are still to be multiplied by, if by anything."""
        if self.inverse is None or len(self.prefixes) == 1:
            return None
        return self.inverse[side][:, which]

    def segments(self) -> list[tuple[int, int]]:
        """Each prefix without the one before it; prefixes ascend."""
        return list(pairwise((0, *self.prefixes)))

    def products(self, rows: Tensor, columns: Tensor, out: Sequence[Tensor]) -> None:
        """(r, w) and (c, w) taken vectors -> products of each prefix into (r, c) buffers, in one pass over the vectors."""
        before: Tensor | None = None
        for (low, high), target in zip(self.segments(), out, strict=True):
            left, right = rows[:, low:high], columns[:, low:high].T
            if before is None:
                torch.mm(left, right, out=target)
            else:
                torch.addmm(before, left, right, out=target)
            before = target

    def pair_scores(self, queries: Tensor, documents: Tensor) -> Tensor:
        """(N,) numbers of queries and of documents -> (M, N) similarities."""
        scores = torch.empty(len(self.prefixes), len(queries), dtype=self.dtype, device=self.raw["query"].device)
        for low, high in tiles(len(queries), PAIRS_AT_ONCE):
            left, right = self.take("query", queries[low:high]), self.take("document", documents[low:high])
            parts = [(left[:, a:b] * right[:, a:b]).sum(dim=1) for a, b in self.segments()]
            scores[:, low:high] = torch.stack(parts).cumsum(dim=0)
            for side, which in (("query", queries), ("document", documents)):
                factors = self.factors(side, which[low:high])  # type: ignore[arg-type]
                if factors is not None:
                    scores[:, low:high] *= factors
        return scores


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
    """A guide model's scores, and the greatest that a candidate may have."""

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


@dataclass(frozen=True)
class SoftmaxInputs:
    """The embeddings of a batch, and what of their similarities a softmax asks for."""

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
    """All that a loss needs of the similarities."""

    pairs: Tensor
    """(M, N) scores of the pairs."""
    blocks: dict[str, RowStatistics]


def floor(dtype: torch.dtype) -> float:
    """The logit of what is no candidate: minus infinity would make a gradient of a row that keeps nothing not a number."""
    return torch.finfo(dtype).min / 2
