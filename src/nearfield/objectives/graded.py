"""Losses of pairs with a score, by the classes of sentence-transformers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum
from nearfield.objectives.objective import Objective


def graded_pairs(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) queries and (n,) documents of the global batch that have a score, and (n,) their scores."""
    if batch.scores is None:
        raise BadInputError(
            "this objective wants a score of each pair, and the batch has none",
            where="objective",
            hint="Give it sources of graded examples.",
        )
    documents = (batch.is_positive & batch.scores.isfinite()[batch.owner]).nonzero().squeeze(1)
    owner = batch.owner[documents]
    return owner, documents, batch.scores[owner]


class Ranking(Objective):
    """CoSENT (sentence-transformers' ``CoSENTLoss``) of one of its similarities, or of AnglE's (``AnglELoss``).

    ``log(1 + sum exp((s_b - s_a) / temperature))`` over pairs a, b of the global batch whose scores say a > b, by sorting: no
    matrix of pairs. It is no sum over rows: each process computes all of it and counts its share of the rows.
    """

    def __init__(
        self, similarity: Literal["cosine", "dot", "euclidean", "manhattan", "angle"], temperature: float
    ) -> None:
        super().__init__()
        from sentence_transformers import SimilarityFunction
        from sentence_transformers.sentence_transformer.losses import AnglELoss, CoSENTLoss

        # The model is the caller's: only the class's function of embeddings is used.
        model: Any = None
        if similarity == "angle":
            self._loss = AnglELoss(model, scale=1 / temperature)
        else:
            pairwise = SimilarityFunction.to_similarity_pairwise_fn(similarity)
            self._loss = CoSENTLoss(model, scale=1 / temperature, similarity_fct=pairwise)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The loss of the global batch times this process's share of its rows."""
        owner, documents, scores = graded_pairs(batch)
        if batch.weights is not None and bool((batch.weights[owner] != 1).any()):
            raise BadInputError(
                "a loss of the order of pairs has no weights of examples",
                where="objective",
                hint="Remove the 'weight' of the graded source; those of other sources may stay.",
            )
        # All rows count alike, whatever the other sources' weights are.
        rows = len(batch.local_rows())
        if not len(owner):
            nothing = batch.queries.sum() * 0
            return LossSum(nothing, float(len(batch.queries)) or 1.0, nothing.detach().expand(rows))
        with torch.autocast(batch.queries.device.type, enabled=False):
            pair = [batch.queries[owner], batch.documents[documents]]
            loss = self._loss.compute_loss_from_embeddings(pair, scores)
        return LossSum(loss * rows, float(len(batch.queries)) or 1.0, loss.detach().expand(rows))


class CosineRegression(Objective):
    """(cosine - score)^2, as sentence-transformers' ``CosineSimilarityLoss``; it rounds scores to float32, this does not."""

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        owner, documents, scores = graded_pairs(batch)
        row = batch.row_places()[owner]
        mine = row >= 0
        owner, documents, row = owner[mine], documents[mine], row[mine]
        cosine = functional.cosine_similarity(batch.queries[owner], batch.documents[documents])
        each = (cosine - scores[mine].to(cosine.dtype)).square()
        rows = batch.local_rows()
        losses = batch.weighed(each.new_zeros(len(rows)).index_add(0, row, each))
        return LossSum(losses.sum(), batch.denominator(), losses.detach())
