"""The messages between ranks: embeddings once a step, their gradient once, one small control word.

A rank encodes the chunks that it was dealt. The loss then needs one of two things. *Gathered*: all embeddings, for the
rows of an even share. *Ring*: the queries of such a share with their own documents, sent there by the ranks that encoded them;
the parts of other ranks come by while the loss is computed, so that no rank ever holds the whole batch. Either way the gradient
goes back to the ranks that encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nearfield.arrays import Rows
from nearfield.batching.planner import VectorsOf
from nearfield.errors import Notice
from nearfield.objectives.batch import ContrastiveBatch, Queued, Ring
from nearfield.training.chunks import TextPool, split_rows


@dataclass(frozen=True)
class Shares:
    """The rows of a pool that each rank encodes; every rank knows all of it, so that nothing of it is sent."""

    rows: Sequence[Rows]
    """For each rank, the pool rows that it encodes, in the order of its chunks."""
    rank: int

    @property
    def own(self) -> Rows:
        """The pool rows of this rank."""
        return self.rows[self.rank]

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return sum(len(rows) for rows in self.rows)

    @property
    def longest(self) -> int:
        """The most rows that a rank has: shorter shares are padded to it on the wire."""
        return max(len(rows) for rows in self.rows)

    def slots(self) -> Rows:
        """(n,) for each pool row, where it stands in the ranks' padded shares laid end to end."""
        slots = np.empty(self.size, dtype=np.int64)
        for rank, rows in enumerate(self.rows):
            slots[rows] = rank * self.longest + np.arange(len(rows))
        return slots


def gather_embeddings(embeddings: Tensor, shares: Shares) -> Tensor:
    """(own, d) embeddings of this rank -> (n, d) of the whole pool in its order, detached. One collective."""
    slots = torch.from_numpy(shares.slots()).to(embeddings.device)
    if len(shares.rows) == 1:
        return embeddings.detach()[slots]
    padded = embeddings.new_zeros((shares.longest, embeddings.shape[1]))
    padded[: len(embeddings)] = embeddings.detach()
    everyone = embeddings.new_empty((len(shares.rows) * shares.longest, embeddings.shape[1]))
    dist.all_gather_into_tensor(everyone, padded)
    return everyone[slots]


def reduce_gradient(gradient: Tensor, shares: Shares) -> Tensor:
    """(n, d) gradient that this rank's rows of the loss give to all embeddings -> (own, d) summed over ranks.

    One collective: each rank receives the gradient of the rows that it encodes.
    """
    if len(shares.rows) == 1:
        return gradient[torch.from_numpy(shares.own).to(gradient.device)]
    slots = torch.from_numpy(shares.slots()).to(gradient.device)
    laid_out = gradient.new_zeros((len(shares.rows) * shares.longest, gradient.shape[1]))
    laid_out[slots] = gradient
    reduced = gradient.new_empty((shares.longest, gradient.shape[1]))
    dist.reduce_scatter_tensor(reduced, laid_out)
    return reduced[: len(shares.own)]


def send_rows(embeddings: Tensor, shares: Shares, wanted: Sequence[Rows]) -> Tensor:
    """(own, d) embeddings of this rank -> (n, d), detached, of the pool rows that it wants; *collective*.

    ``wanted`` says for each rank which pool rows it wants, each once; a row goes to every rank that does.
    """
    sent, got = _ways(shares, wanted, embeddings.device)
    received = embeddings.new_empty((sum(map(len, got)), embeddings.shape[1]))
    dist.all_to_all_single(
        received, embeddings.detach()[torch.cat(sent)], [len(g) for g in got], [len(s) for s in sent]
    )
    result = torch.empty_like(received)
    result[torch.cat(got)] = received
    return result


def return_rows(gradient: Tensor, shares: Shares, wanted: Sequence[Rows]) -> Tensor:
    """(n, d) gradient of what :func:`send_rows` gave this rank -> (own, d) summed over ranks; *collective*."""
    sent, got = _ways(shares, wanted, gradient.device)
    received = gradient.new_empty((sum(map(len, sent)), gradient.shape[1]))
    dist.all_to_all_single(received, gradient[torch.cat(got)], [len(s) for s in sent], [len(g) for g in got])
    return gradient.new_zeros((len(shares.own), gradient.shape[1])).index_add_(0, torch.cat(sent), received)


