"""Losses of labelled texts: which texts these are, the one way to sum them, and supervised contrast."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective
from nearfield.objectives.blocks import accumulation_dtype, in_tiles


class LabelledTextLoss(Objective):
    """A loss of each labelled text; the mean over the texts of the global batch, each row's share in its sum.

    The texts are the queries and the documents that have a label: those of ``document_labels``, or a query's positives, which
    bear its label. A text that stands twice (in a batch of the planner as one's query and another's positive) counts
    once, where it first stands.
    """

    views = False
    """Whether the texts are both views of each query, rather than each distinct text once."""

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        texts, labels, owner = labelled_views(batch) if self.views else labelled_texts(batch)
        rows = batch.local_rows()
        place = batch.row_places()
        anchors = (place[owner] >= 0).nonzero().squeeze(1)
        with torch.autocast(batch.queries.device.type, enabled=False):
            vectors = torch.cat([batch.queries, batch.documents])[texts]
            vectors = vectors.to(accumulation_dtype(vectors.dtype))
            each = self.losses(vectors, labels, anchors, batch)
            # Rows have different numbers of texts, and the caller divides by the rows.
            share = len(batch.queries) / max(1, len(texts))
            losses = batch.weighed(each.new_zeros(len(rows)).index_add(0, place[owner[anchors]], each * share))
        return LossSum(losses.sum() + self.zero(vectors), batch.denominator(), losses.detach())

    @abstractmethod
    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        """(n, d) texts, (n,) their labels, (a,) which of them are this process's -> (a,) losses of these."""


class SupCon(LabelledTextLoss):
    """Supervised contrast (Khosla et al. 2020, arXiv 2004.11362): the mean over the other texts of an anchor's label of -log
    softmax among all other texts. An anchor whose label nobody else has, has loss 0."""

    def __init__(self, temperature: float, inverse: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.inverse = inverse

    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        unit = functional.normalize(vectors, dim=1)
        each = in_tiles(lambda some: self._anchors(unit, labels, some), anchors, len(unit), unit)
        return each * self._class_weights(labels).to(each.dtype)[anchors] if self.inverse else each

    def _anchors(self, unit: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        logits = unit[anchors] @ unit.T / self.temperature
        itself = anchors[:, None] == torch.arange(len(unit), device=anchors.device)
        log = logits.masked_fill(itself, torch.finfo(logits.dtype).min / 2).log_softmax(dim=1)
        positive = (labels[anchors][:, None] == labels[None, :]) & ~itself
        count = positive.sum(dim=1)
        losses: Tensor = -torch.where(positive, log, 0).sum(dim=1) / count.clamp_min(1)
        return losses

    @staticmethod
    def _class_weights(labels: Tensor) -> Tensor:
        """(n,) one over the size of each text's class in the batch, with a mean of 1."""
        weights: Tensor = 1 / torch.bincount(labels)[labels].double()
        return weights / weights.mean()


def labelled_texts(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Texts with a label, each once: (n,) places among queries and then documents, (n,) labels, (n,) whose row they are of."""
    if batch.labels is None:
        raise BadInputError(
            "this objective wants a label of each example, and the batch has none",
            where="objective",
            hint="Give it sources of labelled examples, and batches of one source.",
        )
    documents = batch.document_labels
    if documents is None:
        documents = torch.where(batch.is_positive, batch.labels[batch.owner], -1)
    labels = torch.cat([batch.labels, documents])
    numbers = torch.arange(len(batch.queries), device=labels.device)
    owner = torch.cat([numbers, batch.owner])
    texts = (labels >= 0).nonzero().squeeze(1)
    if batch.query_ids is not None:
        ids = torch.cat([batch.query_ids, batch.document_ids])[texts]
        order = torch.argsort(ids, stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[order[1:]] = ids[order][1:] != ids[order][:-1]
        texts = texts[first]
    return texts, labels[texts], owner[texts]


def labelled_views(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Both views of the labelled queries, the query and its first positive, as :func:`labelled_texts` has its texts.

    The first half are the queries; the other view of text t of n is text (t + n / 2) modulo n.
    """
    labelled_texts(batch)  # complains where there are no labels
    assert batch.labels is not None
    size = len(batch.queries)
    positives = batch.is_positive.nonzero().squeeze(1).flip(0)
    first = torch.full((size,), -1, dtype=torch.int64, device=batch.owner.device)
    first = first.scatter_reduce(0, batch.owner[positives], positives, "amin", include_self=False)
    rows = ((batch.labels >= 0) & (first >= 0)).nonzero().squeeze(1)
    labels = batch.labels[rows]
    return torch.cat([rows, size + first[rows]]), torch.cat([labels, labels]), torch.cat([rows, rows])
