"""What ranks send each other in a step: embeddings once, their gradient once, one small control word."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nearfield.batching.planner import Rows
from nearfield.notices import Notice


@dataclass(frozen=True)
class Shares:
    """Which rows of a pool each rank encodes; every rank knows all of it, so that nothing of it is sent."""

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


def gather_embeddings(own: Tensor, shares: Shares) -> Tensor:
    """(own, d) embeddings of this rank -> (n, d) of the whole pool in its order, detached. One collective."""
    slots = torch.from_numpy(shares.slots()).to(own.device)
    if len(shares.rows) == 1:
        return own.detach()[slots]
    padded = own.new_zeros((shares.longest, own.shape[1]))
    padded[: len(own)] = own.detach()
    everyone = own.new_empty((len(shares.rows) * shares.longest, own.shape[1]))
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
    own = gradient.new_empty((shares.longest, gradient.shape[1]))
    dist.reduce_scatter_tensor(own, laid_out)
    return own[: len(shares.own)]


def send_rows(own: Tensor, shares: Shares, wanted: Sequence[Rows]) -> Tensor:
    """(own, d) embeddings of this rank -> (n, d), detached, of the pool rows that it wants; *collective*.

    ``wanted`` says for each rank which pool rows it wants, each once; a row goes to every rank that does.
    """
    sent, got = _ways(shares, wanted, own.device)
    received = own.new_empty((sum(map(len, got)), own.shape[1]))
    dist.all_to_all_single(received, own.detach()[torch.cat(sent)], [len(g) for g in got], [len(s) for s in sent])
    found = torch.empty_like(received)
    found[torch.cat(got)] = received
    return found


def return_rows(gradient: Tensor, shares: Shares, wanted: Sequence[Rows]) -> Tensor:
    """(n, d) gradient of what :func:`send_rows` gave this rank -> (own, d) summed over ranks; *collective*."""
    sent, got = _ways(shares, wanted, gradient.device)
    received = gradient.new_empty((sum(map(len, sent)), gradient.shape[1]))
    dist.all_to_all_single(received, gradient[torch.cat(got)], [len(s) for s in sent], [len(g) for g in got])
    return gradient.new_zeros((len(shares.own), gradient.shape[1])).index_add_(0, torch.cat(sent), received)


def _ways(shares: Shares, wanted: Sequence[Rows], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Which of its own rows this rank sends to each rank, and where what comes from each is wanted."""
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
    """What all ranks must agree on before parameters change."""

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


def broadcast_notices(found: Callable[[], Iterable[Notice]], device: torch.device) -> list[Notice]:
    """What rank 0 found, on all ranks; the others do not look."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    return [Notice.from_json(one) for one in broadcast_json([n.to_json() for n in found()] if main else None, device)]


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