def _ways(shares: Shares, wanted: Sequence[Rows], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of its own that this rank sends to each rank, and the places of those that come from each."""
    home, place = np.empty((2, shares.size), dtype=np.int64)
    for rank, rows in enumerate(shares.rows):
        home[rows], place[rows] = rank, np.arange(len(rows))
    here = shares.rank
    sent = [place[rows[home[rows] == here]] for rows in wanted]
    got = [np.flatnonzero(home[wanted[here]] == rank) for rank in range(len(wanted))]
    return [torch.from_numpy(s).to(device) for s in sent], [torch.from_numpy(g).to(device) for g in got]


def rotate(tensor: Tensor, rows: int, rank: int, ranks: int) -> Tensor:
    """A tensor for the next rank -> the one of ``rows`` rows of the rank before; *collective*."""
    received = tensor.new_empty((rows, *tensor.shape[1:]))
    ways = [
        dist.P2POp(dist.isend, tensor.contiguous(), (rank + 1) % ranks),
        dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
    ]
    for request in dist.batch_isend_irecv(ways):
        request.wait()
    return received


@dataclass(frozen=True)
class ControlWord:
    """The state that all ranks must agree on before parameters change."""

    loss: float
    """The sum of the local losses: not finite if one is not."""
    out_of_memory: bool
    stop: bool
    used: tuple[bool, ...]
    """For each trainable parameter, whether any rank has a gradient for it."""


def exchange_control(
    loss: float, out_of_memory: bool, stop: bool, used: Sequence[bool], *, ranks: int, device: torch.device
) -> ControlWord:
    """Sum the words of all ranks. One collective of a few numbers."""
    if ranks == 1:
        return ControlWord(loss, out_of_memory, stop, tuple(used))
    word = torch.tensor([loss, float(out_of_memory), float(stop), *map(float, used)], dtype=torch.float64)
    word = word.to(device)
    dist.all_reduce(word)
    values = word.tolist()
    return ControlWord(values[0], values[1] > 0, values[2] > 0, tuple(value > 0 for value in values[3:]))


def any_rank(here: bool, device: torch.device, ranks: int) -> bool:
    """Whether something is so on any rank; *collective*."""
    if ranks == 1:
        return here
    flag = torch.tensor([float(here)], device=device)
    dist.all_reduce(flag)
    return float(flag) > 0


def broadcast_json(value: Any, device: torch.device) -> Any:
    """A value of rank 0 -> the same on all ranks."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    main = dist.get_rank() == 0
    text = json.dumps(value).encode() if main else b""
    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, 0)
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if main:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return json.loads(bytes(data.cpu().tolist()))


def broadcast_notices(make: Callable[[], Iterable[Notice]], device: torch.device) -> list[Notice]:
    """The value that rank 0 found, on all ranks; the others do not look."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    return [Notice.from_json(one) for one in broadcast_json([n.to_json() for n in make()] if main else None, device)]


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of rank 0 -> the same on all ranks, one at a time, on ``device``; only rank 0 brings them."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        for name, tensor in (tensors or {}).items():
            yield name, tensor.to(device)
        return
    main = dist.get_rank() == 0
    entries = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in (tensors or {}).items()]
    for name, shape, dtype in broadcast_json(entries, device):
        if main and tensors is not None:
            tensor = tensors[name].to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        dist.broadcast(tensor, 0)
        yield name, tensor


def all_equal(number: float, device: torch.device) -> bool:
    """Whether all ranks hold the same number; *collective*."""
    pair = torch.tensor([number, -number], dtype=torch.float64, device=device)
    dist.all_reduce(pair, op=dist.ReduceOp.MAX)
    greatest, least = pair.tolist()
    return bool(greatest == -least)


def min_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The least of each number over all ranks; *collective*."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(numbers)
    least = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return [float(number) for number in least.tolist()]


def contrastive_batch(
    pool: TextPool,
    embeddings: Tensor,
    known_positives: Sequence[Rows],
    rows: Rows | None = None,
    draw: int | None = None,
    guide: VectorsOf | None = None,
    queue: Queued | None = None,
    device: torch.device | None = None,
) -> ContrastiveBatch:
    """The objective's view of a pool's (n, d) embeddings; ``known_positives`` are item rows, one array a query.

    ``draw`` is the seed of what the objective draws, ``guide`` gives a guide's vectors of items, ``queue`` is what was seen
    before. ``device`` is where all but the embeddings are; by default where these are.
    """
    place, device = embeddings.device, device or embeddings.device
    token_losses = None
    if pool.token_columns:
        width = embeddings.shape[1] - pool.token_columns
        token_losses = embeddings[torch.from_numpy(pool.queries).to(place), width:]
        embeddings = embeddings[:, :width]

    def guided(role: str, places: Rows) -> Tensor | None:
        # A copy: torch takes no memory that is mapped for reading only.
        return None if guide is None else torch.from_numpy(np.array(guide(role, pool.items[places]))).to(device)

    sources = pool.sources
    if sources is None and pool.source is not None:
        sources = np.full(len(pool.queries), pool.source, dtype=np.int64)
    most = max((len(known) for known in known_positives), default=0)
    known = np.full((len(known_positives), max(1, most)), -1, dtype=np.int64)
    for line, items in enumerate(known_positives):
        known[line, : len(items)] = items
    return ContrastiveBatch(
        queries=embeddings[torch.from_numpy(pool.queries).to(place)],
        documents=embeddings[torch.from_numpy(pool.documents).to(place)],
        owner=torch.from_numpy(pool.owner).to(device),
        is_positive=torch.from_numpy(pool.is_positive).to(device),
        document_ids=torch.from_numpy(pool.items[pool.documents]).to(device),
        known_positives=torch.from_numpy(known).to(device),
        rows=None if rows is None else torch.from_numpy(rows).to(device),
        query_ids=torch.from_numpy(pool.items[pool.queries]).to(device),
        labels=None if pool.labels is None else torch.from_numpy(pool.labels).to(device),
        weights=None if pool.weights is None else torch.from_numpy(pool.weights).to(device),
        sources=None if sources is None else torch.from_numpy(sources).to(device),
        guide_queries=guided("query", pool.queries),
        guide_documents=guided("document", pool.documents),
        queue=queue,
        scores=None if pool.scores is None else torch.from_numpy(pool.scores).to(device),
        teacher_scores=None if pool.teacher_scores is None else torch.from_numpy(pool.teacher_scores).to(device),
        token_losses=token_losses,
        query_tokens=None if pool.query_tokens is None else torch.from_numpy(pool.query_tokens).to(device),
        draw=draw,
    )


class Exchange(Protocol):
    """The way of a batch's embeddings to the objective and of their gradient back."""

    def bring(self, embeddings: Tensor) -> Tensor:
        """(own, d) embeddings of this rank's chunks -> (n, d), detached, those that its part of the loss sees; *collective*."""
        ...

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """The objective's view of what was brought."""
        ...

    def back(self, gradient: Tensor) -> Tensor:
        """(n, d) gradient of what was brought -> (own, d), summed over ranks; *collective*."""
        ...


