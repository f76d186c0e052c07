"""The messages of ranks to each other, as seen from one process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nearfield.training import step
from nearfield.training.chunks import Shares, deal_chunks
from nearfield.training.launch import any_rank, broadcast_json, broadcast_tensors
from nearfield.training.step import (
    ControlWord,
    exchange_control,
    gather_embeddings,
    reduce_gradient,
    return_rows,
    send_rows,
)

CPU = torch.device("cpu")
ROWS = [np.array([3, 0]), np.array([4, 1, 2]), np.zeros(0, dtype=np.int64)]


def test_slots_by_hand() -> None:
    shares = Shares(ROWS, 1)
    assert shares.own.tolist() == [4, 1, 2]
    assert (shares.size, shares.longest) == (5, 3)
    # Rank 0 fills slots 0 and 1, rank 1 slots 3 to 5; slot 2 and rank 2's are padding.
    assert shares.slots().tolist() == [1, 4, 5, 0, 3]
    assert Shares([np.array([2, 0, 1])], 0).slots().tolist() == [1, 2, 0]


def shares_of(sizes: list[int], ranks: int) -> list[Shares]:
    """Chunks of these sizes, in a shuffled order of rows, dealt to ranks."""
    order = np.random.default_rng(sum(sizes)).permutation(sum(sizes))
    chunks = np.split(order, np.cumsum(sizes)[:-1])
    rows = [
        np.concatenate([np.zeros(0, dtype=np.int64), *(chunks[n] for n in share)])
        for share in deal_chunks(sizes, ranks)
    ]
    return [Shares(rows, rank) for rank in range(ranks)]


class Wire:
    """Stands in for the collectives: all ranks are called once to hear what they bring, then again to be answered."""

    def __init__(self) -> None:
        self.brought: list[Tensor] = []
        self.answering = False
        self.rank = 0

    def all_gather_into_tensor(self, out: Tensor, own: Tensor) -> None:
        if self.answering:
            out.copy_(torch.cat(self.brought))
        else:
            self.brought.append(own.clone())
            out.zero_()

    def reduce_scatter_tensor(self, own: Tensor, everything: Tensor) -> None:
        if self.answering:
            own.copy_(torch.stack(self.brought).sum(dim=0)[self.rank * len(own) : (self.rank + 1) * len(own)])
        else:
            self.brought.append(everything.clone())
            own.zero_()

    def ask(self, function: Any, parts: list[Tensor], shares: list[Shares]) -> list[Tensor]:
        self.brought, self.answering = [], False
        for part, share in zip(parts, shares, strict=True):
            function(part, share)
        assert len({part.shape for part in self.brought}) <= 1, "all ranks bring as much"
        self.answering = True
        answers = []
        for self.rank, (part, share) in enumerate(zip(parts, shares, strict=True)):
            answers.append(function(part, share))
        return answers


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 4))
def test_gathering_and_summing_are_inverse_to_each_other(sizes: list[int], ranks: int) -> None:
    shares, wire = shares_of(sizes, ranks), Wire()
    pool = torch.randn(sum(sizes), 3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.dist, "all_gather_into_tensor", wire.all_gather_into_tensor)
        patch.setattr(step.dist, "reduce_scatter_tensor", wire.reduce_scatter_tensor)
        for everyone in wire.ask(gather_embeddings, [pool[share.own] for share in shares], shares):
            assert torch.equal(everyone, pool), "the pool in its own order, on every rank"
        gradients = [torch.randn(sum(sizes), 3, dtype=torch.float64) for _ in range(ranks)]
        summed = torch.stack(gradients).sum(dim=0)
        for share, own in zip(shares, wire.ask(reduce_gradient, gradients, shares), strict=True):
            torch.testing.assert_close(own, summed[share.own], rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 99))
def test_rows_go_where_they_are_wanted_and_gradients_come_back(sizes: list[int], ranks: int, seed: int) -> None:
    shares, random = shares_of(sizes, ranks), np.random.default_rng(seed)
    pool = torch.randn(sum(sizes), 3, dtype=torch.float64)
    wanted = [random.permutation(sum(sizes))[: random.integers(0, sum(sizes) + 1)] for _ in range(ranks)]
    brought: list[list[Tensor]] = []
    answering: list[int] = []

    def all_to_all(out: Tensor, given: Tensor, out_sizes: list[int], given_sizes: list[int]) -> None:
        if not answering:
            brought.append(list(given.split(given_sizes)))
            out.zero_()
            return
        parts = [brought[rank][answering[0]] for rank in range(ranks)]
        assert [len(part) for part in parts] == out_sizes
        out.copy_(torch.cat(parts))

    def ask(function: Any, parts: list[Tensor]) -> list[Tensor]:
        brought.clear()
        answering.clear()
        for part, share in zip(parts, shares, strict=True):
            function(part, share, wanted)
        answers = []
        for rank in range(ranks):
            answering[:] = [rank]
            answers.append(function(parts[rank], shares[rank], wanted))
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.dist, "all_to_all_single", all_to_all)
        for rows, got in zip(wanted, ask(send_rows, [pool[share.own] for share in shares]), strict=True):
            assert torch.equal(got, pool[rows])
        gradients = [torch.randn(len(rows), 3, dtype=torch.float64) for rows in wanted]
        summed = torch.zeros_like(pool)
        for rows, gradient in zip(wanted, gradients, strict=True):
            summed[rows] += gradient
        for share, own in zip(shares, ask(return_rows, gradients), strict=True):
            torch.testing.assert_close(own, summed[share.own], rtol=0, atol=1e-12)


def test_one_rank_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a collective")

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast"):
        monkeypatch.setattr(step.dist, name, never)
    shares = Shares([np.array([2, 0, 1])], 0)
    own = torch.tensor([[2.0], [0.0], [1.0]], requires_grad=True)
    everyone = gather_embeddings(own, shares)
    assert everyone.tolist() == [[0.0], [1.0], [2.0]]
    assert not everyone.requires_grad, "cut from its graph"
    assert reduce_gradient(torch.tensor([[5.0], [6.0], [7.0]]), shares).tolist() == [[7.0], [5.0], [6.0]]
    word = exchange_control(1.5, True, False, [True, False], ranks=1, device=CPU)
    assert word == ControlWord(1.5, True, False, (True, False))
    assert math.isnan(exchange_control(math.nan, False, True, [], ranks=1, device=CPU).loss)
    assert any_rank(True, CPU) and not any_rank(False, CPU)
    assert broadcast_json({"a": [1, "é"]}, CPU) == {"a": [1, "é"]}
    tensors = dict(broadcast_tensors({"x": torch.ones(2)}, CPU))
    assert list(tensors) == ["x"] and tensors["x"].tolist() == [1.0, 1.0]
    assert list(broadcast_tensors(None, CPU)) == []


def test_the_word_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One collective: losses are summed, what any rank says holds for all, in float64."""
    others = torch.tensor([2.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    sent: list[Tensor] = []

    def all_reduce(word: Tensor) -> None:
        sent.append(word.clone())
        word += others

    monkeypatch.setattr(step.dist, "all_reduce", all_reduce)
    word = exchange_control(0.1, True, False, [True, False, False], ranks=2, device=CPU)
    assert word == ControlWord(2.1, True, True, (True, True, False))
    assert [part.dtype for part in sent] == [torch.float64]
    assert sent[0].tolist() == [0.1, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert math.isnan(exchange_control(math.nan, False, False, [True] * 3, ranks=2, device=CPU).loss)
