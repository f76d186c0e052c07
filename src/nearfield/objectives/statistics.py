"""The similarities of a batch in blocks, the statistics of a softmax's rows over them, in two ways, and the losses made of these.

A block is queries or documents against queries or documents. Cells that are no candidates are ruled out once, detached, by the
same code for every implementation. Ids are compared by sorting the columns of a tile, so that no matrix of comparisons is made.

``dense_statistics`` is plain torch with the whole matrix of logits, the reference. In tiles memory grows with rows, never with
cells: the forward keeps the logarithm of each row's sum (Rabe and Staats 2021, arXiv 2112.05682; for contrastive losses Inf-CL,
arXiv 2410.17243); the backward makes each tile of logits once more. So four products are made where the whole matrix would take
three. Sums are kept in float32 at least, whatever the precision of the embeddings. A tile of one prefix is made of vectors of
unit length; tiles of several prefixes are made in one pass over the vectors, the product of a shorter prefix being the beginning
of the product of the next. All else that is done with a tile is done by torch, or on CUDA by :mod:`.kernels`. The
algebra from statistics to losses is the same for all, differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from nearfield.objectives.batch import accumulation_dtype, floor, segment_log_sum, segment_sum, tiles

if TYPE_CHECKING:
    from nearfield.objectives.config import FocalConfig

Side = Literal["query", "document", "queue"]

SMALLEST_NORM = 1e-12
"""Shorter vectors are divided by it, as ``torch.nn.functional.normalize`` does."""

PAIRS_AT_ONCE = 4096

CELLS_AT_ONCE = 2048
"""Rows and columns of the tiles in which scores are compared: all implementations compare in the same tiles, so their
scores are the same bits."""


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
        """The slice that picks the lines ``low`` to ``high`` from their side."""
        return self.index[low:high] if self.start is None else slice(self.start + low, self.start + high)


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
        vectors = self.raw[side][which][:, : self.widest].to(self.dtype)
        if self.inverse is not None and len(self.prefixes) == 1:
            return vectors * self.inverse[side][0][which][:, None]
        return vectors

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
    parts = [join.cells(low, high, start) for join in block.joins]
    none = torch.zeros(0, dtype=torch.int64, device=block.rows.index.device)
    row = torch.cat([cells[0] for cells in parts]) if parts else none
    column = torch.cat([cells[1] for cells in parts]) if parts else none
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
class Running:
    """Statistics of r rows over the tiles so far, changed in place."""

    highest: Tensor
    """(r,) the greatest logit."""
    summed: Tensor
    """(r,) sum of the exponentials of logits less the greatest."""
    total: Tensor | None
    """(r,) sum of the logits, and their number, where these are asked for."""
    count: Tensor | None


class TileWork(Protocol):
    """Masks, logits, row statistics and probabilities of a tile of scores. ``factor`` (r,) is what scores are multiplied by to be
    logits, none where they are already; ``limit`` (r,) the greatest score of a candidate."""

    def cells(self, block: Block, low: int, high: int, start: int, stop: int) -> Any:
        """The cells of a tile that ids, labels, sources or the guide rule out, in a form of one's own."""
        ...

    def add(self, tile: Tensor, out: Any, factor: Tensor | None, limit: Tensor | None, running: Running) -> None:
        """Add a tile of scores (r, c) to the statistics of its rows; the tile is spent."""
        ...

    def weigh(
        self,
        tile: Tensor,
        out: Any,
        factor: Tensor | None,
        limit: Tensor | None,
        shift: Tensor,
        weight: Tensor,
        total: Tensor | None,
    ) -> Tensor:
        """Scores -> in place what, times the (r,) weights that come back, is the gradient of the logits.

        ``shift`` is the logarithm of the rows' sums, ``weight`` the gradient of that, ``total`` that of the logits' sum.
        """
        ...


