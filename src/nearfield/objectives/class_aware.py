"""Faithful and apart: a denoising autoencoder beside a class-aware contrastive loss (CAROL, arXiv 2410.22197).

Inspired by CAROL, of which noise, weights and the form of the contrast are not known to us: words deleted as in TSDAE
(arXiv 2104.06979), supervised contrast with labels counting alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nearfield.objectives.batch import ContrastiveBatch, LossSum
from nearfield.objectives.objective import Objective
from nearfield.objectives.supervised import SupCon
from nearfield.objectives.token_decoder import TokenDecoder, query_tokens

if TYPE_CHECKING:
    from nearfield.objectives.more_kinds import CAROLConfig


class CAROL(Objective):
    """share x reconstruction + (1 - share) x supervised contrast. The reconstruction is the mean over a text's tokens of -log
    of the probability that a decoder gives them which sees the embedding of the text with tokens deleted."""

    wants_tokens = True

    def __init__(self, config: CAROLConfig, width: int, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.contrast = SupCon(config.temperature, config.class_weights == "inverse")
        self.decoder = TokenDecoder(vocabulary, width, config.inner)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        share = self.config.reconstruction
        total = self.zero(batch.queries, batch.documents)
        losses = torch.zeros(len(batch.local_rows()), device=batch.queries.device)
        if share < 1:
            found = self.contrast.forward(batch)
            total, losses = total + (1 - share) * found.total, (1 - share) * found.rows
        if share:
            with torch.autocast(batch.queries.device.type, enabled=False):
                embeddings, tokens = query_tokens(batch)
                each = -self.decoder.log_probability(embeddings, tokens) / (tokens >= 0).sum(dim=1).clamp_min(1)
                each = batch.weighed(each)
            total, losses = total + share * each.sum(), losses + share * each.detach()
        return LossSum(total, batch.denominator(), losses)
