"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) with every mask and weight, whatever the size of the batch.

Read ``InfoNCE._loss`` first: a layout of candidates, statistics of their logits (:mod:`.statistics`), and the algebra from
statistics to losses. ``lay_out`` makes the blocks of a batch by the settings. Scores are compared with a row's limit; **a tie is
kept**: a candidate is dropped only where it exceeds the limit by more than ``TIE`` units of the last place, so that a copy of the
positive is never dropped for the order in which a product was summed.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from nearfield.errors import BadInputError
from nearfield.objectives.batch import (
    ContrastiveBatch,
    LossSum,
    Objective,
    accumulation_dtype,
    floor,
    segment_log_sum,
    segment_sum,
)
from nearfield.objectives.diagnostics import unit_vectors, watched_rows
from nearfield.objectives.statistics import (
    CELLS_AT_ONCE,
    Block,
    CandidateSums,
    Guide,
    Join,
    Lines,
    Positives,
    Side,
    SoftmaxInputs,
    Statistics,
    TileWork,
    TorchTiles,
    Vectors,
    block_logits,
    blockwise_statistics,
    dense_statistics,
    excluded_matrix,
    focal_weight,
    join,
    listed,
    losses,
)
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.objectives.config import Direction, InfoNCEConfig, MixingConfig, ScoreMaskConfig, SpreadConfig


DENSE_CELLS = {"cpu": 2**22, "cuda": 2**26}
"""Up to so many cells of logits, prefixes counted, ``auto`` holds the whole matrix on a device of this type."""


def can_ring(config: InfoNCEConfig) -> bool:
    """Whether the loss needs no more of other processes' embeddings than a row at a time."""
    return config.spread is None


