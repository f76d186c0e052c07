"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) with every mask and weight, whatever the size of the batch.

Read ``_loss`` first: a layout of candidates (:mod:`.blocks`), statistics of their logits (:mod:`.statistics`), and the
algebra from statistics to losses.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective
from nearfield.objectives.blocks import (
    CELLS_AT_ONCE,
    Layout,
    SoftmaxInputs,
    Statistics,
    accumulation_dtype,
    floor,
    lay_out,
)
from nearfield.objectives.diagnostics import watch_softmax
from nearfield.objectives.statistics import (
    CandidateSums,
    Positives,
    blockwise_statistics,
    dense_statistics,
    join,
    listed,
    losses,
    segment_log_sum,
    segment_sum,
)
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.objectives.config import InfoNCEConfig, MixingConfig, SpreadConfig

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
        layout = lay_out(config, batch, prefixes, self.tile)
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

    def logits(self, queries: int, positives: int, negatives: int, ranks: int = 1, queued: int = 0) -> int:
        """Cells of the logits of a process, prefixes counted, of a batch with so many texts that is shared by ``ranks``."""
        config = self.config
        columns = {"query": queries, "document": positives + (negatives if config.shared_negatives else 0)}
        rows = {"query": -(-queries // ranks), "document": -(-positives // ranks)}
        cells = 0
        for name in config.all_directions:
            side, _, other = name.partition("_")
            if name != "query_document" or config.in_batch_negatives:
                cells += rows[side] * columns[other]
        cells += rows["query"] * queued
        return cells * (1 if config.matryoshka is None else len(set(config.matryoshka.dimensions)))

    def _statistics(self, layout: Layout, batch: ContrastiveBatch, scale: Tensor) -> Statistics:
        problem = replace(layout.problem, triton=self.uses_triton(scale.device))
        scales = {
            name: scale if block.rows.side == "query" else scale[layout.positive_row]
            for name, block in problem.blocks.items()
        }
        if batch.ring is not None:
            from nearfield.objectives.ring import ring_statistics

            def visit(joined: ContrastiveBatch, start: tuple[int, int]) -> SoftmaxInputs:
                laid = lay_out(self.config, joined, problem.vectors.prefixes, self.tile, start)
                return replace(laid.problem, triton=problem.triton)

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
        if "query_document" in self.config.all_directions:
            others = [groups.pop(name) for name in ("query_document", "query_queue") if name in groups]
            groups["query_document"] = join([*own_sums, *others])
        positive = statistics.pairs[:, : layout.positives] * scale[layout.positive_row]
        if self.config.joint:
            return self._softmax(layout, positive, groups)
        parts = [self._softmax(layout, positive, {name: groups[name]}) for name in self.config.all_directions]
        return torch.stack(parts).mean(dim=0)

    def _softmax(self, layout: Layout, positive: Tensor, groups: Mapping[str, CandidateSums]) -> Tensor:
        """(M, T) logits of positives, and the groups of candidates of one softmax -> (M, R) losses."""
        config, row, rows = self.config, layout.positive_row, len(layout.rows)
        count = torch.bincount(row, minlength=rows)
        only_documents = all(name.startswith("document") for name in groups)
        if config.several_positives == "log_sum" and not (only_documents and not config.joint):
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
