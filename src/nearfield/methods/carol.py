"""CAROL (arXiv 2410.22197), in a working form of ours: a denoising autoencoder beside a class-aware contrastive loss.

The paper does not state its noise, weights and form of contrast: here words are deleted as in TSDAE (arXiv 2104.06979), and
the contrast is supervised, with labels counting alike.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from nearfield.config import Positive, Share
from nearfield.methods.token_decoder import TokenDecoder, query_tokens, sizes_for_decoder
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective
from nearfield.objectives.config import Names, ObjectiveSettings, Reading, Surroundings
from nearfield.objectives.losses import SupCon


class CAROLConfig(ObjectiveSettings):
    """A denoising autoencoder beside supervised contrast, in a working form of ours of CAROL (arXiv 2410.22197)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["carol"] = "carol"
    reconstruction: Share = 0.5
    """The share of the reconstruction in the loss; the contrast has the rest."""
    temperature: Positive = 0.1
    """Cosines of the contrast are divided by it."""
    class_weights: Literal["none", "inverse"] = "inverse"
    """``inverse``: labels count alike in the contrast, however many texts of each a batch holds; ``none`` counts texts alike."""
    delete: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """The share of tokens that are left out of each text when it is encoded."""
    inner: Annotated[int, Field(gt=0)] = 256
    """Width of the decoder, which is no part of the saved model."""

    @property
    def reading(self) -> Reading:
        return Reading(deleted=self.delete)

    def build(self, sources: Names = (), around: Surroundings | None = None) -> CAROL:
        return CAROL(self, *sizes_for_decoder(around))


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
            contrastive = self.contrast.forward(batch)
            total, losses = total + (1 - share) * contrastive.total, (1 - share) * contrastive.rows
        if share:
            with torch.autocast(batch.queries.device.type, enabled=False):
                embeddings, tokens = query_tokens(batch)
                each = -self.decoder.log_probability(embeddings, tokens) / (tokens >= 0).sum(dim=1).clamp_min(1)
                each = batch.weighed(each)
            total, losses = total + share * each.sum(), losses + share * each.detach()
        return LossSum(total, batch.denominator(), losses)
