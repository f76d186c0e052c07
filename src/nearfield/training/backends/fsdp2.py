"""FSDP2: parameters, gradients and optimiser state are spread over ranks by torch's ``fully_shard``.

The mesh is that of the device at hand, so that one code path runs on CPUs and on GPUs. Forwards and backwards gather
parameters, hence every rank runs the same number of chunks; the gradient is scattered in the last backward alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nearfield.errors import BadInputError, NearfieldError
from nearfield.training.backends.replicated import (
    KeptGraphs,
    MakeOptimizer,
    check_fit,
    clip_,
    named_state,
    saved_buffers,
    set_rates,
    square_sum,
    trainable,
)
from nearfield.training.launch import BackendName, broadcast_tensors


class Fsdp2Backend:
    """A model whose every transformer block is a unit of sharding."""

    name: BackendName = "fsdp2"
    same_chunk_count = True
    retries_in_place = False

    def __init__(
        self,
        module: nn.Module,
        whole: Sequence[nn.Parameter],
        make_optimizer: MakeOptimizer,
        device: torch.device,
        world_size: int,
        bf16: bool,
    ) -> None:
        """``whole`` are parameters that are used outside of the module's forward: every rank keeps all of them, and scalars,
        which cannot be cut."""
        self.device = device
        self.world_size = world_size
        module.to(device)
        _one_type(module, whole)
        whole = list(dict.fromkeys([*whole, *(parameter for parameter in module.parameters() if parameter.ndim == 0)]))
        self.kept_graphs: KeptGraphs = "apart" if bf16 else "joined"
        self._whole = [parameter for parameter in whole if parameter.requires_grad]
        mesh = init_device_mesh(device.type, (world_size,))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for block in transformer_blocks(module):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
        self.module = module
        self._fsdp = cast(FSDPModule, module)
        self.parameters = trainable(module)
        self.optimizer = make_optimizer(self.parameters.items())

    def begin(self) -> None:
        """Forget the gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: the sharding policy casts parameters and inputs."""
        return nullcontext()

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """They always can."""
        return nullcontext()

    def backward(self, scalar: Tensor, last: bool, settle: bool = False) -> None:
        """The gradient stays whole and local until the last backward, which scatters its sum.

        Only layers that take part in a backward scatter theirs, hence they must ``settle`` before others follow alone.
        """
        self._fsdp.set_requires_gradient_sync(last or settle)
        self._fsdp.set_is_last_backward(last or settle)
        # fully_shard divides the sum by the number of ranks.
        torch.autograd.backward(scalar * self.world_size)
        if last:
            self._sum_whole()

    def _sum_whole(self) -> None:
        """Sum over ranks the gradients of parameters that each rank holds whole, all of a type at once."""
        for parameter in self._whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._whole if parameter.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.reshape(-1) for gradient in alike]) / self.world_size
            dist.all_reduce(flat)
            for gradient, part in zip(alike, torch.split(flat, [g.numel() for g in alike]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def used(self) -> list[bool]:
        """Nothing to agree on: all ranks run all blocks."""
        return []

    def _local_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's shards, and the gradients that every rank holds whole."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        return shards, [gradient for gradient in gradients if not isinstance(gradient, DTensor)]

    def update(self, rates: Sequence[float], max_norm: float | None, used: Sequence[bool]) -> float:
        """Clip by the norm over all shards, step."""
        shards, whole = self._local_gradients()
        squares = square_sum(shards).to(self.device)
        dist.all_reduce(squares)
        norm = math.sqrt(float(squares) + float(square_sum(whole)))
        if not math.isfinite(norm):
            return norm
        clip_([*shards, *whole], norm, max_norm)
        set_rates(self.optimizer, rates)
        self.optimizer.step()
        return norm

    def gradients(self) -> dict[str, Tensor]:
        """The summed gradient of each parameter, whole."""
        return {name: _whole(p.grad.detach()).clone() for name, p in self.parameters.items() if p.grad is not None}

    def model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Trainable parameters and buffers, whole."""
        for name, tensor in {**self.parameters, **saved_buffers(self.module)}.items():
            yield name, _whole(tensor.detach())

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The optimiser's state, whole."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        yield from named_state(self.optimizer, names, lambda tensor: _whole(tensor.detach()))

    def load(self, model: dict[str, Tensor] | None, optimizer: dict[str, Tensor] | None) -> None:
        """Every rank takes its shards of the whole tensors."""
        targets = {**self.parameters, **saved_buffers(self.module)}
        check_fit(model, targets)
        with torch.no_grad():
            for name, tensor in broadcast_tensors(model, self.device):
                targets[name].copy_(_like(tensor, targets[name]))
        self.optimizer.state.clear()
        for name, tensor in broadcast_tensors(optimizer, self.device):
            parameter_name, _, key = name.rpartition("/")
            parameter = self.parameters[parameter_name]
            same_shape = tensor.shape == parameter.shape
            self.optimizer.state[parameter][key] = _like(tensor, parameter).clone() if same_shape else tensor.clone()

    def verify(self) -> None:
        """The parameters are really sharded."""
        whole = {id(parameter) for parameter in self._whole}
        for name, parameter in self.parameters.items():
            if id(parameter) not in whole and not isinstance(parameter, DTensor):
                raise NearfieldError(f"FSDP2 was asked for, but the parameter {name!r} is not sharded")


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the classes that transformers does not split, else the entries of module lists."""
    names: set[str] = set()
    for part in module.modules():
        names.update(getattr(part, "_no_split_modules", None) or ())
    blocks = [part for part in module.modules() if type(part).__name__ in names]
    blocks = [block for block in blocks if not any(block in other.modules() for other in blocks if other is not block)]
    if blocks:
        return blocks
    lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _one_type(module: nn.Module, whole: Sequence[nn.Parameter]) -> None:
    ignored = {id(parameter) for parameter in whole}
    types = {parameter.dtype for parameter in module.parameters() if id(parameter) not in ignored}
    if len(types) > 1:
        raise BadInputError(
            f"FSDP2 shards parameters of one type, and this model has {', '.join(sorted(map(str, types)))}",
            where="training.precision",
            hint="Use training.precision=bf16-mixed, or DDP or ZeRO for adapters in float32 over a bfloat16 base.",
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor that all ranks have, laid out like ``target``."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
