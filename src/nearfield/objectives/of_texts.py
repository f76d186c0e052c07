"""Losses that are a mean over the labelled texts of a batch: which texts these are, and the one way to sum them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nearfield.objectives.batch import ContrastiveBatch, LossSum
from nearfield.objectives.objective import Objective
from nearfield.objectives.supervised import labelled_texts
from nearfield.objectives.vectors import accumulation_dtype, tiles

CELLS = 2**22
"""Logits that are held at once."""


class OfTexts(Objective):
    """Of each labelled text a loss; the mean over the texts of the global batch, each row's share in its sum."""

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


def in_tiles(part: Callable[[Tensor], Tensor], anchors: Tensor, columns: int, like: Tensor) -> Tensor:
    """``part`` of some anchors at a time; nothing of the size of the logits is kept, the backward makes them again."""
    found = [like.new_zeros(0)]
    for low, high in tiles(len(anchors), max(1, CELLS // max(1, columns))):
        found.append(checkpoint(part, anchors[low:high], use_reentrant=False))
    return torch.cat(found)


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
