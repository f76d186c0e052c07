"""Pairs and triples of a query with its own documents, as indices."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield.objectives.batch import ContrastiveBatch


def own_documents(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """(n,) documents of this process's rows, and (n,) the row of each by its place."""
    place = batch.row_places()[batch.owner]
    documents = (place >= 0).nonzero().squeeze(1)
    return documents, place[documents]


def own_triples(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) positives and (n,) explicit negatives of each row, every positive with every negative, and (n,) the row."""
    documents, row = own_documents(batch)
    positive = batch.is_positive[documents]
    positives, negatives = documents[positive], documents[~positive]
    positive_row, negative_row = row[positive], row[~positive]
    order = torch.argsort(positive_row, stable=True)
    positives = positives[order]
    count = torch.bincount(positive_row, minlength=len(batch.local_rows()))
    times = count[negative_row]
    first = (count.cumsum(0) - count)[negative_row]
    begin = (times.cumsum(0) - times).repeat_interleave(times)
    which = torch.arange(int(times.sum()), device=row.device) - begin + first.repeat_interleave(times)
    return positives[which], negatives.repeat_interleave(times), negative_row.repeat_interleave(times)


def row_mean(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(n,) values and the row of each -> (rows,) their means; 0 for a row of none."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / torch.bincount(row, minlength=rows).clamp_min(1)
