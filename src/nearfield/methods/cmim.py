"""The contrastive mutual information machine (cMIM, arXiv 2509.21511): an encoder and a decoder, without second views."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from nearfield.config import NotNegative, Positive
from nearfield.methods.token_decoder import TokenDecoder, query_tokens, sizes_for_decoder
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective, accumulation_dtype, in_tiles
from nearfield.objectives.config import ANY_EXAMPLES, Names, ObjectiveSettings, Surroundings
from nearfield.objectives.diagnostics import watched_rows
from nearfield.provenance import derive_seed


class CMIMConfig(ObjectiveSettings):
    """Contrastive mutual information machine (arXiv 2509.21511): the queries of any examples, each once."""

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    views: ClassVar[int] = 1
    kind: Literal["cmim"] = "cmim"
    temperature: Positive = 0.1
    """Cosines of latents are divided by it."""
    weight: NotNegative = 1.0
    """The weight of the contrastive part; 0 leaves MIM."""
    deviation: Positive = 0.1
    """Of the latents around their embedding at the start, the same in each dimension; it is learnt."""
    inner: Annotated[int, Field(gt=0)] = 256
    """Width of the decoder, which is no part of the saved model."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> CMIM:
        return CMIM(self, *sizes_for_decoder(around))


class CMIM(Objective):
    """MIM: -(log p(text | z) + log p(z) + log q(z | text)) / 2, z drawn from a normal distribution around the embedding with a
    learnt deviation a dimension, p(z) the standard normal; plus weight x -log P(z belongs to its text), where
    P_i = e^(1/t) / (e^(1/t) + mean over others j of e^(cos(z_i, z_j)/t)). The mean makes P independent of the batch's size.
    """

    wants_tokens = True
    contrasts = False

    def __init__(self, config: CMIMConfig, width: int, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.decoder = TokenDecoder(vocabulary, width, config.inner)
        self.log_deviation = nn.Parameter(torch.full((width,), math.log(config.deviation)))

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        rows = batch.local_rows()
        with torch.autocast(batch.queries.device.type, enabled=False):
            latents, noise = self.draw(batch)
            texts, tokens = latents[rows], query_tokens(batch)[1]
            constant = texts.shape[1] * math.log(2 * math.pi)
            prior = -(texts.square().sum(dim=1) + constant) / 2
            posterior = -(noise[rows].square().sum(dim=1) + constant) / 2 - self.log_deviation.sum()
            losses = -(self.decoder.log_probability(texts, tokens) + prior + posterior) / 2
            if self.config.weight:
                losses = losses + self.config.weight * belonging(latents, rows, self.config.temperature)
            losses = batch.weighed(losses)
        total = losses.sum() + self.zero(batch.queries, batch.documents)
        return LossSum(total, batch.denominator(), losses.detach())

    def draw(self, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
        """(Q, d) latents of all queries and the noise that they were drawn with, the same on all processes."""
        generator = torch.Generator().manual_seed(derive_seed(batch.draw or 0, "latents"))
        centres = batch.queries.to(accumulation_dtype(batch.queries.dtype))
        noise = torch.randn(centres.shape, generator=generator, dtype=torch.float64).to(centres)
        return centres + noise * self.log_deviation.to(centres.dtype).exp(), noise

    def informative(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """(n, d) latents and (n, T) tokens of the same texts -> (n, inner) the mean of the decoder's states: cMIM's informative
        embeddings, which take no training."""
        states, known = self.decoder.hidden(latents, tokens), (tokens >= 0)[..., None]
        return torch.where(known, states, 0).sum(dim=1) / known.sum(dim=1)

    @torch.no_grad()
    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """``deviation`` of the latents, and ``belonging``, the mean probability P."""
        probabilities = belonging(self.draw(batch)[0], watched_rows(batch), self.config.temperature)
        return {"deviation": float(self.log_deviation.exp().mean()), "belonging": float((-probabilities).exp().mean())}


def belonging(latents: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """(n, d) latents -> (R,) -log P of some; 0 where there is no other."""
    unit = functional.normalize(latents, dim=1)
    numbers = torch.arange(len(unit), device=unit.device)
    if len(unit) < 2:
        return unit.sum(dim=1)[rows] * 0

    def part(some: Tensor) -> Tensor:
        logits = unit[some] @ unit.T / temperature
        itself = some[:, None] == numbers[None, :]
        others = logits.masked_fill(itself, torch.finfo(logits.dtype).min / 2).logsumexp(dim=1) - math.log(
            len(unit) - 1
        )
        # A latent's cosine with itself is 1, whatever it is.
        return functional.softplus(others - 1 / temperature)

    return in_tiles(part, rows, len(unit), unit)
