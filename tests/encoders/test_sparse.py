"""Sparse gradients of embedding tables add up to the dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nearfield.encoders.sparse import sparse_embedding_gradients


class Words(nn.Module):
    """A large table, a small one, and a layer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(5000, 3, padding_idx=0)
        self.places = nn.Embedding(10, 3)
        self.layer = nn.Linear(3, 2)
        self.tied = tied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = self.words(ids) + self.places(ids % 10)
        plain = self.layer(values).sin()
        return plain.sum() + (values @ self.words.weight[:7].T).cos().sum() if self.tied else plain.sum()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_dense_ones(tied: bool, kept: bool) -> None:
    """With words that come often, padding, several chunks in one backward or in several, over two steps."""
    torch.manual_seed(0)
    dense, sparse = Words(tied), Words(tied)
    sparse.load_state_dict(dense.state_dict())
    sparse_embedding_gradients(sparse)
    sparse_embedding_gradients(sparse)
    assert sparse.words.sparse
    assert not sparse.places.sparse
    for seed in range(2):
        chunks = torch.randint(0, 40, (4, 50), generator=torch.Generator().manual_seed(seed))
        for model in (dense, sparse):
            model.zero_grad()
            if kept:
                torch.stack([model(chunk) for chunk in chunks]).sum().backward()
            else:
                for chunk in chunks:
                    model(chunk).backward()
        for (name, one), other in zip(dense.named_parameters(), sparse.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            assert not other.grad.is_sparse
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_the_same_bits_each_time() -> None:
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Words()
        sparse_embedding_gradients(model)
        for chunk in torch.randint(0, 40, (4, 5000), generator=torch.Generator().manual_seed(1)):
            model(chunk).backward()
        gradients.append(model.words.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_a_frozen_table_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(5000, 4))
    model[0].weight.requires_grad_(False)
    sparse_embedding_gradients(model)
    assert not model[0].sparse
