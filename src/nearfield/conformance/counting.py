"""Counts what collectives move, by kind, below every library that calls them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfield.training.backends.base import Backend

_REDUCTIONS = ("allreduce", "reduce_scatter", "reduce_")


@dataclass
class Traffic:
    """The collectives of a span of time: (operation, bytes of its larger side) each."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    def reductions(self) -> list[int]:
        """Bytes of each reduction: what a rank brings to it."""
        return [size for name, size in self.calls if any(part in name for part in _REDUCTIONS)]


class CountTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open, collectives of this process are noted in ``traffic``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sizes: list[int] = []
            _walk((args, kwargs or {}), sizes.append)
            self.traffic.calls.append((func.__name__, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def _walk(value: Any, note: Callable[[int], None]) -> None:
    if isinstance(value, Tensor):
        note(value.nbytes)
    elif isinstance(value, dict):
        for part in value.values():
            _walk(part, note)
    elif isinstance(value, list | tuple):
        for part in value:
            _walk(part, note)


def padded_bytes(backend: Backend, parameter: nn.Parameter) -> int:
    """Bytes of a parameter's gradient on the wire: shards of FSDP2 are equal, so rows are padded to the ranks."""
    rows = parameter.shape[0] if parameter.ndim else 1
    world = torch.distributed.get_world_size()
    if backend.name == "fsdp2":
        rows = -(-rows // world) * world
    width = math.prod(parameter.shape[1:])
    return rows * width * parameter.element_size()
