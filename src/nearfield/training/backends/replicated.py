"""A backend says how parameters live on several devices, and how their gradient is summed: the protocol, what several backends
share, and the plain case, in which every rank holds the whole model: one process, or data parallel.

In the plain case chunks add to each rank's own gradient without a word to the others, so a rank may run any number of them and
a step that ran out of memory can be repeated. The sum over ranks is taken once, in large buffers, after the control word. (A
``DistributedDataParallel`` wrapper would reduce inside the last backward: a rank that fails there leaves the others in
a collective that never ends.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfield.errors import NearfieldError
from nearfield.training.launch import BackendName, all_equal, broadcast_tensors

KeptGraphs = Literal["joined", "apart", "one"]
"""``joined``: one backward through all. ``apart``: a backward for each. ``one``: a graph is kept of a single chunk only."""

NamedTensors = Iterator[tuple[str, Tensor]]


class Backend(Protocol):
    """A model and its optimiser, on one device or spread over several.

    The order of calls in a step: ``begin``, any number of forwards of ``module`` and ``backward``, then ``update``.
    Methods marked *collective* must be called by all ranks together.
    """

    name: BackendName
    module: nn.Module
    """The module that forwards go through."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    same_chunk_count: bool
    """Whether forwards and backwards are collective, so that every rank must run the same number."""
    kept_graphs: KeptGraphs
    """The treatment of the graphs of several chunks that are kept. A single backward adds the gradients that chunks give a
    parameter in the parameter's own type; where that is half precision, sums must be left to the float32 between
    backwards."""
    retries_in_place: bool
    """Whether a step that ran out of memory can be repeated at once: its chunks hold no collectives."""

    def begin(self) -> None:
        """Forget the gradient."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forwards run in."""
        ...

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """While it is open, these parameters can be used outside of the module's forward; *collective*."""
        ...

    def backward(self, scalar: Tensor, last: bool, settle: bool = False) -> None:
        """Add the gradient of a local scalar; ``last`` is the last of the step.

        ``settle`` says that layers which took part may have no part in what follows, on any rank.
        """
        ...

    def used(self) -> list[bool]:
        """For each trainable parameter, whether this rank has a gradient for it; empty where that needs no agreement."""
        ...

    def update(self, rates: Sequence[float], max_norm: float | None, used: Sequence[bool]) -> float:
        """Sum the gradient over ranks, clip it by its true global norm, step the optimiser; *collective*.

        ``rates`` holds a learning rate a parameter group. Returns the norm before clipping. A norm that is not finite is
        returned before anything changes.
        """
        ...

    def gradients(self) -> dict[str, Tensor]:
        """The full summed gradient of each parameter, before ``update`` clips it; *collective*, for checks."""
        ...

    def model_tensors(self) -> NamedTensors:
        """Trainable parameters and buffers, whole, one at a time; *collective*."""
        ...

    def optimizer_tensors(self) -> NamedTensors:
        """The optimiser's state as ``<parameter>/<key>``, whole, one at a time; *collective*."""
        ...

    def load(self, model: dict[str, Tensor] | None, optimizer: dict[str, Tensor] | None) -> None:
        """Put whole tensors back, which rank 0 alone must bring; *collective*."""
        ...

    def verify(self) -> None:
        """Raise unless this backend is really in effect; *collective*."""
        ...


MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Named trainable parameters -> their optimiser."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; one that has two names is listed once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state."""
    state = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def check_fit(tensors: Mapping[str, Tensor] | None, targets: Mapping[str, Tensor]) -> None:
    """Raise unless whole tensors (where this rank has them) are those of a model: one of another shape might broadcast."""
    if tensors is None:
        return
    for name in sorted(targets.keys() | tensors.keys()):
        if name not in targets:
            raise RuntimeError(f"the model has no trained parameter {name!r}")
        if name not in tensors:
            raise RuntimeError(f"{name!r} is missing")
        shape = tuple(getattr(targets[name], "ds_shape", targets[name].shape))
        if tuple(tensors[name].shape) != shape:
            raise RuntimeError(f"{name!r} has shape {tuple(tensors[name].shape)}, the model's has {shape}")


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Give each parameter group its learning rate."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """() float64: the sum of squares of all entries."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(list(tensors))
    return torch.stack([norm.double() for norm in norms]).square().sum()


def clip_(tensors: Sequence[Tensor], norm: float, max_norm: float | None) -> None:
    """Scale gradients in place so that their global norm, which is given, is at most ``max_norm``."""
    if max_norm is None or not math.isfinite(norm):
        return
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        torch._foreach_mul_(list(tensors), factor)


def named_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], whole: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's state as ``<parameter>/<key>`` tensors; ``names`` maps id(parameter) to its name.

    In the order of the names, so that all ranks go through it alike.
    """
    states = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
    for name in sorted(states):
        for key in sorted(states[name]):
            value = states[name][key]
            yield f"{name}/{key}", whole(value if isinstance(value, Tensor) else torch.tensor(value))


def autocast_context(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


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
