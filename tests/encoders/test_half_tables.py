"""A table in bfloat16 has the gradient of one in float64, but for one rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nearfield.encoders.half_tables import add_tables_in_float32


@pytest.fixture()
def table() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(5, 8, padding_idx=3)


def gradient(table: nn.Embedding, ids: Tensor, upstream: Tensor) -> Tensor:
    rows = table(ids)
    rows.backward(upstream.to(rows.dtype))
    assert table.weight.grad is not None
    return table.weight.grad.double()


def test_many_tokens_of_one_row(table: nn.Embedding) -> None:
    ids = torch.cat([torch.zeros(2000, dtype=torch.long), torch.arange(5)]).reshape(5, -1)
    upstream = torch.randn(*ids.shape, 8).add(0.3).bfloat16()
    expected = gradient(copy.deepcopy(table).double(), ids, upstream.double())
    plain, ours = copy.deepcopy(table).bfloat16(), table.bfloat16()
    add_tables_in_float32(ours)
    assert torch.equal(ours(ids), plain(ids))
    scale = expected.abs().max()
    assert (gradient(ours, ids, upstream) - expected).abs().max() / scale < 2**-8
    assert (gradient(plain, ids, upstream) - expected).abs().max() / scale > 0.05, "what this is for"
    assert ours.weight.grad is not None and ours.weight.grad[3].count_nonzero() == 0


def test_other_tables_do_as_before(table: nn.Embedding) -> None:
    whole, frozen = copy.deepcopy(table), copy.deepcopy(table).bfloat16().requires_grad_(False)
    add_tables_in_float32(nn.ModuleList([whole, frozen]))
    ids = torch.arange(5)
    assert torch.equal(gradient(whole, ids, torch.ones(5, 8)), gradient(table, ids, torch.ones(5, 8)))
    assert not frozen(ids).requires_grad
