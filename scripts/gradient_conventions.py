"""The gradient under the usual ways of sharing negatives over ranks, measured on two CPU processes.

    torchrun --nproc-per-node 2 scripts/gradient_conventions.py

Each way computes InfoNCE on a batch that is split over the ranks and lets the gradient be averaged over them, as
DistributedDataParallel does. Prints by which factor its gradient differs from that of one process on the whole batch,
and how far it is from that gradient after division by the factor.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor, nn

QUERIES, WIDTH, TEMPERATURE = 16, 8, 0.1

Gather = Callable[[Tensor], Tensor]


def info_nce(queries: Tensor, documents: Tensor, first: int = 0) -> Tensor:
    """The mean over the queries; the document of query i is number ``first + i``."""
    logits = functional.normalize(queries, dim=1) @ functional.normalize(documents, dim=1).T / TEMPERATURE
    return functional.cross_entropy(logits, torch.arange(len(queries)) + first)


def with_gradient(own: Tensor) -> Tensor:
    """A gather whose backward sends each rank the gradient of its rows, summed over ranks."""

    class GatherRows(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, rows: Tensor) -> Tensor:
            everyone = rows.new_empty((dist.get_world_size() * len(rows), rows.shape[1]))
            dist.all_gather_into_tensor(everyone, rows)
            return everyone

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            own = gradient.new_empty((len(gradient) // dist.get_world_size(), gradient.shape[1]))
            dist.reduce_scatter_tensor(own, gradient.contiguous())
            return own

    gathered: Tensor = GatherRows.apply(own)
    return gathered


def own_slot(own: Tensor) -> Tensor:
    """A gather without gradient, with the rank's own rows put back."""
    everyone = own.new_empty((dist.get_world_size() * len(own), own.shape[1]))
    dist.all_gather_into_tensor(everyone, own.detach())
    parts = list(everyone.chunk(dist.get_world_size()))
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def gradient(weight: Tensor, loss: Tensor) -> Tensor:
    """The gradient of a local loss, averaged over ranks."""
    (found,) = torch.autograd.grad(loss, weight)
    dist.all_reduce(found)
    return found / dist.get_world_size()


def main() -> None:
    """Measure all ways."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
    queries, documents = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64)
    (true,) = torch.autograd.grad(info_nce(queries @ weight, documents @ weight), weight)
    size = QUERIES // world
    mine = slice(rank * size, (rank + 1) * size)

    def full(gather: Gather, scale: float = 1.0) -> Tensor:
        return info_nce(gather(queries[mine] @ weight), gather(documents[mine] @ weight)) * scale

    def local(gather: Gather, scale: float = 1.0) -> Tensor:
        return info_nce(queries[mine] @ weight, gather(documents[mine] @ weight), rank * size) * scale

    ways = {
        "gather without gradient, own rows put back; the whole loss on each rank": lambda: full(own_slot),
        "the same, times the number of ranks": lambda: full(own_slot, world),
        "gather without gradient, own rows put back; own queries on each rank": lambda: local(own_slot),
        "gather with gradient; the whole loss on each rank": lambda: full(with_gradient),
        "gather with gradient; own queries on each rank": lambda: local(with_gradient),
        "gather with gradient; own queries on each rank, times their number": lambda: local(with_gradient, world),
        "no gather: own documents are all the negatives": lambda: info_nce(
            queries[mine] @ weight, documents[mine] @ weight
        ),
    }
    for name, loss in ways.items():
        found = gradient(weight, loss())
        factor = float((found * true).sum() / true.square().sum())
        rest = float((found / factor - true).norm() / true.norm())
        if rank == 0:
            print(json.dumps({"way": name, "factor": round(factor, 6), "off_after_division": float(f"{rest:.1e}")}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
