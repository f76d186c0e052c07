"""Losses of single pairs and triplets: graded pairs, a margin between two documents, a binary decision for each pair."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective, own_triples, row_mean
from nearfield.objectives.blocks import Join, accumulation_dtype, in_tiles

if TYPE_CHECKING:
    from nearfield.objectives.config import SigLIPConfig


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


def _minus_dot(left: Tensor, right: Tensor) -> Tensor:
    return -(left * right).sum(dim=1)


class Triplet(Objective):
    """max(0, d(query, positive) - d(query, negative) + margin), the mean over a row's triplets; 0 for a row of none.

    The distances are those of sentence-transformers' ``TripletLoss``, and the dot product with its sign turned.
    """

    def __init__(self, distance: Literal["cosine", "dot", "euclidean", "manhattan"], margin: float) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric

        self.margin = margin
        named = {
            each.upper(): getattr(TripletDistanceMetric, each.upper()) for each in ("cosine", "euclidean", "manhattan")
        }
        self._distance = _minus_dot if distance == "dot" else named[distance.upper()]

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        rows = batch.local_rows()
        positives, negatives, row = own_triples(batch)
        queries = batch.queries[rows[row]]
        with torch.autocast(batch.queries.device.type, enabled=False):
            near = self._distance(queries, batch.documents[positives])
            far = self._distance(queries, batch.documents[negatives])
            losses = batch.weighed(row_mean((near - far + self.margin).relu(), row, len(rows)))
        return LossSum(losses.sum(), batch.denominator(), losses.detach())


class SigLIP(Objective):
    """A binary decision for each query and document (Zhai et al. 2023, arXiv 2303.15343).

    Of a query the sum over all documents of -log sigmoid(z (cosine / temperature + bias)), z = 1 for its own positives
    and -1 for all others. No softmax: a document's part does not depend on the others."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        # Of one dimension: sharding backends do not take a scalar.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))
        self.bias = nn.Parameter(torch.tensor([config.bias]))

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        rows = batch.local_rows()
        with torch.autocast(batch.queries.device.type, enabled=False):
            dtype = accumulation_dtype(batch.queries.dtype)
            documents = functional.normalize(batch.documents.to(dtype), dim=1)
            losses = in_tiles(lambda some: self._rows(batch, documents, some), rows, len(documents), documents)
            losses = batch.weighed(losses)
        return LossSum(losses.sum(), batch.denominator(), losses.detach())

    def _rows(self, batch: ContrastiveBatch, documents: Tensor, rows: Tensor) -> Tensor:
        unit = functional.normalize(batch.queries[rows].to(documents.dtype), dim=1)
        logits = unit @ documents.T * (-self.log_temperature).exp() + self.bias
        is_own = (batch.owner[None, :] == rows[:, None]) & batch.is_positive[None, :]
        losses = -functional.logsigmoid(torch.where(is_own, logits, -logits))
        if self.config.mask_known_positives:
            known = Join(batch.known_positives[rows], batch.document_ids[:, None], tile=max(1, len(documents)))
            out = torch.zeros_like(is_own)
            out[known.cells(0, len(rows), 0)] = True
            losses = losses.masked_fill(out & ~is_own, 0)
        return losses.sum(dim=1)

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """The learnt temperature and bias."""
        return {"temperature": float(self.log_temperature.exp()), "bias": float(self.bias)}
