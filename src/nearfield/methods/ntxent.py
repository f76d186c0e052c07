"""NT-Xent (SimCLR) with positives averaged (DeCLUTR, arXiv 2006.03659): every text against every other one of both sides."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from nearfield.config import Positive
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective
from nearfield.objectives.config import Names, ObjectiveSettings, Surroundings


class NTXentConfig(ObjectiveSettings):
    """Each query and the mean of its positives' embeddings against all others of the batch, both ways (DeCLUTR, arXiv
    2006.03659)."""

    kind: Literal["ntxent"] = "ntxent"
    temperature: Positive = 0.05
    """Cosines are divided by it; lower puts more weight on the hardest texts."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> NTXent:
        return NTXent(self.temperature)


class NTXent(Objective):
    """Queries look for the mean of their positives' embeddings, and these for their query, among all 2 Q - 1 others.

    Explicit negatives are not used. Holds a matrix of (2 rows, 2 Q) logits.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The mean of both directions, for this process's rows."""
        rows, count = batch.local_rows(), len(batch.queries)
        texts = functional.normalize(torch.cat([batch.queries, averaged_positives(batch)]), dim=1)
        places = torch.cat([rows, rows + count])
        logits = texts[places] @ texts.T / self.temperature
        logits = logits.masked_fill(places[:, None] == torch.arange(2 * count, device=places.device), float("-inf"))
        both = functional.cross_entropy(logits, torch.cat([rows + count, rows]), reduction="none")
        losses = (both[: len(rows)] + both[len(rows) :]) / 2
        total = batch.weighed(losses).sum() + batch.documents.sum() * 0
        return LossSum(total, batch.denominator(), losses.detach())


def averaged_positives(batch: ContrastiveBatch) -> Tensor:
    """(Q, d) the mean of the embeddings of each query's positives, as the model gives them."""
    positive = batch.is_positive
    owner = batch.owner[positive]
    sums = batch.documents.new_zeros(len(batch.queries), batch.documents.shape[1])
    sums = sums.index_add(0, owner, batch.documents[positive])
    return sums / torch.bincount(owner, minlength=len(batch.queries)).clamp_min(1)[:, None]
