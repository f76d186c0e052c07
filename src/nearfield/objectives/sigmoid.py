"""A binary decision for each query and document (SigLIP, Zhai et al. 2023, arXiv 2303.15343)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nearfield.objectives.batch import ContrastiveBatch, LossSum
from nearfield.objectives.masks import Join
from nearfield.objectives.objective import Objective
from nearfield.objectives.vectors import accumulation_dtype, tiles

if TYPE_CHECKING:
    from nearfield.objectives.kinds import SigLIPConfig

CELLS = 2**22
"""Logits that are held at once."""


class SigLIP(Objective):
    """Of a query the sum over all documents of -log sigmoid(z (cosine / temperature + bias)), z = 1 for its own positives
    and -1 for all others. No softmax: a document's part does not depend on the others."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        # Of one dimension: sharding backends do not take a scalar.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))
        self.bias = nn.Parameter(torch.tensor([config.bias]))

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        rows = batch.local_rows()
        with torch.autocast(batch.queries.device.type, enabled=False):
            dtype = accumulation_dtype(batch.queries.dtype)
            documents = functional.normalize(batch.documents.to(dtype), dim=1)
            size = max(1, CELLS // max(1, len(documents)))
            found = [documents.new_zeros(0)]
            for low, high in tiles(len(rows), size):
                # Kept is nothing of the size of the logits: the backward makes them again.
                part = checkpoint(self._rows, batch.queries[rows[low:high]], documents, rows[low:high], batch, use_reentrant=False)  # fmt: skip
                found.append(part)
            losses = batch.weighed(torch.cat(found))
        return LossSum(losses.sum(), batch.denominator(), losses.detach())

    def _rows(self, queries: Tensor, documents: Tensor, rows: Tensor, batch: ContrastiveBatch) -> Tensor:
        unit = functional.normalize(queries.to(documents.dtype), dim=1)
        logits = unit @ documents.T * (-self.log_temperature).exp() + self.bias
        own = (batch.owner[None, :] == rows[:, None]) & batch.is_positive[None, :]
        losses = -functional.logsigmoid(torch.where(own, logits, -logits))
        if self.config.mask_known_positives:
            known = Join(batch.known_positives[rows], batch.document_ids[:, None], tile=max(1, len(documents)))
            out = torch.zeros_like(own)
            out[known.cells(0, len(rows), 0)] = True
            losses = losses.masked_fill(out & ~own, 0)
        return losses.sum(dim=1)

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """The learnt temperature and bias."""
        return {"temperature": float(self.log_temperature.exp()), "bias": float(self.bias)}
