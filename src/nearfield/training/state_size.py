"""Bytes of what a rank holds throughout a run: weights, their gradient, the optimiser's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nearfield.training.backends.base import saved_buffers, trainable
from nearfield.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine

_LARGE = 32 << 20


@dataclass(frozen=True)
class StateSize:
    """Bytes a rank, and counts of the whole model."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    """The most that is held of the gradient in a step."""
    optimizer: int
    """With the float32 copy of half-precision weights where the backend keeps one."""
    checkpoint: int
    """Of a checkpoint: its files on the disk, and its copies in rank 0's main memory while they are written."""
    checkpoint_large: int
    """Those of its copies that are so large that glibc gives them memory of their own, not what was freed before."""
    largest: int
    """The gradient of the largest trained parameter that is passed on whole: not of tables that pass on looked-up rows."""
    trained_bytes: int
    """The gradient of all trained parameters, whole."""


def state_size(engine: Engine, config: TrainingConfig) -> StateSize:
    """Count it for the backend in effect; nothing is allocated."""
    backend = engine.backend
    world = engine.launch.world_size
    module = backend.module
    everything = {id(p): p for p in module.parameters()}
    trained = trainable(module)
    by_row = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding) and part.sparse}
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    whole = sum(_count(p) * p.element_size() for p in trained.values())
    # ZeRO keeps its optimiser's state, and what gradients are added in, in float32.
    zero = backend.name.startswith("zero")
    state = optimizer_bytes(trained, config, torch.float32 if zero else None)
    sharded = backend.name in ("fsdp2", "zero3")
    weights = sum(_count(p) * p.element_size() for p in everything.values()) // (world if sharded else 1) + buffers
    gradients, optimizer = whole, state
    if backend.name == "ddp":
        gradients += min(whole, 64 << 20)  # the buffer that is sent
    elif backend.name == "fsdp2":
        gradients += whole // world  # whole until the last chunk, then the shard beside it
        optimizer //= world
    elif zero:
        masters = sum(_count(p) * 4 for p in trained.values())
        half = any(p.element_size() < 4 for p in trained.values())
        gradients = masters // world if backend.name != "zero1" else masters + (whole if half else 0)
        optimizer = (state + masters) // world
    files = sum(_count(p) * (4 if zero else p.element_size()) for p in trained.values())
    large = sum(_count(p) * p.element_size() for p in trained.values() if _count(p) * p.element_size() >= _LARGE)
    return StateSize(
        parameters=sum(_count(p) for p in everything.values()),
        trained=sum(_count(p) for p in trained.values()),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        checkpoint=files + sum(buffer.nbytes for buffer in saved_buffers(module).values()) + state,
        checkpoint_large=large + int(large / max(1, whole) * state),
        largest=max((_count(p) * p.element_size() for p in trained.values() if id(p) not in by_row), default=0),
        trained_bytes=whole,
    )


def _count(parameter: nn.Parameter) -> int:
    """Entries of a whole parameter: ZeRO 3 leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def optimizer_bytes(
    parameters: dict[str, nn.Parameter], config: TrainingConfig, dtype: torch.dtype | None = None
) -> int:
    """Bytes of the optimiser's state for whole parameters, of type ``dtype`` if given: found by a step on tensors that have
    no memory.

    8 bytes an entry, AdamW's, where an optimiser cannot step such tensors.
    """
    meta = torch.device("meta")
    named = []
    for name, parameter in parameters.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        copy = nn.Parameter(torch.empty(shape, dtype=dtype or parameter.dtype, device=meta))
        copy.grad = torch.empty_like(copy)
        named.append((name, copy))
    try:
        optimizer = make_optimizer(named, config, meta)
        optimizer.step()
    except Exception:  # looks at values (Adafactor that scales its rate), or has kernels for one device only
        if config.optimizer.kind == "adafactor":
            plain = config.model_copy(
                update={"optimizer": config.optimizer.model_copy(update={"scale_parameter": False})}
            )
            return (
                optimizer_bytes(parameters, plain, dtype) if plain != config else 8 * sum(p.numel() for _, p in named)
            )
        each = 2 if config.optimizer.kind == "adamw_8bit" else 8
        return each * sum(copy.numel() for _, copy in named)
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
