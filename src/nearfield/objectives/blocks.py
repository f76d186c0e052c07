"""Blocks of logits: the vectors they are products of, the cells that are no candidates, and which of them a batch asks for.

Cells are ruled out once, detached, by the same code for every implementation. Ids are compared by sorting the columns of a
tile, so that no matrix of comparisons is made. Scores are compared with a row's limit; **a tie is kept**: a candidate is
dropped only where it exceeds the limit by more than ``TIE`` units of the last place, so that a copy of the positive is never
dropped for the order in which a product was summed. ``lay_out`` makes the blocks of a batch by the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch

if TYPE_CHECKING:
    from nearfield.objectives.config import InfoNCEConfig, ScoreMaskConfig


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
        """The slice that picks the lines ``low`` to ``high`` from their side."""
        return self.index[low:high] if self.start is None else slice(self.start + low, self.start + high)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: never half precision."""
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


NONE = -1
_SIDES: dict[str, Side] = {"query": "query", "document": "document", "queue": "queue"}


@dataclass(frozen=True)
class Layout:
    """The softmaxes of this process's R rows: T pairs of a query and a positive, E of a query and an explicit negative."""

    problem: SoftmaxInputs
    rows: Tensor
    """(R,) int64: queries by number."""
    positive_row: Tensor
    """(T,) int64: which of the R rows a positive is of."""
    positives: int
    """T; the pairs of the problem are these, and then the explicit negatives."""
    negative_row: Tensor
    """(E,) int64."""
    negative_kept: Tensor
    """(M, E) bool: whether the explicit negative is a candidate."""


def lay_out(
    config: InfoNCEConfig,
    batch: ContrastiveBatch,
    prefixes: Sequence[int],
    tile: int,
    start: tuple[int, int] = (0, 0),
) -> Layout:
    """The inputs of a softmax over the rows of this process.

    Candidates are the queries and documents from the numbers ``start`` on.
    """
    _check(config, batch)
    rows = batch.local_rows()
    place = batch.row_places()
    mine = place[batch.owner] >= 0
    positives = (mine & batch.is_positive).nonzero().squeeze(1)
    wanted = mine & ~batch.is_positive
    if "query_document" not in config.all_directions:
        wanted = torch.zeros_like(wanted)
    negatives = wanted.nonzero().squeeze(1)
    documents = torch.cat([positives, negatives])
    queries = batch.owner[documents]
    queue = batch.queue
    vectors = Vectors(
        batch.queries,
        batch.documents,
        prefixes,
        config.similarity == "cosine",
        None if queue is None else queue.vectors,
    )
    local = place[batch.owner[positives]]
    parts = _Parts(config, batch, rows, positives, local, place, tile, start)
    # The positive's score is taken once, cut from its graph; all limits come from it.
    scores = vectors.pair_scores(queries, documents) if config.score_mask else None
    if scores is not None:
        parts.set_scores(scores[:, : len(positives)])
    if config.guide_mask is not None:
        assert batch.guide_queries is not None and batch.guide_documents is not None
        width = (batch.guide_queries.shape[1],)
        earlier = None if queue is None or queue.guide is None else queue.guide.float()
        guide = Vectors(batch.guide_queries.float(), batch.guide_documents.float(), width, cosine=True, queue=earlier)
        parts.set_guide(guide)
    blocks: dict[str, Block] = {name: parts.block(name) for name in config.all_directions if parts.stands(name)}
    if config.queue and queue is not None and start == (0, 0):
        blocks["query_queue"] = parts.block("query_queue")
    problem = SoftmaxInputs(
        vectors, queries, documents, blocks, config.similarity == "cosine", config.label_smoothing > 0, tile
    )
    kept = parts.keep_negatives(negatives, None if scores is None else scores[:, len(positives) :], len(prefixes))
    return Layout(problem, rows, local, len(positives), place[batch.owner[negatives]], kept)


