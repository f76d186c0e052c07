"""What every objective is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nearfield.objectives.batch import ContrastiveBatch


class Objective(nn.Module):
    """Takes a :class:`ContrastiveBatch` and returns a :class:`LossSum`; its parameters are trained with the encoder's."""

    contrasts = True
    """Whether it holds queries and documents against each other, so that it tells something how alike they are."""
    wants_tokens = False
    """Whether the batch must bring the tokens of its queries."""

    def zero(self, *others: Tensor) -> Tensor:
        """0, of which all parameters and ``others`` are a part: what a process has no use for still gets a gradient, of zero,
        as the reductions between processes want."""
        return torch.stack([tensor.sum() * 0 for tensor in (*self.parameters(), *others)]).sum()

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """Figures that say how the learning goes, by name; called without gradient, now and then, by one process."""
        return {}
