"""Supervised contrastive learning from labels (Khosla et al. 2020, arXiv 2004.11362)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum
from nearfield.objectives.objective import Objective
from nearfield.objectives.vectors import accumulation_dtype, tiles

CELLS = 2**22
"""Logits that are held at once."""


class SupCon(Objective):
    """Of a text with a label: the mean over the other texts of its label of -log softmax among all other texts.

    The texts are the queries and the documents that have a label: those of ``document_labels``, or a query's positives, which
    bear its label. A text that stands twice (in a batch of the planner as one's query and another's positive) counts
    once, where it first stands. An anchor whose label nobody else has, has loss 0. The batch's loss is the mean over texts.
    """

    def __init__(self, temperature: float, inverse: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.inverse = inverse

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        texts, labels, owner = labelled_texts(batch)
        rows = batch.local_rows()
        place = batch.row_places()
        anchors = (place[owner] >= 0).nonzero().squeeze(1)
        with torch.autocast(batch.queries.device.type, enabled=False):
            vectors = torch.cat([batch.queries, batch.documents])[texts]
            unit = functional.normalize(vectors.to(accumulation_dtype(vectors.dtype)), dim=1)
            found = [unit.new_zeros(0)]
            for low, high in tiles(len(anchors), max(1, CELLS // max(1, len(texts)))):
                # Kept is nothing of the size of the logits: the backward makes them again.
                found.append(checkpoint(self._anchors, unit, labels, anchors[low:high], use_reentrant=False))
            each = torch.cat(found)
            if self.inverse:
                each = each * self._class_weights(labels).to(each.dtype)[anchors]
            # Rows have different numbers of texts, and the caller divides by the rows.
            share = len(batch.queries) / max(1, len(texts))
            losses = each.new_zeros(len(rows)).index_add(0, place[owner[anchors]], each * share)
            losses = batch.weighed(losses)
        return LossSum(losses.sum(), batch.denominator(), losses.detach())

    def _anchors(self, unit: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        logits = unit[anchors] @ unit.T / self.temperature
        own = anchors[:, None] == torch.arange(len(unit), device=anchors.device)
        log = logits.masked_fill(own, torch.finfo(logits.dtype).min / 2).log_softmax(dim=1)
        positive = (labels[anchors][:, None] == labels[None, :]) & ~own
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


__all__ = ["SupCon", "labelled_texts"]