class Gathered:
    """Every rank gets all embeddings."""

    def __init__(
        self,
        pool: TextPool,
        shares: Shares,
        known_positives: Sequence[Rows],
        guide: VectorsOf | None,
        queue: Queued | None,
    ) -> None:
        self.pool, self.shares, self.known_positives, self.guide, self.queue = (
            pool,
            shares,
            known_positives,
            guide,
            queue,
        )

    def bring(self, embeddings: Tensor) -> Tensor:
        """One collective."""
        return gather_embeddings(embeddings, self.shares)

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """The whole batch, and the rows of this rank."""
        ranks = len(self.shares.rows)
        rows = split_rows(len(self.pool.queries), ranks, self.shares.rank) if ranks > 1 else None
        return contrastive_batch(self.pool, embeddings, self.known_positives, rows, draw, self.guide, self.queue)

    def back(self, gradient: Tensor) -> Tensor:
        """One collective."""
        return reduce_gradient(gradient, self.shares)


class Passed:
    """Every rank gets the queries of its share with their documents; the rest comes by in a ring."""

    def __init__(
        self, pool: TextPool, shares: Shares, known_positives: Sequence[Rows], guide: VectorsOf | None
    ) -> None:
        self.shares, self.guide = shares, guide
        ranks = range(len(shares.rows))
        rows = [split_rows(len(pool.queries), len(ranks), rank) for rank in ranks]
        parts = [part_of(pool, part) for part in rows]
        self.pools = [part for part, _ in parts]
        self.wanted = [wanted for _, wanted in parts]
        self.known_positives = [[known_positives[int(row)] for row in part] for part in rows]
        self.weight = (float(len(pool.queries)) if pool.weights is None else float(pool.weights.sum())) or 1.0

    def bring(self, embeddings: Tensor) -> Tensor:
        """One collective, in which each embedding goes where it is needed."""
        return send_rows(embeddings, self.shares, self.wanted)

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """This rank's part, and the ring that the others come by on."""
        rank = self.shares.rank

        def part(other: int) -> ContrastiveBatch:
            nothing = torch.empty((len(self.wanted[other]), embeddings.shape[1]), device="meta")
            return contrastive_batch(
                self.pools[other],
                nothing,
                self.known_positives[other],
                guide=self.guide,
                device=embeddings.device,
            )

        ring = Ring(
            rank,
            [len(pool.queries) for pool in self.pools],
            [len(pool.documents) for pool in self.pools],
            self.weight,
            part,
            lambda tensor, rows: rotate(tensor, rows, rank, len(self.pools)),
        )
        here = contrastive_batch(self.pools[rank], embeddings, self.known_positives[rank], draw=draw, guide=self.guide)
        return replace(here, ring=ring)

    def back(self, gradient: Tensor) -> Tensor:
        """One collective."""
        return return_rows(gradient, self.shares, self.wanted)


def part_of(pool: TextPool, rows: Rows) -> tuple[TextPool, Rows]:
    """Some queries of a pool with their documents as a pool of their own, and which texts of the pool that has."""
    mine = np.isin(pool.owner, rows)
    queries, documents = pool.queries[rows], pool.documents[mine]
    wanted, where = np.unique(np.concatenate([queries, documents]), return_inverse=True)
    part = TextPool(
        pool.items[wanted],
        pool.prompts[wanted],
        where[: len(rows)],
        where[len(rows) :],
        np.searchsorted(rows, pool.owner[mine]),
        pool.is_positive[mine],
        None if pool.labels is None else pool.labels[rows],
        pool.source,
        None if pool.sources is None else pool.sources[rows],
        None if pool.weights is None else pool.weights[rows],
    )
    return part, wanted