class TorchTiles:
    """By torch operations, on any device."""

    def cells(self, block: Block, low: int, high: int, start: int, stop: int) -> Excluded:
        return excluded_cells(block, low, high, start, stop)

    def add(self, tile: Tensor, out: Excluded, factor: Tensor | None, limit: Tensor | None, running: Running) -> None:
        _finish(tile, out, factor, limit)
        if running.total is not None and running.count is not None:
            candidate = tile > -torch.inf
            running.total.add_(torch.where(candidate, tile, 0).sum(dim=1))
            running.count.add_(candidate.sum(dim=1))
        now = torch.maximum(running.highest, tile.amax(dim=1))
        here = tile.sub_(now[:, None]).exp_().sum(dim=1)
        running.summed.mul_((running.highest - now).exp_()).add_(here)
        running.highest.copy_(now)

    def weigh(
        self,
        tile: Tensor,
        out: Excluded,
        factor: Tensor | None,
        limit: Tensor | None,
        shift: Tensor,
        weight: Tensor,
        total: Tensor | None,
    ) -> Tensor:
        _finish(tile, out, factor, limit)
        if total is None:
            tile.sub_(shift[:, None]).exp_()
            return weight
        candidate = tile > -torch.inf
        tile.sub_(shift[:, None]).exp_().mul_(weight[:, None])
        tile.add_(candidate * total[:, None])
        return torch.ones_like(weight)


def _finish(tile: Tensor, out: Excluded, factor: Tensor | None, limit: Tensor | None) -> None:
    """Scores -> logits in place; cells that are no candidates become minus infinity."""
    if limit is not None:
        over = tile > limit[:, None]
        out = Excluded(out.row, out.column, over if out.mask is None else over | out.mask)
    if factor is not None:
        tile.mul_(factor[:, None])
    out.fill(tile, -torch.inf)


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
    work: TileWork = field(default_factory=TorchTiles)
    """How tiles are worked on."""


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


