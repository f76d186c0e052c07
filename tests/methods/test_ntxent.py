"""NT-Xent with averaged positives, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from nearfield.methods.ntxent import NTXent
from nearfield.objectives import ContrastiveBatch
from tests.objectives.test_losses import make


def plain(batch: ContrastiveBatch, temperature: float) -> list[Tensor]:
    """The loss of each query, by a loop over its definition."""
    count = len(batch.queries)
    means = []
    for query in range(count):
        own = [i for i in range(len(batch.documents)) if batch.owner[i] == query and batch.is_positive[i]]
        means.append(torch.stack([batch.documents[i] for i in own]).mean(0))
    texts = [normalize(text, dim=0) for text in (*batch.queries, *means)]
    losses = []
    for query in range(count):
        both = []
        for one, other in ((query, query + count), (query + count, query)):
            scores = [texts[one] @ texts[i] / temperature for i in range(2 * count) if i != one]
            both.append(torch.logsumexp(torch.stack(scores), 0) - texts[one] @ texts[other] / temperature)
        losses.append((both[0] + both[1]) / 2)
    return losses


def test_it_is_what_the_loop_says() -> None:
    batch = make(5, 2)
    # Two positives for the first two queries; the rest of the negatives is not used.
    positive = batch.is_positive.clone()
    positive[[1, 4]] = True
    batch = replace(batch, is_positive=positive)
    found, wanted = NTXent(0.1)(batch), torch.stack(plain(batch, 0.1))
    torch.testing.assert_close(found.rows, wanted.detach())
    sides = [batch.queries, batch.documents]
    ours = torch.autograd.grad(found.total / found.denominator, sides)
    theirs = torch.autograd.grad(wanted.mean(), sides)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert bool((ours[1][~positive] == 0).all())


def test_ranks_and_weights() -> None:
    batch = replace(make(5, 0), weights=torch.tensor([0.0, 1, 2, 0.5, 1], dtype=torch.float64))
    losses = torch.stack(plain(batch, 0.2)).detach()
    parts = [NTXent(0.2)(replace(batch, rows=torch.tensor(rows))) for rows in ([0, 3], [1, 2, 4])]
    mean = sum(float(part.total.detach()) for part in parts) / parts[0].denominator
    assert batch.weights is not None
    assert mean == pytest.approx(float((losses * batch.weights).sum() / batch.weights.sum()))


def test_equal_positives_count_as_one_and_sides_may_be_swapped() -> None:
    batch = make(4, 0)
    twice = replace(
        batch,
        documents=batch.documents.repeat_interleave(2, 0),
        owner=batch.owner.repeat_interleave(2),
        is_positive=torch.ones(8, dtype=torch.bool),
        document_ids=batch.document_ids.repeat_interleave(2),
    )
    loss = NTXent(0.1)
    torch.testing.assert_close(loss(twice).total, loss(batch).total)
    swapped = replace(batch, queries=batch.documents, documents=batch.queries)
    torch.testing.assert_close(loss(swapped).total, loss(batch).total)


def test_gradients_by_finite_differences() -> None:
    batch = make(4, 1)

    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        total: Tensor = NTXent(0.3)(replace(batch, queries=queries, documents=documents)).total
        return total

    assert torch.autograd.gradcheck(loss, (batch.queries, batch.documents), fast_mode=True)
