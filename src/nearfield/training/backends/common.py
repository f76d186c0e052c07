"""What several backends share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

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
