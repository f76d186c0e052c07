"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) with several positives, explicit negatives and id masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from nearfield.objectives.config import InfoNCEConfig


@dataclass(frozen=True)
class ContrastiveBatch:
    """The embeddings of a global batch with who belongs to whom.

    Columns are documents, rows are queries. Ids are item numbers: equal content has equal ids.
    """

    queries: Tensor
    """(Q, d) float."""
    documents: Tensor
    """(D, d) float."""
    owner: Tensor
    """(D,) int64: the row that brought the document, as a positive or as an explicit negative."""
    is_positive: Tensor
    """(D,) bool: whether the document is a positive of its owner."""
    document_ids: Tensor
    """(D,) int64."""
    known_positives: Tensor
    """(Q, K) int64: ids of all known positives of each query, padded with -1."""
    rows: Tensor | None = None
    """(R,) int64: the queries whose loss this process computes, ascending; none means all."""

    def local_rows(self) -> Tensor:
        """(R,) int64: the queries whose loss this process computes."""
        return self.rows if self.rows is not None else torch.arange(len(self.queries), device=self.queries.device)


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum over rows and the number to divide it by, so that the loop alone normalises."""

    total: Tensor
    """() float: the sum over the rows of this process."""
    denominator: float
    """Rows of the whole batch, over all processes."""
    rows: Tensor
    """(R,) float, detached: each local row's own loss."""


class InfoNCE(nn.Module):
    """-log softmax of a positive among the documents that are no known positive of the query.

    With ``P_ic`` the softmax over row i's candidates, the gradient of the loss with respect to the logit (i, c) is
    ``(P_ic - 1[c = p_i]) / Q``: each row of it sums to zero.
    """

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        self.config = config
        if config.learn_temperature:
            # Of one dimension: sharding backends do not take a scalar.
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))

    @property
    def temperature(self) -> Tensor | float:
        """What similarities are divided by; within its bounds where it is learnt."""
        if not self.config.learn_temperature:
            return self.config.temperature
        low, high = (math.log(bound) for bound in self.config.temperature_bounds)
        # At a bound the gradient still flows, so that the temperature can come back.
        clipped = self.log_temperature + (self.log_temperature.clamp(low, high) - self.log_temperature).detach()
        return clipped.exp()

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The summed loss over this process's rows, and the number of rows of all."""
        queries, documents = batch.queries.float(), batch.documents.float()
        if batch.queries.dtype == torch.float64:
            queries, documents = batch.queries, batch.documents
        if self.config.similarity == "cosine":
            queries, documents = functional.normalize(queries, dim=-1), functional.normalize(documents, dim=-1)
        rows = batch.local_rows()
        logits = queries[rows] @ documents.T / self.temperature
        own = batch.owner[None, :] == rows[:, None]
        positive = own & batch.is_positive[None, :]
        masked = self._masked(batch.known_positives[rows], batch.document_ids) & ~positive
        negative = ~positive & ~masked
        loss = self._row_loss(logits, positive, negative if self.config.in_batch_negatives else negative & own)
        if self.config.both_directions:
            loss = (loss + self._reverse_loss(batch, queries, documents)) / 2
        return LossSum(loss.sum(), float(len(batch.queries)), loss.detach())

    def _masked(self, known_positives: Tensor, document_ids: Tensor) -> Tensor:
        """(R, K) ids of known positives and (D,) ids -> (R, D) bool: the document equals a known positive of the query."""
        shape = (len(known_positives), len(document_ids))
        masked = torch.zeros(shape, dtype=torch.bool, device=document_ids.device)
        if self.config.mask_known_positives:
            for column in known_positives.unbind(dim=1):
                masked |= (column[:, None] == document_ids[None, :]) & (column >= 0)[:, None]
        return masked

    def _row_loss(self, logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """(R, C) logits and masks -> (R,) losses; every row needs a positive."""
        negatives = _fill(logits, negative).logsumexp(dim=1)
        if self.config.several_positives == "log_sum":
            positives = _fill(logits, positive).logsumexp(dim=1)
            return torch.logaddexp(positives, negatives) - positives
        # One softmax a positive, in which the other positives are no candidates; then the mean over the positives.
        each = torch.logaddexp(logits, negatives[:, None]) - logits
        return each.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)

    def _reverse_loss(self, batch: ContrastiveBatch, queries: Tensor, documents: Tensor) -> Tensor:
        """Each positive document of the R rows looks for its query among all; the mean over a query's positives, (R,)."""
        rows = batch.local_rows()
        mine = batch.is_positive & torch.isin(batch.owner, rows)
        owner = batch.owner[mine]
        logits = documents[mine] @ queries.T / self.temperature
        own = owner[:, None] == torch.arange(len(queries), device=owner.device)[None, :]
        masked = self._masked(batch.known_positives, batch.document_ids[mine]).T & ~own
        negatives = _fill(logits, ~own & ~masked).logsumexp(dim=1)
        positives = logits.gather(1, owner[:, None]).squeeze(1)
        each = torch.logaddexp(positives, negatives) - positives
        place = torch.searchsorted(rows, owner)
        count = torch.zeros(len(rows), dtype=each.dtype, device=each.device).index_add(0, place, torch.ones_like(each))
        return torch.zeros_like(count).index_add(0, place, each) / count


def _fill(logits: Tensor, keep: Tensor) -> Tensor:
    """Cells that are not kept get the lowest finite number: minus infinity would make a gradient of a row that keeps
    nothing not a number."""
    return logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
