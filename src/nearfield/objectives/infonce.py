"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) with several positives, explicit negatives and id masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

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


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum over rows and the number to divide it by, so that the loop alone normalises."""

    total: Tensor
    """() float: the sum over the rows of this process."""
    denominator: float
    """Rows of the whole batch, over all processes."""
    rows: Tensor
    """(Q,) float, detached: each row's own loss."""


class InfoNCE:
    """-log softmax of a positive among the documents that are no known positive of the query.

    With ``P_ic`` the softmax over row i's candidates, the gradient of the loss with respect to the logit (i, c) is
    ``(P_ic - 1[c = p_i]) / Q``: each row of it sums to zero.
    """

    def __init__(self, config: InfoNCEConfig) -> None:
        self.config = config

    def __call__(self, batch: ContrastiveBatch) -> LossSum:
        """The summed loss over the Q queries, and Q."""
        queries, documents = batch.queries.float(), batch.documents.float()
        if batch.queries.dtype == torch.float64:
            queries, documents = batch.queries, batch.documents
        if self.config.similarity == "cosine":
            queries, documents = functional.normalize(queries, dim=-1), functional.normalize(documents, dim=-1)
        logits = queries @ documents.T / self.config.temperature
        count = len(queries)
        own = batch.owner[None, :] == torch.arange(count, device=batch.owner.device)[:, None]
        positive = own & batch.is_positive[None, :]
        masked = self._masked(batch) & ~positive
        negative = ~positive & ~masked
        loss = self._row_loss(logits, positive, negative if self.config.in_batch_negatives else negative & own)
        if self.config.both_directions:
            loss = (loss + self._reverse_loss(logits, positive, masked)) / 2
        return LossSum(loss.sum(), float(count), loss.detach())

    def _masked(self, batch: ContrastiveBatch) -> Tensor:
        """(Q, D) bool: the document equals a known positive of the query."""
        shape = (len(batch.queries), len(batch.documents))
        masked = torch.zeros(shape, dtype=torch.bool, device=batch.document_ids.device)
        if self.config.mask_known_positives:
            for column in batch.known_positives.unbind(dim=1):
                masked |= (column[:, None] == batch.document_ids[None, :]) & (column >= 0)[:, None]
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

    def _reverse_loss(self, logits: Tensor, positive: Tensor, masked: Tensor) -> Tensor:
        """Each positive document looks for its query among all queries; the mean over a query's positives, (Q,)."""
        negative = ~positive & ~masked
        # A document stands in one column and has one owner, so each column has at most one positive row.
        negatives = _fill(logits, negative).logsumexp(dim=0)
        each = torch.logaddexp(logits, negatives[None, :]) - logits
        return each.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)


def _fill(logits: Tensor, keep: Tensor) -> Tensor:
    """Cells that are not kept get the lowest finite number: minus infinity would make a gradient of a row that keeps
    nothing not a number."""
    return logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
