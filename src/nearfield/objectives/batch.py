"""An objective's input, its output, and its base; and the sums over rows that losses are made with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_OF_DOCUMENTS = {"documents", "is_positive", "document_ids", "document_labels", "guide_documents", "teacher_scores"}
"""Fields that have a line a document; all other tensors have one a query."""


@dataclass(frozen=True)
class Queued:
    """Documents of earlier steps, without gradient."""

    vectors: Tensor
    """(N, d) as they were embedded then."""
    ids: Tensor
    """(N,) int64."""
    labels: Tensor
    """(N,) int64, -1 for none."""
    sources: Tensor
    """(N,) int64, -1 where it was not said."""
    guide: Tensor | None = None
    """(N, g) a guide model's embeddings."""


@dataclass(frozen=True)
class Ring:
    """The processes that a batch is spread over. Each holds its own queries with their documents; embeddings are passed round,
    what else is known of a part every process knows."""

    rank: int
    queries: Sequence[int]
    """Of each process."""
    documents: Sequence[int]
    """Of each process."""
    weight: float
    """The divisor of the loss of the whole batch."""
    part: Callable[[int], ContrastiveBatch]
    """A process's part, numbered from 0, its embeddings on the device ``meta``."""
    rotate: Callable[[Tensor, int], Tensor]
    """*Collective*: a tensor for the next process, and how many rows come from the one before -> these."""

    def visits(self) -> list[int]:
        """The processes whose parts come by, in the order in which they do."""
        world = len(self.queries)
        return [(self.rank - step) % world for step in range(1, world)]

    def size(self, process: int) -> int:
        """Rows of a process's embeddings."""
        return self.queries[process] + self.documents[process]


