"""Every rank holds the whole model: one process, or data parallel.

Chunks add to each rank's own gradient without a word to the others, so a rank may run any number of them and a step
that ran out of memory can be repeated. The sum over ranks is taken once, in large buffers, after the control word. (A
``DistributedDataParallel`` wrapper would reduce inside the last backward: a rank that fails there leaves the others in
a collective that never ends.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfield.errors import NearfieldError
from nearfield.training.backends.base import (
    KeptGraphs,
    MakeOptimizer,
    autocast_context,
    check_fit,
    clip_,
    named_state,
    saved_buffers,
    set_rates,
    square_sum,
    trainable,
)
from nearfield.training.exchange import all_equal, broadcast_tensors
from nearfield.training.launch import BackendName

_BUCKET_BYTES = 64 << 20


class ReplicatedBackend:
    """One process, or several with a copy of the model each."""

    same_chunk_count = False
    kept_graphs: KeptGraphs = "joined"
    retries_in_place = True

    def __init__(
        self, module: nn.Module, make_optimizer: MakeOptimizer, device: torch.device, world_size: int, bf16: bool
    ) -> None:
        self.name: BackendName = "single" if world_size == 1 else "ddp"
        self.module = module.to(device)
        self.device = device
        self.world_size = world_size
        self.bf16 = bf16
        self.parameters = trainable(module)
        self.optimizer = make_optimizer(self.parameters.items())
        self._summed = world_size == 1

    def begin(self) -> None:
        """Forget the gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self._summed = self.world_size == 1

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast where the precision is mixed."""
        return autocast_context(self.device, self.bf16)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """They always can."""
        return nullcontext()

    def backward(self, scalar: Tensor, last: bool, settle: bool = False) -> None:
        """Plain autograd: nothing is sent."""
        torch.autograd.backward(scalar)

    def used(self) -> list[bool]:
        """Marks of the parameters that have a gradient here."""
        return [parameter.grad is not None for parameter in self.parameters.values()]

    def _sum_gradients(self, used: Sequence[bool]) -> list[Tensor]:
        parameters = [p for p, anywhere in zip(self.parameters.values(), used, strict=True) if anywhere]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not self._summed:
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat)
                for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))
            self._summed = True
        return gradients

    def update(self, rates: Sequence[float], max_norm: float | None, used: Sequence[bool]) -> float:
        """Sum, clip, step."""
        gradients = self._sum_gradients(used)
        norm = math.sqrt(float(square_sum(gradients)))
        if not math.isfinite(norm):
            return norm
        clip_(gradients, norm, max_norm)
        set_rates(self.optimizer, rates)
        self.optimizer.step()
        return norm

    def gradients(self) -> dict[str, Tensor]:
        """The summed gradient of each parameter that has one."""
        self._sum_gradients([True] * len(self.parameters))
        return {name: p.grad.detach().clone() for name, p in self.parameters.items() if p.grad is not None}

    def model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Trainable parameters and buffers."""
        for name, tensor in {**self.parameters, **saved_buffers(self.module)}.items():
            yield name, tensor.detach()

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The optimiser's state."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        yield from named_state(self.optimizer, names, lambda tensor: tensor.detach())

    def load(self, model: dict[str, Tensor] | None, optimizer: dict[str, Tensor] | None) -> None:
        """Put tensors back; a parameter that had no optimiser state when it was saved has none again."""
        targets = {**self.parameters, **saved_buffers(self.module)}
        check_fit(model, targets)
        with torch.no_grad():
            for name, tensor in broadcast_tensors(model, self.device):
                targets[name].copy_(tensor)
        self.optimizer.state.clear()
        for name, tensor in broadcast_tensors(optimizer, self.device):
            parameter, _, key = name.rpartition("/")
            self.optimizer.state[self.parameters[parameter]][key] = tensor.clone()

    def verify(self) -> None:
        """All ranks are in the group and hold the same model."""
        if self.world_size == 1:
            return
        if not dist.is_initialized() or dist.get_world_size() != self.world_size:
            raise NearfieldError(
                f"{self.world_size} processes were started, but they have no process group of that size"
            )
        total = sum(float(p.detach().double().sum()) for p in self.module.parameters())
        if not all_equal(total, self.device):
            raise NearfieldError(
                "the ranks do not hold the same model", hint="Do all nodes read the same model folder and checkpoints?"
            )


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type each, together at most so many bytes (or a single larger one)."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        size = 0
        for gradient in gradients:
            if gradient.dtype != dtype:
                continue
            if bucket and size + gradient.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket
