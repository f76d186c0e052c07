"""A batch and settings -> which queries and documents stand in which block of logits, and what rules cells out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch
from nearfield.objectives.blocks import Block, Guide, Join, Lines, Side, SoftmaxInputs, Vectors, limits

if TYPE_CHECKING:
    from nearfield.objectives.config import InfoNCEConfig

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
    """What is to be computed for the rows of this process.

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
