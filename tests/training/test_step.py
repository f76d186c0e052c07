"""One step on an encoder small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfield.data.tokens import TokenCache, TokenTable
from nearfield.objectives import InfoNCEConfig
from nearfield.objectives.infonce import ContrastiveBatch, LossSum
from nearfield.training.chunks import Pool
from nearfield.training.step import Features, Padding, chunk_features, contrastive_batch, run_step, seed_chunk

CPU = torch.device("cpu")


@pytest.fixture()
def tokens() -> TokenCache:
    """Items 0, 1, 2 without a prompt (1, 2 and 3 tokens), and 1, 2 with a prompt of two tokens (3 and 4)."""
    cache = object.__new__(TokenCache)
    ids = np.array([10, 20, 21, 30, 31, 32, 8, 9, 20, 8, 9, 30, 31], dtype=np.int32)
    cache.tables = [
        TokenTable("", 0, np.array([0, 1, 2]), np.array([0, 1, 3, 6]), ids[:6]),
        TokenTable("p: ", 2, np.array([1, 2]), np.array([0, 3, 7]), ids[6:]),
    ]
    return cache


@pytest.fixture()
def pool() -> Pool:
    """Two queries; the first has a positive and a negative, the second the first query's text as its positive."""
    return Pool(
        items=np.array([0, 1, 2, 1, 2]),
        prompts=np.array([0, 0, 0, 1, 1]),
        queries=np.array([0, 2]),
        documents=np.array([3, 4, 0]),
        owner=np.array([0, 0, 1]),
        is_positive=np.array([True, False, True]),
    )


def test_features_are_padded_on_the_right(tokens: TokenCache, pool: Pool) -> None:
    features = chunk_features(pool, np.array([2, 0, 1]), tokens, Padding(99, "right", CPU))
    assert set(features) == {"input_ids", "attention_mask", "prompt_length"}
    assert features["input_ids"].tolist() == [[30, 31, 32], [10, 99, 99], [20, 21, 99]]
    assert features["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert features["input_ids"].dtype == features["attention_mask"].dtype == torch.int64
    assert features["prompt_length"] == 0


def test_features_are_padded_on_the_left(tokens: TokenCache, pool: Pool) -> None:
    features = chunk_features(pool, np.array([4, 3]), tokens, Padding(99, "left", CPU))
    assert features["input_ids"].tolist() == [[8, 9, 30, 31], [99, 8, 9, 20]]
    assert features["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert features["prompt_length"] == 2


def test_the_objective_sees_who_belongs_to_whom(pool: Pool) -> None:
    embeddings = torch.arange(10.0).reshape(5, 2)
    batch = contrastive_batch(pool, embeddings, [np.array([1]), np.array([0, 7, 9])])
    assert batch.queries.tolist() == [[0, 1], [4, 5]]
    assert batch.documents.tolist() == [[6, 7], [8, 9], [0, 1]]
    assert batch.owner.tolist() == [0, 0, 1]
    assert batch.is_positive.tolist() == [True, False, True]
    assert batch.document_ids.tolist() == [1, 2, 0]
    assert batch.known_positives.tolist() == [[1, -1, -1], [0, 7, 9]]
    assert batch.known_positives.dtype == torch.int64


def test_no_known_positive_masks_nothing(pool: Pool) -> None:
    none = np.zeros(0, dtype=np.int64)
    batch = contrastive_batch(pool, torch.zeros(5, 2), [none, none])
    assert batch.known_positives.tolist() == [[-1], [-1]]
    assert contrastive_batch(pool, torch.zeros(5, 2), []).known_positives.shape == (0, 1)


def test_dropout_is_seeded_by_all_three() -> None:
    draws = set()
    for arguments in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        seed_chunk(*arguments)
        draws.add(float(torch.rand(())))
    assert len(draws) == 4


class Table:
    """An embedding per first token, and a record of how it was asked."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(40, 3, generator=generator, dtype=torch.float64).float().requires_grad_()
        self.grad_enabled: list[bool] = []
        self.draws: list[float] = []

    def __call__(self, features: Features) -> Tensor:
        self.grad_enabled.append(torch.is_grad_enabled())
        self.draws.append(float(torch.rand(())))
        ids, mask = features["input_ids"], features["attention_mask"]
        return (self.weight[ids] * mask[..., None]).sum(dim=1).bfloat16().to(torch.float64)


@pytest.mark.parametrize("keep_graph", [True, False])
def test_the_gradient_and_what_the_step_tells(tokens: TokenCache, pool: Pool, keep_graph: bool) -> None:
    chunks = [np.array([4, 3]), np.array([2, 1, 0])]
    features = [chunk_features(pool, chunk, tokens, Padding(0, "right", CPU)) for chunk in chunks]
    known = [np.array([1]), np.array([0])]
    table, pushed = Table(), []
    objective = InfoNCEConfig(temperature=0.5).build()

    def backward(loss: Tensor) -> None:
        assert loss.shape == ()
        pushed.append(loss)
        loss.backward()

    result = run_step(table, objective, backward, pool, features, chunks, known, seed=3, step=5, keep_graph=keep_graph)
    asked, draws = table.grad_enabled, list(table.draws)
    whole = [chunk_features(pool, np.array([i]), tokens, Padding(0, "right", CPU)) for i in range(5)]
    other = Table()
    embeddings = torch.cat([other(one).float() for one in whole])
    assert embeddings.dtype == torch.float32
    expected: LossSum = objective(contrastive_batch(pool, embeddings, known))
    (expected.total / 2).backward()
    assert float(result.loss.total.detach()) == pytest.approx(float(expected.total.detach()), rel=1e-6)
    assert result.loss.denominator == 2
    assert table.weight.grad is not None and other.weight.grad is not None
    torch.testing.assert_close(table.weight.grad, other.weight.grad)
    assert torch.equal(result.queries, embeddings[pool.queries].detach())
    assert torch.equal(result.documents, embeddings[pool.documents].detach())
    assert result.queries.dtype == torch.float32, "the loss is taken in float32"
    assert not result.queries.requires_grad and not result.documents.requires_grad
    if keep_graph:
        assert len(pushed) == 1
        assert asked == [True, True]
    else:
        assert len(pushed) == 2, "one graph at a time"
        assert asked == [False, False, True, True]
        assert draws[:2] == draws[2:], "the second encoding draws what the first drew"
    assert draws[0] != draws[1]
    for number, draw in enumerate(draws[:2]):
        seed_chunk(3, 5, number)
        assert float(torch.rand(())) == draw


def test_a_loss_that_is_not_finite_is_only_told(tokens: TokenCache, pool: Pool) -> None:
    chunks = [np.arange(5)]
    features = [chunk_features(pool, chunks[0], tokens, Padding(0, "right", CPU))]

    def objective(batch: ContrastiveBatch) -> LossSum:
        return LossSum(batch.queries.sum() * float("nan"), 2.0, torch.tensor([float("nan"), 1.0]))

    def backward(loss: Tensor) -> None:
        raise AssertionError("nothing may be pushed back")

    none = np.zeros(0, dtype=np.int64)
    result = run_step(
        Table(), objective, backward, pool, features, chunks, [none, none], seed=0, step=0, keep_graph=True
    )
    assert torch.isnan(result.loss.total)
    assert result.queries.shape == (2, 3)
