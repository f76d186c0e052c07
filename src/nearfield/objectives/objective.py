"""What every objective is."""

from __future__ import annotations

from torch import nn

from nearfield.objectives.batch import ContrastiveBatch


class Objective(nn.Module):
    """Takes a :class:`ContrastiveBatch` and returns a :class:`LossSum`; its parameters are trained with the encoder's."""

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """Figures that say how the learning goes, by name; called without gradient, now and then, by one process."""
        return {}
