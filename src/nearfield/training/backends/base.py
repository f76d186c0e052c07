"""What the loop asks of a backend: how parameters live on several devices, and how their gradient is summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
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
    """What forwards go through."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    same_chunk_count: bool
    """Whether forwards and backwards are collective, so that every rank must run the same number."""
    kept_graphs: KeptGraphs
    """What becomes of the graphs of several chunks that are kept. A single backward adds the gradients that chunks give a
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