class InfoNCE(Objective):
    """-log softmax of a positive among the documents that are no known positive of the query.

    With ``P_ic`` the softmax over row i's candidates, the gradient of the loss with respect to the logit (i, c) is
    ``(P_ic - 1[c = p_i]) / Q``: each row of it sums to zero.
    """

    tile = CELLS_AT_ONCE
    """Rows and columns of the logits that ``blockwise`` holds at once."""
    task_of: Tensor
    weight_of: Tensor

    def __init__(self, config: InfoNCEConfig, sources: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.config = config
        self.implementation: str = config.implementation
        self.directions, self.joint = config.all_directions, config.joint
        """The similarities that are taken, and whether one softmax is over all of them."""
        sources = sources or {}
        if config.names_sources:
            named = {*config.tasks, *config.source_weights}
            missing = sorted(named - set(sources.values()))
            if missing:
                known = ", ".join(sources.values()) or "none was given to the objective"
                raise BadInputError(f"there is no source {missing[0]!r}", where="objective", hint=f"Sources: {known}.")
        tasks = sorted({config.tasks.get(name, "") for name in sources.values()}) if config.tasks else [""]
        size = max(sources, default=-1) + 1
        # Not part of the state: they follow from the settings.
        self.register_buffer("task_of", torch.zeros(size, dtype=torch.int64), persistent=False)
        self.register_buffer("weight_of", torch.ones(size, dtype=torch.float64), persistent=False)
        for number, name in sources.items():
            self.task_of[number] = tasks.index(config.tasks.get(name, "") if config.tasks else "")
            self.weight_of[number] = config.source_weights.get(name, 1.0)
        self.tasks = tasks
        """Names of the tasks, in the order of their temperatures; the one of no name is of all that are not named."""
        if config.learn_temperature:
            # Of one dimension: sharding backends do not take a scalar.
            self.log_temperature = nn.Parameter(torch.full((len(tasks),), math.log(config.temperature)))

    @property
    def temperature(self) -> Tensor | float:
        """The divisors of similarities, (tasks,); within its bounds where it is learnt."""
        if not self.config.learn_temperature:
            return self.config.temperature
        low, high = (math.log(bound) for bound in self.config.temperature_bounds)
        # At a bound the gradient still flows, so that the temperature can come back.
        clipped = self.log_temperature + (self.log_temperature.clamp(low, high) - self.log_temperature).detach()
        return clipped.exp()

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The summed loss over this process's rows, and the number of rows of all."""
        # Autocast would make the products in half precision, tile by tile.
        with torch.autocast(batch.queries.device.type, enabled=False):
            return self._loss(batch)

    def _loss(self, batch: ContrastiveBatch) -> LossSum:
        config = self.config
        if batch.ring is not None and not can_ring(config):
            raise BadInputError("spread looks at all embeddings of a batch at once, which a ring never does")
        prefixes, weights = self._prefixes(batch)
        layout = lay_out(config, self.directions, batch, prefixes, self.tile)
        scale = self.row_scale(batch, layout.rows)
        statistics = self._statistics(layout, batch, scale)
        rows = self._row_losses(layout, batch, statistics, scale, prefixes)
        loss = (rows * torch.as_tensor(weights, dtype=rows.dtype, device=rows.device)[:, None]).sum(dim=0)
        each = None if batch.weights is None else batch.weights[layout.rows].to(loss.dtype)
        if each is not None or config.source_weights:
            loss = loss * self.row_weights(batch, layout.rows).to(loss.dtype)
        if config.spread is not None:
            term = spread(config.spread, batch.queries) + spread(config.spread, batch.documents)
            # Each process adds its rows' part of it, so that all of them add it once.
            loss = loss + (term if each is None else term * each)
        return LossSum(loss.sum(), batch.denominator(), loss.detach())

    def _prefixes(self, batch: ContrastiveBatch) -> tuple[list[int], list[float]]:
        """Lengths of prefixes, ascending and each once, and what each counts."""
        width = batch.queries.shape[1]
        if self.config.matryoshka is None:
            return [width], [1.0]
        counted: dict[int, float] = {}
        dimensions = self.config.matryoshka.dimensions
        for length, weight in zip(dimensions, self.config.matryoshka.weights or (1.0,) * len(dimensions), strict=True):
            if length > width:
                raise BadInputError(
                    f"a prefix of {length} dimensions is asked of embeddings of {width}",
                    where="objective.matryoshka.dimensions",
                )
            counted[length] = counted.get(length, 0.0) + weight
        return sorted(counted), [counted[length] for length in sorted(counted)]

    def _sources(self, batch: ContrastiveBatch) -> Tensor:
        if batch.sources is None:
            raise BadInputError(
                "tasks and source_weights want the source of each example, and this batch does not say it",
                where="objective",
                hint="Use batches of one source.",
            )
        return batch.sources

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """Masks, weights, temperature and where the gradient comes from."""
        return watch_softmax(self, batch)

    def row_weights(self, batch: ContrastiveBatch, rows: Tensor) -> Tensor:
        """(R,) what each row counts by its example and its source."""
        weights = torch.ones(len(rows), device=rows.device) if batch.weights is None else batch.weights[rows]
        return weights * self.weight_of[self._sources(batch)[rows]] if self.config.source_weights else weights

    def negative_logits(self, scores: Tensor, scales: Tensor) -> Tensor:
        """Scores of own explicit negatives, and of mixtures -> logits."""
        hardness = self.config.hardness
        alpha = hardness.alpha if hardness is not None and hardness.on != "in_batch" else 0.0
        weight = scores if hardness is not None and not hardness.detach else scores.detach()
        return scores * scales + alpha * weight

    def row_scale(self, batch: ContrastiveBatch, rows: Tensor) -> Tensor:
        """(R,) one over the temperature of each row."""
        dtype = accumulation_dtype(batch.queries.dtype)
        temperature = self.temperature
        if not isinstance(temperature, Tensor):
            return torch.full((len(rows),), 1 / temperature, dtype=dtype, device=rows.device)
        inverse = temperature.to(dtype).reciprocal()
        if not self.config.tasks:
            return inverse.expand(len(rows))
        return inverse[self.task_of[self._sources(batch)[rows]]]

    def choose(self, cells: int, device: torch.device) -> str:
        """``dense`` or ``blockwise``, for so many logits on a device.

        ``auto`` takes the matrix as long as it is small: on a CPU where it is not slower than tiles, on a GPU where it takes
        some hundred megabytes, since tiles wait for the CPU there.
        """
        if self.implementation != "auto":
            return self.implementation
        return "dense" if cells <= DENSE_CELLS.get(device.type, DENSE_CELLS["cpu"]) else "blockwise"

    def uses_triton(self, device: torch.device) -> bool:
        """Whether Triton's kernels work on tiles on this device.

        Raises:
            BadInputError: They are asked for by name where they cannot run.
        """
        if self.config.tiles == "torch" or (self.config.tiles == "auto" and device.type != "cuda"):
            return False
        installed = importlib.util.find_spec("triton") is not None
        if self.config.tiles == "auto":
            return installed
        # Triton's interpreter runs kernels anywhere, very slowly: for tests.
        if not installed or (device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"):
            raise BadInputError(
                "Triton's kernels want Triton and a CUDA device", where="objective.tiles", hint="Use tiles: auto."
            )
        return True

    def tile_work(self, device: torch.device) -> TileWork:
        """How tiles are worked on."""
        if not self.uses_triton(device):
            return TorchTiles()
        from nearfield.objectives.kernels import TritonTiles

        return TritonTiles()

    def logits(self, queries: int, positives: int, negatives: int, ranks: int = 1, queued: int = 0) -> int:
        """Cells of the logits of a process, prefixes counted, of a batch with so many texts that is shared by ``ranks``."""
        config = self.config
        columns = {"query": queries, "document": positives + (negatives if config.shared_negatives else 0)}
        rows = {"query": -(-queries // ranks), "document": -(-positives // ranks)}
        cells = 0
        for name in self.directions:
            side, _, other = name.partition("_")
            if name != "query_document" or config.in_batch_negatives:
                cells += rows[side] * columns[other]
        cells += rows["query"] * queued
        return cells * (1 if config.matryoshka is None else len(set(config.matryoshka.dimensions)))

    def _statistics(self, layout: Layout, batch: ContrastiveBatch, scale: Tensor) -> Statistics:
        problem = replace(layout.problem, work=self.tile_work(scale.device))
        scales = {
            name: scale if block.rows.side == "query" else scale[layout.positive_row]
            for name, block in problem.blocks.items()
        }
        if batch.ring is not None:
            from nearfield.objectives.ring import ring_statistics

            def visit(joined: ContrastiveBatch, start: tuple[int, int]) -> SoftmaxInputs:
                laid = lay_out(self.config, self.directions, joined, problem.vectors.prefixes, self.tile, start)
                return replace(laid.problem, work=problem.work)

            return ring_statistics(problem, batch, batch.ring, visit, scales)
        cells = sum(len(block.rows) * len(block.columns) for block in problem.blocks.values())
        if self.choose(cells * len(problem.vectors.prefixes), scale.device) == "dense":
            return dense_statistics(problem, batch.queries, batch.documents, scales)
        return blockwise_statistics(problem, batch.queries, batch.documents, scales)

    def _row_losses(
        self, layout: Layout, batch: ContrastiveBatch, statistics: Statistics, scale: Tensor, prefixes: list[int]
    ) -> Tensor:
        """(M, R) the loss of each row for each prefix."""
        groups = {name: CandidateSums.of(block_statistics) for name, block_statistics in statistics.blocks.items()}
        own_sums = self._own_negatives(layout, batch, statistics, scale, prefixes)
        if "query_document" in self.directions:
            others = [groups.pop(name) for name in ("query_document", "query_queue") if name in groups]
            groups["query_document"] = join([*own_sums, *others])
        positive = statistics.pairs[:, : layout.positives] * scale[layout.positive_row]
        if self.joint:
            return self._softmax(layout, positive, groups)
        parts = [self._softmax(layout, positive, {name: groups[name]}) for name in self.directions]
        return torch.stack(parts).mean(dim=0)

    def _softmax(self, layout: Layout, positive: Tensor, groups: Mapping[str, CandidateSums]) -> Tensor:
        """(M, T) logits of positives, and the groups of candidates of one softmax -> (M, R) losses."""
        config, row, rows = self.config, layout.positive_row, len(layout.rows)
        count = torch.bincount(row, minlength=rows)
        only_documents = all(name.startswith("document") for name in groups)
        if config.several_positives == "log_sum" and not (only_documents and not self.joint):
            candidates = join([g if n.startswith("query") else g.gather(row, rows) for n, g in groups.items()])
            summed = Positives(segment_log_sum(positive, row, rows), segment_sum(positive, row, rows), count)
            return losses(summed, candidates, config.label_smoothing, config.focal)
        # One softmax a positive, in which the other positives are no candidates; then the mean over the positives.
        candidates = join([g.pick(row) if n.startswith("query") else g for n, g in groups.items()])
        single = Positives(positive, positive, torch.ones_like(row))
        each = losses(single, candidates, config.label_smoothing, config.focal)
        return segment_sum(each, row, rows) / count

    def _own_negatives(
        self, layout: Layout, batch: ContrastiveBatch, statistics: Statistics, scale: Tensor, prefixes: list[int]
    ) -> list[CandidateSums]:
        """Each row's own explicit negatives, and what is mixed of them."""
        config, row, rows = self.config, layout.negative_row, len(layout.rows)
        sums = layout.problem.sums
        scores = statistics.pairs[:, layout.positives :]
        groups = [listed(self.negative_logits(scores, scale[row]), layout.negative_kept, row, rows, sums)]
        if config.mixing is None:
            return groups
        # Negatives that a mask removes are not mixed.
        good = layout.negative_kept[-1]
        documents = layout.problem.pair_documents[layout.positives :][good]
        mixed, has = mixed_scores(
            config.mixing, batch, layout.rows, documents, row[good], prefixes, config.similarity == "cosine"
        )
        filled = self.negative_logits(mixed, scale[:, None])
        candidate = has[:, None].expand(filled.shape)
        none = filled.new_zeros(0)
        groups.append(
            CandidateSums(
                filled.masked_fill(~candidate, floor(filled.dtype)).logsumexp(dim=2),
                filled.masked_fill(~candidate, 0).sum(dim=2) if sums else none,
                candidate.sum(dim=2).to(filled.dtype) if sums else none,
            )
        )
        return groups


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
    directions: Sequence[Direction],
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
    if "query_document" not in directions:
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
    blocks: dict[str, Block] = {name: parts.block(name) for name in directions if parts.stands(name)}
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


TIE = 32


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


def best_of_rows(scores: Tensor, row: Tensor, count: int) -> Tensor:
    """(M, T) scores and (T,) rows -> (M, count) the greatest of each row; every row has one."""
    best = scores.new_full((len(scores), count), -torch.inf)
    return best.scatter_reduce_(1, row.expand_as(scores), scores, "amax")


_SIDES: dict[str, Side] = {"query": "query", "document": "document", "queue": "queue"}


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
            rows=Lines.of(_SIDES[side], row_index),
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
        ids = torch.full((len(self.rows), max(1, width)), -1, dtype=torch.int64, device=device)
        ids[row[order], number] = self.batch.document_ids[self.positives[order]]
        return ids

    def _labels(self) -> dict[str, Tensor]:
        batch = self.batch
        assert batch.labels is not None
        documents = batch.document_labels
        if documents is None:
            documents = torch.where(batch.is_positive, batch.labels[batch.owner], -1)
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


def mixed_scores(
    config: MixingConfig,
    batch: ContrastiveBatch,
    rows: Tensor,
    documents: Tensor,
    row: Tensor,
    prefixes: Sequence[int],
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Negatives made of a query's own explicit negatives (KaLM-Embedding-V2, arXiv 2506.20923).

    (E,) explicit negatives and which of the R rows each is of -> (M, R, S) scores and (R,) bool: who has any. A mixture of unit
    vectors is brought back to unit length: otherwise it would be an easier negative, not a harder one. Full vectors are mixed;
    prefixes are cut from the mixture. The draw depends on the step's seed and on the number of the query in the whole batch,
    never on how the batch is spread over processes. Memory is that of the negatives' embeddings once more.
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
    by_prefix = []
    for prefix in prefixes:
        left, right = batch.queries[rows][:, :prefix].to(dtype), mixture[..., :prefix]
        if cosine:
            left, right = functional.normalize(left, dim=-1), functional.normalize(right, dim=-1)
        by_prefix.append((right @ left[..., None]).squeeze(-1))
    return torch.stack(by_prefix), each > 0


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


def spread(config: SpreadConfig, vectors: Tensor) -> Tensor:
    """(n, d) -> () the spread-out regulariser of one side in O(n d^2) (Zhang et al. 2017, arXiv 1708.06320).

    The sum of all cosines is the squared length of the sum of the vectors; the sum of their squares is the squared norm of
    the (d, d) matrix of second moments. The n cosines of vectors with themselves, which are 1, are taken off.
    """
    unit = functional.normalize(vectors.to(accumulation_dtype(vectors.dtype)), dim=1)
    count, width = unit.shape
    length = unit.square().sum(dim=1)
    pairs = max(1, count * (count - 1))
    mean = (unit.sum(dim=0).square().sum() - length.sum()) / pairs
    second = ((unit.T @ unit).square().sum() - length.square().sum()) / pairs
    return config.mean * mean.square() + config.second_moment * torch.relu(second - 1 / width)


HARDEST = 0.01
"""The share of negatives whose share of the gradient is told."""

REASONS = {
    "known_positive": "mask_known_positives",
    "same_label": "mask_same_label",
    "score": "score_mask",
    "guide": "guide_mask",
}
"""Why a candidate is left out, and the setting that does it."""


@torch.no_grad()
def watch_softmax(objective: InfoNCE, batch: ContrastiveBatch) -> dict[str, float]:
    """Figures of the softmax of queries over documents (full vectors, no mixtures) for the watched rows.

    - ``negatives``: candidates of a row that count, in the mean. ``masked_share`` of the candidates are left out; ``masked_<why>`` by each mask alone, so these may overlap.
    - ``effective_negatives``: the number of equally probable negatives with the same concentration, (sum p)^2 / sum p^2
      over a row's negatives; the mean over rows that have one.
    - ``hardest_gradient_share``: of the gradient of all negatives' logits, the share of the 1 % that have most of it.
    - ``effective_examples``: (sum w)^2 / (n sum w^2) over the rows' weights (example, source, focal): 1 if all are equal.
    - ``temperature``, and ``temperature/<task>`` where there are several.
    """
    config, rows = objective.config, watched_rows(batch)
    figures = _temperatures(objective)
    if "query_document" not in objective.directions:
        return figures
    some = replace(batch, rows=rows)
    full = [batch.queries.shape[1]]
    layout = lay_out(config, objective.directions, some, full, objective.tile)
    figures |= _masked(objective, some, len(rows))
    scale = objective.row_scale(some, rows)
    problem, count = layout.problem, len(rows)
    own_row = layout.negative_row
    sides = {"query": batch.queries, "document": batch.documents}
    vectors = {name: unit_vectors(side) if problem.cosine else side.to(scale.dtype) for name, side in sides.items()}
    pairs = (vectors["query"][problem.pair_queries] * vectors["document"][problem.pair_documents]).sum(dim=1)
    lowest = floor(scale.dtype)
    own_logits = objective.negative_logits(pairs[layout.positives :], scale[own_row]).masked_fill(
        ~layout.negative_kept[0], lowest
    )
    logits = scale.new_zeros(count, 0)
    block = problem.blocks.get("query_document")
    if block is not None:
        columns = vectors["document"][block.columns.index]
        logits = block_logits(vectors["query"][rows], columns, scale, block)
        cells, over = excluded_matrix(problem, block)
        cells.fill(logits, lowest)
        for mask in over:
            logits.masked_fill_(mask, lowest)

    def log_sum(power: float) -> Tensor:
        """(R,) of the powers of exp(logit) of each row's negatives."""
        listed = segment_log_sum((own_logits * power)[None].clamp_min(lowest), own_row, count)[0]
        if not logits.shape[1]:
            return listed
        return torch.logaddexp(listed, (logits * power).clamp_min(lowest).logsumexp(dim=1)).clamp_min(lowest)

    negatives = log_sum(1)
    has = negatives > lowest / 2
    if has.any():
        figures["effective_negatives"] = float((2 * negatives - log_sum(2))[has].exp().mean())
    # The gradient of a negative's logit is the row's factor times exp(logit).
    row = layout.positive_row
    positive = pairs[: layout.positives] * scale[row]
    number = torch.bincount(row, minlength=count)
    if config.several_positives == "log_sum":
        positive = segment_log_sum(positive[None], row, count)[0][row]
    normal = torch.logaddexp(positive, negatives[row])
    focal = torch.ones_like(normal) if config.focal is None else focal_weight(normal - positive, config.focal)
    weight = objective.row_weights(some, rows).to(scale.dtype)
    factor = (
        weight.log() + segment_log_sum((focal.log() - normal)[None].clamp_min(lowest), row, count)[0] - number.log()
    )
    gradient = torch.cat([(logits + factor[:, None]).flatten(), own_logits + factor[own_row]]).exp()
    total = gradient.sum()
    size = int((logits > lowest / 2).sum() + (own_logits > lowest / 2).sum())
    if size and total > 0:
        hardest = gradient.topk(math.ceil(size * HARDEST)).values.sum()
        figures["hardest_gradient_share"] = float(hardest / total)
    each = weight * segment_sum(focal[None], row, count)[0] / number
    if each.any():
        figures["effective_examples"] = float(each.sum().square() / each.square().sum() / count)
    return figures


def _masked(objective: InfoNCE, batch: ContrastiveBatch, rows: int) -> dict[str, float]:
    """Candidates a row, and the shares of them that all masks and each mask alone leave out."""
    config = objective.config
    without = {name: None if name.endswith(("score_mask", "guide_mask")) else False for name in REASONS.values()}
    open_config = config.model_copy(update=without)
    remaining, every = _candidates(objective, batch, config), _candidates(objective, batch, open_config)
    figures = {"negatives": remaining / rows}
    if every:
        figures["masked_share"] = 1 - remaining / every
        for why, name in REASONS.items():
            if getattr(config, name):
                alone = open_config.model_copy(update={name: getattr(config, name)})
                figures[f"masked_{why}"] = 1 - _candidates(objective, batch, alone) / every
    return figures


def _candidates(objective: InfoNCE, batch: ContrastiveBatch, config: InfoNCEConfig) -> int:
    """How many documents are candidates of this process's rows under these masks."""
    layout = lay_out(config, objective.directions, batch, [batch.queries.shape[1]], objective.tile)
    count = int(layout.negative_kept.sum())
    block = layout.problem.blocks.get("query_document")
    if block is not None:
        cells, over = excluded_matrix(layout.problem, block)
        out = torch.zeros(len(block.rows), len(block.columns), dtype=torch.bool, device=batch.queries.device)
        cells.fill(out, True)
        for mask in over:
            out |= mask
        count += out.numel() - int(out.sum())
    return count


def _temperatures(objective: InfoNCE) -> dict[str, float]:
    temperature = objective.temperature
    if not isinstance(temperature, Tensor):
        return {"temperature": temperature}
    values = temperature.tolist()
    figures = {"temperature": sum(values) / len(values)}
    if len(values) > 1:
        figures |= {
            f"temperature/{name or 'other'}": value for name, value in zip(objective.tasks, values, strict=True)
        }
    return figures
