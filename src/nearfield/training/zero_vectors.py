"""Embeddings of zeros in training: they have no direction, and a loss of cosines learns nothing from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nearfield.notices import Notice
from nearfield.objectives.batch import ContrastiveBatch
from nearfield.training.communication import broadcast_notices


class ZeroVectors:
    """Counts the embeddings that are zero in every dimension, and tells of them once."""

    def __init__(self, device: torch.device, tell: Callable[[Sequence[Notice]], None]) -> None:
        self.device, self._tell, self.told = device, tell, False
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = 0

    def look(self, batch: ContrastiveBatch | None) -> None:
        """Take in the embeddings of a step, of this rank's part alone where parts are passed round; waits for no device."""
        if batch is None or self.told:
            return
        for embeddings in (batch.queries, batch.documents):
            self._count += (embeddings == 0).all(dim=1).sum()
            self._seen += len(embeddings)

    def say(self, step: int) -> None:
        """Tell of those so far where there are some; *collective*, rank 0 decides."""
        if self.told:
            return
        found = broadcast_notices(lambda: self._notices(step), self.device)
        if found:
            self.told = True
            self._tell(found)

    def _notices(self, step: int) -> list[Notice]:
        count = int(self._count)
        if not count:
            return []
        what = (
            f"{count:,} of {self._seen:,} embeddings of the steps up to {step:,} are zero: nothing is learnt from them"
        )
        return [Notice("zero-vectors", what, "Look for texts without a token that is pooled, such as empty ones.")]