def _check(config: InfoNCEConfig, batch: ContrastiveBatch) -> None:
    if config.guide_mask is not None and (batch.guide_queries is None or batch.guide_documents is None):
        raise BadInputError(
            "guide_mask wants a guide model's embeddings of the batch, and there are none",
            where="objective.guide_mask",
            hint="Remove it, or give guide_queries and guide_documents.",
        )
    queue = batch.queue
    if config.guide_mask is not None and config.queue and queue is not None and queue.guide is None:
        raise BadInputError(
            "guide_mask wants a guide model's embeddings of queued documents too", where="objective.guide_mask"
        )
    if config.mask_same_label and batch.labels is None:
        raise BadInputError(
            "mask_same_label wants labels of the examples, and there are none", where="objective.mask_same_label"
        )


def best_of_rows(scores: Tensor, row: Tensor, count: int) -> Tensor:
    """(M, T) scores and (T,) rows -> (M, count) the greatest of each row; every row has one."""
    best = scores.new_full((len(scores), count), -torch.inf)
    return best.scatter_reduce_(1, row.expand_as(scores), scores, "amax")


class _Parts:
    """Makes the blocks. In a block whose rows are documents these are the positives of this process's queries."""

    def __init__(
        self,
        config: InfoNCEConfig,
        batch: ContrastiveBatch,
        rows: Tensor,
        positives: Tensor,
        positive_row: Tensor,
        place: Tensor,
        tile: int,
        start: tuple[int, int],
    ) -> None:
        self.config, self.batch, self.rows, self.positives = config, batch, rows, positives
        self.positive_row, self.place, self.tile = positive_row, place, tile
        self.start = dict(zip(("query", "document"), start, strict=True))
        self.limits: dict[str, Tensor] = {}
        self.guide: Vectors | None = None
        self.guide_limits: dict[str, Tensor] = {}

    def set_scores(self, positive: Tensor) -> None:
        """(M, T) scores of the positives by the student."""
        assert self.config.score_mask is not None
        best = best_of_rows(positive, self.positive_row, len(self.rows))
        self.limits = {
            "query": limits(best, self.config.score_mask),
            "document": limits(positive, self.config.score_mask),
        }

    def set_guide(self, guide: Vectors) -> None:
        """Take the limits from the guide's scores of the positives."""
        assert self.config.guide_mask is not None
        self.guide = guide
        scores = guide.pair_scores(self.batch.owner[self.positives], self.positives)
        best = best_of_rows(scores, self.positive_row, len(self.rows))
        self.guide_limits = {
            "query": limits(best, self.config.guide_mask)[0],
            "document": limits(scores, self.config.guide_mask)[0],
        }

    def stands(self, name: str) -> bool:
        """Whether the block has any candidates beside the query's own documents."""
        return name != "query_document" or self.config.in_batch_negatives

    def block(self, name: str) -> Block:
        """The block of a direction."""
        side, _, other = name.partition("_")
        columns = self._columns(other)
        config = self.config
        hardness = config.hardness
        hard = hardness is not None and other != "query" and side == "query" and hardness.on != "explicit"
        labels = self._labels() if config.mask_same_label else None
        earlier = self.batch.queue if other == "queue" else None
        sources = None if earlier is None else self.batch.sources
        row_index = self.rows if side == "query" else self.positives
        return Block(
            rows=Lines.of("query" if side == "query" else "document", row_index),
            columns=Lines.of(_SIDES[other], columns),
            joins=self._joins(name, columns),
            row_labels=None if labels is None else labels["query"][self._owner(side)],
            column_labels=None if labels is None else labels[other][columns],
            row_sources=None if sources is None else sources[self._owner(side)],
            column_sources=None if sources is None or earlier is None else earlier.sources[columns],
            guide=None if self.guide is None else Guide(self.guide, self.guide_limits[side]),
            limit=self.limits.get(side),
            hardness=hardness.alpha if hard and hardness is not None else 0.0,
            hardness_gradient=hard and hardness is not None and not hardness.detach,
        )

    def _columns(self, side: str) -> Tensor:
        batch = self.batch
        if side == "queue":
            assert batch.queue is not None
            return torch.arange(len(batch.queue.ids), device=self.rows.device)
        if side == "query":
            return torch.arange(self.start[side], len(batch.queries), device=self.rows.device)
        shared = self.config.shared_negatives
        every = torch.ones_like(batch.is_positive) if shared else batch.is_positive
        start = self.start[side]
        return every[start:].nonzero().squeeze(1) + start

    def _owner(self, side: str) -> Tensor:
        """The query that each row of a block belongs to."""
        return self.rows if side == "query" else self.batch.owner[self.positives]

    def _joins(self, name: str, columns: Tensor) -> list[Join]:
        """Own cells always; cells with a known positive where these are masked."""
        batch, config = self.batch, self.config
        side, _, other = name.partition("_")
        owner = self._owner(side)
        if other == "queue":
            assert batch.queue is not None
            known = batch.known_positives[owner]
            return [self._join(known, batch.queue.ids[columns][:, None])] if config.mask_known_positives else []
        column_owner = columns if other == "query" else batch.owner[columns]
        joins = [self._join(owner[:, None], column_owner[:, None])]
        if not config.mask_known_positives:
            return joins
        if other == "document":
            ids = batch.document_ids[columns][:, None]
            joins.append(self._join(batch.known_positives[owner], ids))
            if side == "document":
                # A copy of the positive is no negative of it, known or not.
                joins.append(self._join(batch.document_ids[self.positives][:, None], ids))
            return joins
        # A query is left out that is known to have the row's positive.
        known = batch.known_positives[columns]
        if side == "document":
            joins.append(self._join(batch.document_ids[self.positives][:, None], known))
            return joins
        joins.append(self._join(self._positive_ids(), known))
        if batch.query_ids is not None:
            joins.append(self._join(batch.query_ids[self.rows][:, None], batch.query_ids[columns][:, None]))
        return joins

    def _join(self, rows: Tensor, columns: Tensor) -> Join:
        return Join(rows, columns, self.tile)

    def _positive_ids(self) -> Tensor:
        """(R, K) ids of the positives that the batch has of each row, padded with -1."""
        row, device = self.positive_row, self.rows.device
        count = torch.bincount(row, minlength=len(self.rows))
        width = int(count.max()) if len(count) else 0
        order = torch.argsort(row, stable=True)
        number = torch.arange(len(row), device=device) - (count.cumsum(0) - count)[row[order]]
        ids = torch.full((len(self.rows), max(1, width)), NONE, dtype=torch.int64, device=device)
        ids[row[order], number] = self.batch.document_ids[self.positives[order]]
        return ids

    def _labels(self) -> dict[str, Tensor]:
        batch = self.batch
        assert batch.labels is not None
        documents = batch.document_labels
        if documents is None:
            documents = torch.where(batch.is_positive, batch.labels[batch.owner], NONE)
        earlier = {} if batch.queue is None else {"queue": batch.queue.labels}
        return {"query": batch.labels, "document": documents, **earlier}

    def keep_negatives(self, negatives: Tensor, scores: Tensor | None, prefixes: int) -> Tensor:
        """(E,) own explicit negatives -> (M, E) bool: those that no mask rules out."""
        batch, config = self.batch, self.config
        owner = batch.owner[negatives]
        row = self.place[owner]
        kept = torch.ones(len(negatives), dtype=torch.bool, device=negatives.device)
        if config.mask_known_positives:
            for known in batch.known_positives.unbind(dim=1):
                kept &= (known[owner] != batch.document_ids[negatives]) | (known[owner] < 0)
        if config.mask_same_label:
            labels = self._labels()
            kept &= (labels["query"][owner] != labels["document"][negatives]) | (labels["query"][owner] < 0)
        if self.guide is not None:
            kept &= self.guide.pair_scores(owner, negatives)[0] <= self.guide_limits["query"][row]
        if scores is None:
            return kept.expand(prefixes, -1)
        return kept & (scores <= self.limits["query"][:, row])