@dataclass(frozen=True)
class ContrastiveBatch:
    """The embeddings of a global batch with who belongs to whom.

    Columns are documents, rows are queries. Ids are item numbers: equal content has equal ids. Optional fields are
    only needed by the settings that name them.
    """

    queries: Tensor
    """(Q, d) float."""
    documents: Tensor
    """(D, d) float."""
    owner: Tensor
    """(D,) int64: the row that brought the document, as a positive or as an explicit negative."""
    is_positive: Tensor
    """(D,) bool: whether the document is a positive of its owner."""
    document_ids: Tensor
    """(D,) int64."""
    known_positives: Tensor
    """(Q, K) int64: ids of all known positives of each query, padded with -1."""
    rows: Tensor | None = None
    """(R,) int64: the queries whose loss this process computes, ascending; none means all."""
    query_ids: Tensor | None = None
    """(Q,) int64: equal queries have equal ids; asked for where queries are candidates of queries."""
    labels: Tensor | None = None
    """(Q,) int64: each example's label, which its query and its positives bear; -1 for none."""
    document_labels: Tensor | None = None
    """(D,) int64: each document's own label, -1 for none; without it positives bear their example's, negatives none."""
    weights: Tensor | None = None
    """(Q,) float: how much each example counts in the mean; none means 1."""
    sources: Tensor | None = None
    """(Q,) int64: the number of each example's source."""
    guide_queries: Tensor | None = None
    """(Q, g) float: a guide model's embeddings."""
    guide_documents: Tensor | None = None
    """(D, g) float."""
    queue: Queued | None = None
    """Documents of earlier steps that are candidates too."""
    scores: Tensor | None = None
    """(Q,) float: the score of each graded pair, not a number where an example has none."""
    teacher_scores: Tensor | None = None
    """(D,) float: a teacher's score of each document for its owner, not a number where there is none."""
    token_losses: Tensor | None = None
    """(Q, 2 k) float: for each of k losses on tokens, the sum over the tokens of each query, and how many they are."""
    query_tokens: Tensor | None = None
    """(Q, T) int64: the tokens of each query's whole text, padded with -1."""
    draw: int | None = None
    """The seed of what is drawn at this step, the same on all processes."""
    progress: float = 0.0
    """The share of the run that is done."""
    ring: Ring | None = None
    """Where a batch is spread over processes and this is the part of one; none means that all is here."""

    def local_rows(self) -> Tensor:
        """(R,) int64: the queries whose loss this process computes."""
        return self.rows if self.rows is not None else torch.arange(len(self.queries), device=self.queries.device)

    def row_places(self) -> Tensor:
        """(Q,) int64: where each query stands among the rows of this process, -1 where another process has it."""
        rows = self.local_rows()
        place = torch.full((len(self.queries),), -1, dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        return place

    def weighed(self, losses: Tensor) -> Tensor:
        """(R,) losses of this process's rows, each times the weight of its example."""
        return losses if self.weights is None else losses * self.weights[self.local_rows()].to(losses.dtype)

    def select(self, keep: Tensor) -> ContrastiveBatch:
        """The examples, by a (Q,) mask, with their documents alone, as a batch of their own."""
        if bool(keep.all()):
            return self
        number = keep.cumsum(0) - 1
        documents = keep[self.owner]
        changed: dict[str, Tensor | None] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name not in ("rows", "owner"):
                changed[field.name] = value[documents if field.name in _OF_DOCUMENTS else keep]
        rows = self.local_rows()
        return replace(self, owner=number[self.owner[documents]], rows=number[rows[keep[rows]]], **changed)  # type: ignore[arg-type]

    def denominator(self) -> float:
        """The divisor of a sum over the rows of all processes; 1 where nothing counts, so that the loss is 0."""
        if self.ring is not None:
            return self.ring.weight
        return (float(len(self.queries)) if self.weights is None else float(self.weights.sum())) or 1.0

    def place(self) -> tuple[int, int]:
        """The number of the first query within the whole batch, and how many that has."""
        if self.ring is None:
            return 0, len(self.queries)
        return sum(self.ring.queries[: self.ring.rank]), sum(self.ring.queries)


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum over rows and the number to divide it by, so that the loop alone normalises."""

    total: Tensor
    """() float: the sum over the rows of this process."""
    denominator: float
    """Rows of the whole batch, or the sum of their weights, over all processes."""
    rows: Tensor
    """(R,) float, detached: each local row's own loss."""

    def gradients(self, inputs: Sequence[Tensor], weight: float = 1.0) -> list[Tensor]:
        """The gradient of ``weight`` times the mean with respect to each input; zeros for what this process has no use for,
        as where a batch has fewer rows than there are processes."""
        if not self.total.requires_grad:
            return [torch.zeros_like(tensor) for tensor in inputs]
        mean = self.total * (weight / self.denominator)
        return list(torch.autograd.grad(mean, list(inputs), allow_unused=True, materialize_grads=True))


class Objective(nn.Module):
    """Takes a :class:`ContrastiveBatch` and returns a :class:`LossSum`; its parameters are trained with the encoder's."""

    contrasts = True
    """Whether it holds queries and documents against each other, so that it tells something how alike they are."""
    wants_tokens = False
    """Whether the batch must bring the tokens of its queries."""

    def zero(self, *others: Tensor) -> Tensor:
        """0, of which all parameters and ``others`` are a part: what a process has no use for still gets a gradient, of zero,
        as the reductions between processes want."""
        return torch.stack([tensor.sum() * 0 for tensor in (*self.parameters(), *others)]).sum()

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """Figures that say how the learning goes, by name; called without gradient, now and then, by one process."""
        return {}


class MemoryQueue:
    """The positives of earlier steps as further candidates (MoCo, arXiv 1911.05722; XBM, arXiv 1912.06798): the newest ``size``,
    each in a place of its own, of which the oldest gives its place to the next.

    An objective remembers nothing: whoever takes the steps hands it what is queued, and queues what a step has seen. Every
    process queues the positives of the whole batch, so that the number of processes does not matter.
    """

    prefix = "queue."
    """Of its tensors' names in a checkpoint."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pushed = 0
        """How many ever were."""
        self._held: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.pushed, self.size)

    def queued(self) -> Queued | None:
        """The documents in the queue; none before the first step."""
        if not len(self):
            return None
        held = {name: tensor[: len(self)] for name, tensor in self._held.items()}
        return Queued(held["vectors"], held["ids"], held["labels"], held["sources"], held.get("guide"))

    def push(self, batch: ContrastiveBatch) -> None:
        """Remember the positives of a batch that a step was taken on."""
        positive = batch.is_positive.nonzero().squeeze(1)[-self.size :] if self.size else batch.is_positive[:0]
        if not len(positive):
            return
        owner = batch.owner[positive]
        nothing = torch.full_like(owner, -1)
        new = {
            "vectors": batch.documents.detach()[positive],
            "ids": batch.document_ids[positive],
            "labels": nothing if batch.labels is None else batch.labels[owner],
            "sources": nothing if batch.sources is None else batch.sources[owner],
        }
        if batch.guide_documents is not None:
            new["guide"] = batch.guide_documents[positive]
        places = (self.pushed + torch.arange(len(positive), device=owner.device)) % self.size
        for name, rows in new.items():
            if name not in self._held:
                self._held[name] = rows.new_zeros((self.size, *rows.shape[1:]))
            self._held[name][places] = rows
        self.pushed += len(positive)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state for a checkpoint."""
        if len(self):
            yield f"{self.prefix}pushed", torch.tensor([self.pushed])
            yield from ((f"{self.prefix}{name}", tensor) for name, tensor in self._held.items())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        queue_tensors = {
            name.removeprefix(self.prefix): t for name, t in tensors.items() if name.startswith(self.prefix)
        }
        pushed = queue_tensors.pop("pushed", None)
        self.pushed = 0 if pushed is None else int(pushed)
        self._held = {name: tensor.clone() for name, tensor in queue_tensors.items()}


def own_documents(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """(n,) documents of this process's rows, and (n,) the row of each by its place."""
    place = batch.row_places()[batch.owner]
    documents = (place >= 0).nonzero().squeeze(1)
    return documents, place[documents]


def own_triples(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) positives and (n,) explicit negatives of each row, every positive with every negative, and (n,) the row."""
    documents, row = own_documents(batch)
    positive = batch.is_positive[documents]
    positives, negatives = documents[positive], documents[~positive]
    positive_row, negative_row = row[positive], row[~positive]
    order = torch.argsort(positive_row, stable=True)
    positives = positives[order]
    count = torch.bincount(positive_row, minlength=len(batch.local_rows()))
    times = count[negative_row]
    first = (count.cumsum(0) - count)[negative_row]
    begin = (times.cumsum(0) - times).repeat_interleave(times)
    which = torch.arange(int(times.sum()), device=row.device) - begin + first.repeat_interleave(times)
    return positives[which], negatives.repeat_interleave(times), negative_row.repeat_interleave(times)


def row_mean(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(n,) values and the row of each -> (rows,) their means; 0 for a row of none."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / torch.bincount(row, minlength=rows).clamp_min(1)


def segment_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(M, n) -> (M, rows)."""
    return values.new_zeros(len(values), rows).index_add(1, row, values)


def segment_log_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(M, n) -> (M, rows) logarithm of the sum of exponentials; ``floor`` for a row of none."""
    lowest = floor(values.dtype)
    peak = values.new_full((len(values), rows), lowest)
    peak = peak.scatter_reduce_(1, row.expand_as(values), values.detach(), "amax")
    total = segment_sum((values - peak[:, row]).exp(), row, rows)
    empty = total == 0
    return torch.where(empty, lowest, peak + total.masked_fill(empty, 1).log())


def floor(dtype: torch.dtype) -> float:
    """The logit of what is no candidate: minus infinity would make a gradient of a row that keeps nothing not a number."""
    return torch.finfo(dtype).min / 2


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: never half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles(count: int, size: int) -> Iterator[tuple[int, int]]:
    """The edges of tiles of ``size``, the last one ragged."""
    return ((low, min(low + size, count)) for low in range(0, count, size))


LOGITS_AT_ONCE = 2**22
"""Logits that a loss holds at once where it makes them again in the backward."""


def in_tiles(part: Callable[[Tensor], Tensor], rows: Tensor, columns: int, like: Tensor) -> Tensor:
    """``part`` of some rows at a time; nothing of the size of the logits is kept, the backward makes them again."""
    done = [like.new_zeros(0)]
    for low, high in tiles(len(rows), max(1, LOGITS_AT_ONCE // max(1, columns))):
        done.append(checkpoint(part, rows[low:high], use_reentrant=False))
    return torch.cat(done)
