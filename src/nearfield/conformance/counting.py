"""Counts what collectives move, by kind, below every library that calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
