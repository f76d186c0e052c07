"""Triplets of a query, a positive and an explicit negative of its own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nearfield.objectives.batch import ContrastiveBatch, LossSum
from nearfield.objectives.objective import Objective
from nearfield.objectives.pairs import own_triples, row_mean


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
