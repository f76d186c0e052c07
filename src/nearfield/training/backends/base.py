"""The protocol of a backend: how parameters live on several devices, and how their gradient is summed. And what several share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nearfield.training.launch import BackendName

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