def dense_statistics(
    problem: SoftmaxInputs, queries: Tensor, documents: Tensor, scales: Mapping[str, Tensor]
) -> Statistics:
    """(Q, d) and (D, d) embeddings, and (R,) one over the temperature for the rows of each block -> statistics."""
    dtype = accumulation_dtype(queries.dtype)
    excluded = {name: excluded_matrix(problem, block) for name, block in problem.blocks.items()}
    pairs: list[Tensor] = []
    tiles: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in problem.blocks}
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
            tiles[name].append(_row_statistics(logits, problem.sums))
    blocks = {
        name: RowStatistics(*(torch.stack(parts) for parts in zip(*each, strict=True))) for name, each in tiles.items()
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
    candidate = logits.detach() > lowest
    return log_sum, torch.where(candidate, logits, 0).sum(dim=1), candidate.sum(dim=1).to(logits.dtype)


def excluded_matrix(problem: SoftmaxInputs, block: Block) -> tuple[Excluded, list[Tensor]]:
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


def blockwise_statistics(
    problem: SoftmaxInputs, queries: Tensor, documents: Tensor, scales: Mapping[str, Tensor]
) -> Statistics:
    """(Q, d) and (D, d) embeddings, and (R,) one over the temperature for the rows of each block -> statistics."""
    pairs, *parts = _Blockwise.apply(queries, documents, problem, *(scales[name] for name in problem.blocks))  # type: ignore[no-untyped-call]
    return Statistics(pairs, {n: RowStatistics(*parts[3 * i : 3 * i + 3]) for i, n in enumerate(problem.blocks)})


class _Blockwise(torch.autograd.Function):
    """(queries, documents, problem, a scale for each block) -> pair scores, and three statistics for each block."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, documents: Tensor, problem: SoftmaxInputs, *scales: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = [problem.vectors.pair_scores(problem.pair_queries, problem.pair_documents)]
        log_sums: list[Tensor] = []
        workspace = Workspace(problem)
        for block, scale in zip(problem.blocks.values(), scales, strict=True):
            results = forward_block(problem, block, scale, workspace)
            outputs += results
            log_sums.append(results[0])
            ctx.mark_non_differentiable(results[2])
        # The embeddings are saved so that a change of them in place is noticed; the problem holds the same memory.
        ctx.save_for_backward(queries, documents, *scales, *log_sums)
        ctx.problem = problem
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        problem: SoftmaxInputs = ctx.problem
        queries, documents, *saved = ctx.saved_tensors
        count = len(problem.blocks)
        scales, log_sums = saved[:count], saved[count:]
        sink = Gradients(problem.vectors)
        sink.add_pairs(problem.pair_queries, problem.pair_documents, gradients[0])
        workspace = Workspace(problem)
        scale_gradients: list[Tensor | None] = []
        for number, block in enumerate(problem.blocks.values()):
            log_sum, total = gradients[1 + 3 * number], gradients[2 + 3 * number]
            wanted = ctx.needs_input_grad[3 + number]
            scale_gradient = backward_block(
                problem, block, scales[number], log_sums[number], (log_sum, total), sink, workspace, wanted
            )
            scale_gradients.append(scale_gradient if wanted else None)
        return sink.result("query", queries), sink.result("document", documents), None, *scale_gradients


class Workspace:
    """Tiles that are made once: new memory for each would cost as much as what is done in it."""

    def __init__(self, problem: SoftmaxInputs) -> None:
        vectors = problem.vectors
        rows = max((len(block.rows) for block in problem.blocks.values()), default=0)
        columns = max((len(block.columns) for block in problem.blocks.values()), default=0)
        device, size = vectors.raw["query"].device, min(rows, problem.tile) * min(columns, problem.tile)
        self.flat = torch.empty(len(vectors.prefixes) + 2, size, dtype=vectors.dtype, device=device)

    def tile(self, number: int, rows: int, columns: int) -> Tensor:
        """(rows, columns) contiguous."""
        return self.flat[number, : rows * columns].view(rows, columns)


def _factor(block: Block, scale: Tensor) -> Tensor:
    """(R,) what scores are multiplied by to be logits."""
    return scale + block.hardness if block.hardness else scale


def _logits(
    problem: SoftmaxInputs,
    block: Block,
    rows: Tensor,
    edges: tuple[int, int, int, int],
    factor: Tensor,
    work: Workspace,
) -> tuple[list[Tensor], Tensor]:
    """The products of each prefix, the first of them logits already where that is possible; and the column vectors."""
    low, high, start, stop = edges
    vectors = problem.vectors
    columns = vectors.take(block.columns.side, block.columns.part(start, stop))
    out = [work.tile(number, high - low, stop - start) for number in range(len(vectors.prefixes))]
    vectors.products(rows * factor[:, None] if _folds(vectors, block) else rows, columns, out)
    return out, columns


def _folds(vectors: Vectors, block: Block) -> bool:
    """Whether rows can be scaled before the product: not where scores are compared with a limit, or norms come after it."""
    return len(vectors.prefixes) == 1 and block.limit is None


def forward_block(
    problem: SoftmaxInputs, block: Block, scale: Tensor, work: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """(M, R) logarithms of sums; sums and numbers of logits, of no row where these are not asked for."""
    vectors, lowest, do = problem.vectors, floor(problem.vectors.dtype), problem.work
    shape = (len(vectors.prefixes), len(block.rows))
    highest, summed = scale.new_full(shape, lowest), scale.new_zeros(shape)
    total, count = (scale.new_zeros(shape if problem.sums else 0) for _ in range(2))
    factors, folded = _factor(block, scale), _folds(vectors, block)
    for low, high in tiles(len(block.rows), problem.tile):
        part = block.rows.part(low, high)
        rows, factor = vectors.take(block.rows.side, part), factors[low:high]
        for start, stop in tiles(len(block.columns), problem.tile):
            products, _ = _logits(problem, block, rows, (low, high, start, stop), factor, work)
            scale_products(vectors, block, part, block.columns.part(start, stop), products)
            out = do.cells(block, low, high, start, stop)
            for number, tile in enumerate(products):
                sums = (total[number, low:high], count[number, low:high]) if problem.sums else (None, None)
                running = Running(highest[number, low:high], summed[number, low:high], *sums)
                do.add(tile, out, None if folded else factor, _limit(block, number, low, high), running)
    log_sum = torch.where(summed > 0, highest + summed.log(), lowest)
    return log_sum, total, count


def _limit(block: Block, number: int, low: int, high: int) -> Tensor | None:
    return None if block.limit is None else block.limit[number, low:high]


def backward_block(
    problem: SoftmaxInputs,
    block: Block,
    scale: Tensor,
    log_sum: Tensor,
    upstreams: tuple[Tensor, Tensor],
    sink: Gradients,
    work: Workspace,
    scale_wanted: bool,
) -> Tensor:
    """Add a block's share to the gradients of the vectors; the gradient of its scale, (R,).

    ``upstreams`` are the gradients of the logarithms of the sums, and of the sums of logits.
    """
    upstream, upstream_total = upstreams
    vectors, scale_gradient = problem.vectors, torch.zeros_like(scale)
    factors, folded = _factor(block, scale), _folds(vectors, block)
    # The factor from the gradient of a logit to that of its score.
    slopes = factors if block.hardness_gradient else scale
    # A row without candidates has no cell that is not minus infinity: any shift will do.
    shift = torch.where(log_sum > floor(vectors.dtype), log_sum, 0)
    segments, do = vectors.segments(), problem.work

    def weigh(tile: Tensor, number: int, low: int, high: int, out: Any) -> Tensor:
        total = upstream_total[number, low:high] if problem.sums else None
        limit, factor = _limit(block, number, low, high), None if folded else factors[low:high]
        return do.weigh(tile, out, factor, limit, shift[number, low:high], upstream[number, low:high], total)

    for low, high in tiles(len(block.rows), problem.tile):
        part = block.rows.part(low, high)
        rows, factor = vectors.take(block.rows.side, part), factors[low:high]
        gradient = torch.zeros_like(rows)
        for start, stop in tiles(len(block.columns), problem.tile):
            where = block.columns.part(start, stop)
            products, columns = _logits(problem, block, rows, (low, high, start, stop), factor, work)
            out = do.cells(block, low, high, start, stop)
            column_gradient = sink.of_columns(block, start, stop)
            if len(segments) == 1:
                tile = products[0]
                weight = weigh(tile, 0, low, high, out)
                back = tile @ columns
                if scale_wanted:
                    scale_gradient[low:high] += weight * (back * rows).sum(dim=1)
                weight = weight * slopes[low:high]
                gradient.addcmul_(back, weight[:, None])
                sink.add_columns(column_gradient, tile, rows * weight[:, None])
                continue
            running = work.tile(len(segments), high - low, stop - start)
            tile = work.tile(len(segments) + 1, high - low, stop - start)
            for number in reversed(range(len(segments))):
                product = products[number]
                torch.mul(product, 1, out=tile)
                _scale_one(vectors, block, part, where, number, tile)
                weight = weigh(tile, number, low, high, out)
                tile.mul_((weight * slopes[low:high])[:, None])
                _scale_one(vectors, block, part, where, number, tile)
                dots = product.mul_(tile)
                by_row = dots.sum(dim=1)
                if scale_wanted:
                    scale_gradient[low:high] += by_row / slopes[low:high]
                sink.add_dots(block, number, part, where, by_row, dots.sum(dim=0))
                if number == len(segments) - 1:
                    torch.mul(tile, 1, out=running)
                else:
                    running.add_(tile)
                first, last = segments[number]
                gradient[:, first:last].addmm_(running, columns[:, first:last])
                sink.add_columns(column_gradient, running, rows, first, last)
        sink.add(block.rows.side, part, gradient)
    return scale_gradient


def _scale_one(
    vectors: Vectors, block: Block, rows: Tensor | slice, columns: Tensor | slice, number: int, tile: Tensor
) -> None:
    left, right = vectors.factors(block.rows.side, rows), vectors.factors(block.columns.side, columns)
    if left is not None and right is not None:
        tile.mul_(left[number][:, None]).mul_(right[number][None, :])


class Gradients:
    """Sums of gradients of both sides: of the unit vectors where there is one prefix, else of the vectors as they are,
    beside the dot product of each prefix with its gradient."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.sums: dict[Side, Tensor] = {
            side: torch.zeros(raw.shape, dtype=vectors.dtype, device=raw.device)
            for side, raw in vectors.raw.items()
            if side != "queue"
        }
        several = vectors.inverse is not None and len(vectors.prefixes) > 1
        self.dots = {side: torch.zeros_like(one) for side, one in vectors.inverse.items()} if several else None  # type: ignore[union-attr]

    def of_columns(self, block: Block, start: int, stop: int) -> tuple[Tensor, Tensor | slice] | None:
        """Where the gradient of a tile's columns goes; nowhere for those of earlier steps."""
        if block.columns.side == "queue":
            return None
        return self.sums[block.columns.side][:, : self.vectors.widest], block.columns.part(start, stop)

    def add_columns(
        self,
        target: tuple[Tensor, Tensor | slice] | None,
        tile: Tensor,
        rows: Tensor,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        """Add (r, c) times (r, w) to the columns."""
        if target is None:
            return
        sums, which = target
        if isinstance(which, slice):
            sums[which, first:last].addmm_(tile.T, rows[:, first:last])
        else:
            sums[:, first:last].index_add_(0, which, tile.T @ rows[:, first:last])

    def add(self, side: Side, which: Tensor | slice, values: Tensor) -> None:
        """Add (n, w) to the lines of a side."""
        sums = self.sums[side][:, : values.shape[1]]
        if isinstance(which, slice):
            sums[which] += values
        else:
            sums.index_add_(0, which, values)

    def add_dots(
        self,
        block: Block,
        number: int,
        rows: Tensor | slice,
        columns: Tensor | slice,
        by_row: Tensor,
        by_column: Tensor,
    ) -> None:
        """Add a tile's dot products of a prefix with its gradient."""
        if self.dots is None:
            return
        for side, which, values in ((block.rows.side, rows, by_row), (block.columns.side, columns, by_column)):
            if side == "queue":
                continue
            line = self.dots[side][number]
            if isinstance(which, slice):
                line[which] += values
            else:
                line.index_add_(0, which, values)

    def add_pairs(self, queries: Tensor, documents: Tensor, upstream: Tensor) -> None:
        """Add the gradient of (M, N) scores of pairs."""
        vectors = self.vectors
        for low, high in tiles(len(queries), PAIRS_AT_ONCE):
            left_index, right_index = queries[low:high], documents[low:high]
            left, right = vectors.take("query", left_index), vectors.take("document", right_index)
            weight = upstream[:, low:high]
            factors = [vectors.factors("query", left_index), vectors.factors("document", right_index)]
            if factors[0] is not None and factors[1] is not None:
                weight = weight * factors[0] * factors[1]
            parts = torch.stack([(left[:, a:b] * right[:, a:b]).sum(dim=1) for a, b in vectors.segments()])
            if self.dots is not None:
                for number, dots in enumerate(parts.cumsum(dim=0) * weight):
                    self.dots["query"][number].index_add_(0, left_index, dots)
                    self.dots["document"][number].index_add_(0, right_index, dots)
            # A segment belongs to its own prefix and to all longer ones.
            running = weight.flip(0).cumsum(dim=0).flip(0)
            widths = torch.tensor([b - a for a, b in vectors.segments()], device=left.device)
            each = running.repeat_interleave(widths, dim=0, output_size=vectors.widest).T
            self.add("query", left_index, each * right)
            self.add("document", right_index, each * left)

    def result(self, side: Side, like: Tensor) -> Tensor:
        """The gradient of the raw vectors of a side."""
        vectors, sums = self.vectors, self.sums.pop(side)
        if vectors.inverse is not None:
            for low, high in tiles(len(sums), PAIRS_AT_ONCE):
                self._through_norms(side, slice(low, high), sums)
        return sums.to(like.dtype)

    def _through_norms(self, side: Side, which: slice, sums: Tensor) -> None:
        """In place: the norm of a prefix turns gradients that lie along it into nothing."""
        vectors = self.vectors
        assert vectors.inverse is not None
        inverse = vectors.inverse[side][:, which]
        # A vector too short to have a direction is divided by a constant.
        moves = inverse < 1 / SMALLEST_NORM
        if self.dots is None:
            unit = vectors.take(side, which)
            target = sums[which, : vectors.widest]
            along = ((unit * target).sum(dim=1) * moves[0])[:, None]
            target.sub_(unit * along).mul_(inverse[0][:, None])
            return
        raw = vectors.take(side, which)
        share = self.dots[side][:, which] * inverse.square() * moves
        for number, width in enumerate(vectors.prefixes):
            sums[which, :width] -= raw[:, :width] * share[number][:, None]


@dataclass(frozen=True)
class CandidateSums:
    """Candidates of n softmaxes, for M prefixes."""

    log_sum: Tensor
    """(M, n)."""
    total: Tensor
    """(M, n) sum of logits, and their number; of no row where nobody asks."""
    count: Tensor

    @classmethod
    def of(cls, statistics: RowStatistics) -> CandidateSums:
        """The candidates of a block."""
        return cls(statistics.log_sum, statistics.total, statistics.count)

    def pick(self, index: Tensor) -> CandidateSums:
        """The softmaxes with these numbers."""
        has = self.total.shape == self.log_sum.shape
        return CandidateSums(
            self.log_sum[:, index],
            self.total[:, index] if has else self.total,
            self.count[:, index] if has else self.count,
        )

    def gather(self, row: Tensor, rows: int) -> CandidateSums:
        """Join softmaxes that belong to the same row."""
        has = self.total.shape == self.log_sum.shape
        return CandidateSums(
            segment_log_sum(self.log_sum, row, rows),
            segment_sum(self.total, row, rows) if has else self.total,
            segment_sum(self.count, row, rows) if has else self.count,
        )


def join(groups: Sequence[CandidateSums]) -> CandidateSums:
    """All candidates of several groups."""
    return reduce(
        lambda a, b: CandidateSums(torch.logaddexp(a.log_sum, b.log_sum), a.total + b.total, a.count + b.count), groups
    )


def listed(logits: Tensor, candidate: Tensor, row: Tensor, rows: int, sums: bool) -> CandidateSums:
    """(M, E) logits, whether they are candidates, and (E,) the row that each belongs to -> their group."""
    filled = logits.masked_fill(~candidate, floor(logits.dtype))
    none = logits.new_zeros(0)
    return CandidateSums(
        segment_log_sum(filled, row, rows),
        segment_sum(logits.masked_fill(~candidate, 0), row, rows) if sums else none,
        segment_sum(candidate.to(logits.dtype), row, rows) if sums else none,
    )


@dataclass(frozen=True)
class Positives:
    """The positive side of n softmaxes."""

    log_sum: Tensor
    """(M, n) logarithm of the sum of the exponentials of the positives' logits."""
    total: Tensor
    """(M, n) sum of their logits."""
    count: Tensor
    """(n,) their number."""


def losses(positives: Positives, negatives: CandidateSums, smoothing: float, focal: FocalConfig | None) -> Tensor:
    """(M, n) losses of softmaxes over the positives and the negatives."""
    # Not the difference of two logarithms, which loses the digits of a small loss.
    plain = -functional.logsigmoid(positives.log_sum - negatives.log_sum)
    loss = plain
    if smoothing:
        mean = (positives.total + negatives.total) / (positives.count + negatives.count)
        loss = plain + smoothing * (positives.log_sum - mean)
    return loss if focal is None else loss * focal_weight(plain, focal)


def focal_weight(loss: Tensor, focal: FocalConfig) -> Tensor:
    """(1 - probability of the positive) ** gamma from -log of that probability."""
    if not focal.gamma:
        return torch.ones_like(loss)
    if focal.detach:
        return (-torch.expm1(-loss.detach())).pow(focal.gamma)
    # Below one, the power has no slope at 0; there the weight times the loss has slope 0.
    solved = loss.detach() <= 0
    missed = -torch.expm1(-loss.masked_fill(solved, 1))
    return torch.where(solved, 0, missed.pow(focal.gamma))
