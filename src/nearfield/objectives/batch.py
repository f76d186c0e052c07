"""What an objective is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ContrastiveBatch:
    """The embeddings of a global batch with who belongs to whom.

    Columns are documents, rows are queries. Ids are item numbers: equal content has equal ids. What is optional is only
    needed by the settings that name it.
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
    query_ids: Tensor | None = None
    """(Q,) int64: equal queries have equal ids; asked for where queries are candidates of queries."""
    labels: Tensor | None = None
    """(Q,) int64: each example's label, which its query and its positives bear; -1 for none."""
    document_labels: Tensor | None = None
    """(D,) int64: each document's own label, -1 for none; without it positives bear their example's, negatives none."""
    weights: Tensor | None = None
    """(Q,) float: how much each example counts in the mean; none means 1."""
    sources: Tensor | None = None
    """(Q,) int64: the number of each example's source."""
    guide_queries: Tensor | None = None
    """(Q, g) float: a guide model's embeddings."""
    guide_documents: Tensor | None = None
    """(D, g) float."""
    draw: int | None = None
    """The seed of what is drawn at this step, the same on all processes."""

    def local_rows(self) -> Tensor:
        """(R,) int64: the queries whose loss this process computes."""
        return self.rows if self.rows is not None else torch.arange(len(self.queries), device=self.queries.device)

    def denominator(self) -> float:
        """What a sum over the rows of all processes is divided by; 1 where nothing counts, so that the loss is 0."""
        return float(len(self.queries)) if self.weights is None else float(self.weights.sum()) or 1.0


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum over rows and the number to divide it by, so that the loop alone normalises."""

    total: Tensor
    """() float: the sum over the rows of this process."""
    denominator: float
    """Rows of the whole batch, or the sum of their weights, over all processes."""
    rows: Tensor
    """(R,) float, detached: each local row's own loss."""
