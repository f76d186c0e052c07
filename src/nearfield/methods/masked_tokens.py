"""Losses on hidden tokens, trained before embeddings are: BERT's masked words, LLM2Vec's MNTP, RetroMAE's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nearfield.encoders.config import TokenTaskConfig
from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective
from nearfield.objectives.config import ANY_EXAMPLES, Names, ObjectiveSettings, Surroundings


class MaskedTokensConfig(TokenTaskConfig, ObjectiveSettings):
    """The model predicts hidden tokens of texts, before embeddings are trained: masked words, MNTP, or with a decoder RetroMAE.

    The queries of any examples are the texts; alone in a batch, what else an example has is not used.
    """

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    views: ClassVar[int] = 1
    kind: Literal["masked_tokens"] = "masked_tokens"

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset()

    @property
    def token_task(self) -> TokenTaskConfig:
        return self

    @property
    def summary(self) -> str:
        decoder = "" if self.decoder is None else f", a decoder that does not see {self.decoder.share:g}"
        return f"masked_tokens, {self.predict}, {self.share:g} of the tokens{decoder}"

    def build(self, sources: Names = (), around: Surroundings | None = None) -> TokenLosses:
        return TokenLosses([1.0] if self.decoder is None else [1.0, self.decoder.weight])


NAMES = ("masked", "decoded")


class TokenLosses(Objective):
    """The weighted sum of losses, each the mean over all tokens of the global batch that it asks for.

    The tokens of an example with a weight count that many times.
    """

    contrasts = False

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = tuple(weights)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """This process's share of the means; the denominator is that of the whole batch."""
        rows, denominator = batch.local_rows(), batch.denominator()
        losses = batch.queries.new_zeros(len(rows))
        for weight, (sums, count) in zip(self.weights, self._means(batch), strict=True):
            losses = losses + batch.weighed(sums[rows]) * (weight * denominator / count)
        return LossSum(losses.sum(), denominator, losses.detach())

    def _means(self, batch: ContrastiveBatch) -> list[tuple[Tensor, float]]:
        """For each loss the (Q,) sums of texts, and how many tokens the whole batch has."""
        if batch.token_losses is None:
            raise BadInputError("the batch brings no losses of tokens", where="objective")
        means = []
        for number in range(len(self.weights)):
            counts = batch.token_losses[:, 2 * number + 1].detach()
            if batch.weights is not None:
                counts = counts * batch.weights.to(counts.dtype)
            means.append((batch.token_losses[:, 2 * number], max(float(counts.sum()), 1.0)))
        return means

    @torch.no_grad()
    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """The mean loss of each kind a token, and how many tokens there were."""
        figures: dict[str, float] = {}
        for name, (sums, count) in zip(NAMES, self._means(batch), strict=False):
            total = sums if batch.weights is None else sums * batch.weights.to(sums.dtype)
            figures |= {f"loss/{name}": float(total.sum()) / count, f"tokens/{name}": count}
        return figures
