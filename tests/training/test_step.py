"""One step on an encoder small enough to follow by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nearfield.arrays import Ragged, Rows
from nearfield.data.tokens import TokenCache, TokenTable
from nearfield.encoders.packing import Features
from nearfield.objectives import ContrastiveBatch, InfoNCEConfig, LossSum, Objective
from nearfield.training import TrainingConfig
from nearfield.training import step as module
from nearfield.training.backends.replicated import ReplicatedBackend
from nearfield.training.chunks import Cut, TextPool, TrainingData, Work, contrastive_batch, cut_work
from nearfield.training.engine import Engine
from nearfield.training.launch import Launch
from nearfield.training.step import (
    ControlWord,
    StepResult,
    is_out_of_memory,
    mean_result,
    run_step,
    seed_chunk,
)

CPU = torch.device("cpu")


@pytest.fixture()
def tokens() -> TokenCache:
    """Items 0, 1, 2 without a prompt (1, 2 and 3 tokens), and 1, 2 with a prompt of two tokens (3 and 4)."""
    cache = object.__new__(TokenCache)
    ids = np.array([10, 20, 21, 30, 31, 32, 8, 9, 20, 8, 9, 30, 31], dtype=np.int32)
    cache.tables = [
        TokenTable(np.array([0, 1, 2]), Ragged(np.array([0, 1, 3, 6]), ids[:6]), prompt="", prompt_length=0),
        TokenTable(np.array([1, 2]), Ragged(np.array([0, 3, 7]), ids[6:]), prompt="p: ", prompt_length=2),
    ]
    return cache


@pytest.fixture()
def pool() -> TextPool:
    """Two queries; the first has a positive and a negative, the second the first query's text as its positive."""
    return TextPool(
        items=np.array([0, 1, 2, 1, 2]),
        prompts=np.array([0, 0, 0, 1, 1]),
        queries=np.array([0, 2]),
        documents=np.array([3, 4, 0]),
        owner=np.array([0, 0, 1]),
        is_positive=np.array([True, False, True]),
    )


class PlainEncoder(list[Any]):
    """As much of a sentence-transformers model as says how texts are padded."""

    tokenizer: Any


def padding_engine(tokens: TokenCache, pad: int | None, side: str) -> Engine:
    """As much of an engine as turns texts into padded features."""
    encoder = PlainEncoder([SimpleNamespace()])
    encoder.tokenizer = SimpleNamespace(pad_token_id=pad, padding_side=side)
    backend: Any = SimpleNamespace(device=CPU)
    return Engine(backend, encoder, Objective(), Launch(), TrainingData(tokens), None, False, 3, TrainingConfig())  # type: ignore[arg-type]


def test_features_are_padded_on_the_right(tokens: TokenCache, pool: TextPool) -> None:
    features = padding_engine(tokens, 99, "right").make_features(pool)(np.array([2, 0, 1]))
    assert set(features) == {"input_ids", "attention_mask", "prompt_length"}
    assert features["input_ids"].tolist() == [[30, 31, 32], [10, 99, 99], [20, 21, 99]]
    assert features["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert features["input_ids"].dtype == features["attention_mask"].dtype == torch.int64
    assert features["prompt_length"] == 0


def test_features_are_padded_on_the_left(tokens: TokenCache, pool: TextPool) -> None:
    features = padding_engine(tokens, 99, "left").make_features(pool)(np.array([4, 3]))
    assert features["input_ids"].tolist() == [[8, 9, 30, 31], [99, 8, 9, 20]]
    assert features["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert features["prompt_length"] == 2


def test_the_objective_sees_who_belongs_to_whom(pool: TextPool) -> None:
    embeddings = torch.arange(10.0).reshape(5, 2)
    batch = contrastive_batch(pool, embeddings, [np.array([1]), np.array([0, 7, 9])])
    assert batch.queries.tolist() == [[0, 1], [4, 5]]
    assert batch.documents.tolist() == [[6, 7], [8, 9], [0, 1]]
    assert batch.owner.tolist() == [0, 0, 1]
    assert batch.is_positive.tolist() == [True, False, True]
    assert batch.document_ids.tolist() == [1, 2, 0]
    assert batch.known_positives.tolist() == [[1, -1, -1], [0, 7, 9]]
    assert batch.known_positives.dtype == torch.int64
    assert batch.rows is None
    mine = contrastive_batch(pool, embeddings, [np.array([1]), np.array([0, 7, 9])], np.array([1]))
    assert mine.local_rows().tolist() == [1]
    assert mine.known_positives.tolist() == batch.known_positives.tolist(), "of all queries, not of the share"


def test_no_known_positive_masks_nothing(pool: TextPool) -> None:
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_work_is_the_same_on_every_rank_but_for_the_rank(tokens: TokenCache, pool: TextPool, ranks: int) -> None:
    lengths = np.array([1, 2, 3, 3, 4])
    cut, settings = Cut(5, 2), {"padded": True, "by_prompt": True}
    alone = cut_work(pool, lengths, cut, Launch(), **settings)
    works = [cut_work(pool, lengths, cut, Launch(rank, ranks), **settings) for rank in range(ranks)]
    assert [work.rank for work in works] == list(range(ranks))
    for work in works:
        assert [chunk.tolist() for chunk in work.chunks] == [chunk.tolist() for chunk in alone.chunks]
        assert work.tokens == alone.tokens
        assert work.shares == works[0].shares
        assert work.rounds == max(map(len, work.shares))
        assert work.heaviest == max(sum(work.tokens[n] for n in share) for share in work.shares)
        assert work.own == work.shares[work.rank]
        assert work.pool_shares().own.tolist() == [int(i) for n in work.own for i in work.chunks[n]]
    owned = [row for work in works for row in work.pool_shares().own.tolist()]
    assert sorted(owned) == list(range(5)), "each text is encoded on one rank"


def test_a_batch_without_pictures_settles_too_where_others_of_the_step_may_have_some(pool: TextPool) -> None:
    cut, launch, settings = Cut(5), Launch(0, 2), {"padded": True, "by_prompt": True}
    lengths, none = np.array([1, 2, 3, 3, 4]), np.zeros(5, dtype=bool)
    texts = cut_work(pool, lengths, cut, launch, **settings, images=none, level=True)
    assert texts.kinds == [0] * len(texts.chunks)
    plain = cut_work(pool, lengths, cut, launch, **settings)
    assert plain.kinds is None and plain.shares == texts.shares
    assert [chunk.tolist() for chunk in texts.chunks] == [chunk.tolist() for chunk in plain.chunks]


class Table(nn.Module):
    """An embedding per first token in bfloat16, and a record of how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 3, generator=generator, dtype=torch.float64).float())
        self.grad_enabled: list[bool] = []
        self.draws: list[float] = []

    def forward(self, features: Features) -> Tensor:
        self.grad_enabled.append(torch.is_grad_enabled())
        self.draws.append(float(torch.rand(())))
        ids, mask = features["input_ids"], features["attention_mask"]
        return (self.weight[ids] * mask[..., None]).sum(dim=1).bfloat16()


class Noting(ReplicatedBackend):
    """Notes what is pushed back."""

    def __init__(self, objective: nn.Module | None = None) -> None:
        self.table = Table()
        self.pushed: list[bool] = []
        whole = nn.ModuleDict({"table": self.table})
        if objective is not None:
            whole["objective"] = objective
        super().__init__(whole, lambda named: torch.optim.SGD([p for _, p in named], lr=1.0), CPU, 1, False)
        self.module = self.table

    def backward(self, scalar: Tensor, last: bool, settle: bool = False) -> None:
        assert scalar.shape == ()
        self.pushed.append(last)
        super().backward(scalar, last)


CHUNKS = [np.array([4, 3]), np.array([2, 1, 0])]
KNOWN = [np.array([1]), np.array([0])]


def by_hand(pool: TextPool, chunks: list[Rows] | None = None, known: list[Rows] | None = None) -> Work:
    chunks = CHUNKS if chunks is None else chunks
    return Work(pool, chunks, [8, 9][: len(chunks)], [list(range(len(chunks)))], 0, KNOWN if known is None else known)


def take(
    backend: ReplicatedBackend, objective: Objective, tokens: TokenCache, work: Work, **keywords: Any
) -> StepResult:
    engine = replace(padding_engine(tokens, 0, "right"), backend=backend, objective=objective)
    return run_step(engine, work, **{"seed": 3, "step": 5, **keywords})


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_the_gradient_and_what_the_step_tells(
    tokens: TokenCache, pool: TextPool, keep_graph: bool, learnt: bool
) -> None:
    objective = InfoNCEConfig(temperature=0.5, learn_temperature=learnt).build()
    backend = Noting(objective)
    table = backend.table
    result = take(backend, objective, tokens, by_hand(pool), keep_graph=keep_graph)
    asked, draws = table.grad_enabled, list(table.draws)
    make = padding_engine(tokens, 0, "right").make_features(pool)
    other = Table()
    embeddings = torch.cat([other(make(np.array([i]))).float() for i in range(5)])
    plain = InfoNCEConfig(temperature=0.5, learn_temperature=learnt).build()
    expected: LossSum = plain(contrastive_batch(pool, embeddings, KNOWN))
    (expected.total / 2).backward()
    assert result.word.loss == pytest.approx(float(expected.total.detach()), rel=1e-6)
    assert result.denominator == 2
    assert result.loss == result.word.loss / 2
    assert not result.word.out_of_memory and not result.word.stop
    assert result.word.used == (True,) * (1 + learnt)
    assert table.weight.grad is not None and other.weight.grad is not None
    torch.testing.assert_close(table.weight.grad, other.weight.grad)
    for ours, theirs in zip(objective.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert result.batch is not None
    assert torch.equal(result.batch.queries, embeddings[pool.queries].detach())
    assert torch.equal(result.batch.documents, embeddings[pool.documents].detach())
    assert result.batch.queries.dtype == torch.float32, "the loss is taken in float32"
    assert not result.batch.queries.requires_grad and not result.batch.documents.requires_grad
    if keep_graph:
        assert backend.pushed == [True]
        assert asked == [True, True]
    else:
        assert backend.pushed == [False, True], "one graph at a time"
        assert asked == [False, False, True, True]
        assert draws[:2] == draws[2:], "the second encoding draws what the first drew"
    assert draws[0] != draws[1]
    for number, draw in enumerate(draws[:2]):
        seed_chunk(3, 5, number)
        assert float(torch.rand(())) == draw


def test_a_signal_is_in_the_control_word(tokens: TokenCache, pool: TextPool) -> None:
    backend, objective = Noting(), InfoNCEConfig().build()
    result = take(backend, objective, tokens, by_hand(pool), keep_graph=True, stop=lambda: True)
    assert result.word.stop
    assert math.isfinite(result.loss)


class Nan(Objective):
    """A loss that is none."""

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        return LossSum(batch.queries.sum() * math.nan, 2.0, torch.tensor([math.nan, 1.0]))


@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_loss_that_is_not_finite_is_told(tokens: TokenCache, pool: TextPool, keep_graph: bool) -> None:
    none = np.zeros(0, dtype=np.int64)
    work = by_hand(pool, [np.arange(5)], [none, none])
    result = take(Noting(), Nan(), tokens, work, keep_graph=keep_graph)
    assert math.isnan(result.word.loss) and math.isnan(result.loss)
    assert not result.word.out_of_memory
    assert result.batch is not None
    assert result.batch.queries.shape == (2, 3)


# Where memory can run out. Each names what fails, and at which of its calls.
PLACES = [("first pass", 0), ("first pass", 1), ("objective", 0), ("backward", 0), ("second pass", 2), ("backward", 1)]
ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: MemoryError(),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


class FailingAt:
    """A function that raises at one of its calls."""

    def __init__(self, function: Callable[..., Any], call: int, make: Callable[[], BaseException]) -> None:
        self.function, self.call, self.make = function, call, make
        self.calls = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.call:
            raise self.make()
        return self.function(*arguments, **keywords)


def inject(
    monkeypatch: pytest.MonkeyPatch, backend: Noting, objective: nn.Module, place: str, failing: int, error: Any
) -> None:
    if place == "objective":
        monkeypatch.setattr(objective, "forward", FailingAt(objective.forward, failing, error))
    elif place == "backward":
        monkeypatch.setattr(backend, "backward", FailingAt(backend.backward, failing, error))
    else:
        monkeypatch.setattr(module, "encode_chunk", FailingAt(module.encode_chunk, failing, error))


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "python", "cpu allocator"])
@pytest.mark.parametrize(("place", "failing"), PLACES, ids=str)
def test_memory_that_runs_out_is_told_and_the_step_can_be_repeated(
    tokens: TokenCache,
    pool: TextPool,
    place: str,
    failing: int,
    error: Callable[[], BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = InfoNCEConfig(temperature=0.5).build()
    plain, backend = Noting(), Noting()
    expected = take(plain, objective, tokens, by_hand(pool), keep_graph=False)
    with monkeypatch.context() as patch:
        inject(patch, backend, objective, place, failing, error)
        result = take(backend, objective, tokens, by_hand(pool), keep_graph=False, stop=lambda: True)
    assert result.word.out_of_memory
    assert result.word.stop, "the rest of the word is told all the same"
    assert result.batch is None
    backend.begin()
    again = take(backend, objective, tokens, by_hand(pool), keep_graph=False)
    assert again.loss == expected.loss
    assert plain.table.weight.grad is not None
    assert backend.table.weight.grad is not None
    assert torch.equal(backend.table.weight.grad, plain.table.weight.grad)


@pytest.mark.parametrize(("place", "failing"), PLACES, ids=str)
def test_memory_that_runs_out_between_collectives_is_an_error(
    tokens: TokenCache, pool: TextPool, place: str, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, objective = Noting(), InfoNCEConfig().build()
    inject(monkeypatch, backend, objective, place, failing, MemoryError)
    backend.retries_in_place = False
    with pytest.raises(MemoryError):
        take(backend, objective, tokens, by_hand(pool), keep_graph=False)


def test_other_errors_are_not_taken_for_it(tokens: TokenCache, pool: TextPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(KeyError("memory"))
    backend, objective = Noting(), InfoNCEConfig().build()
    inject(monkeypatch, backend, objective, "second pass", 2, lambda: RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        take(backend, objective, tokens, by_hand(pool), keep_graph=False)


def test_the_mean_of_several_batches() -> None:
    def result(loss: float, used: tuple[bool, ...], *, memory: bool = False, stop: bool = False) -> StepResult:
        batch = ContrastiveBatch(*[torch.tensor([loss])] * 6)
        return StepResult(ControlWord(loss, memory, stop, used), 4.0, batch)

    one = result(8.0, (True,))
    assert mean_result([one]) is one
    two = mean_result([result(8.0, (True, False)), result(2.0, (True, True), stop=True)])
    assert two.loss == (8.0 / 4 + 2.0 / 4) / 2
    assert two.word == ControlWord(two.loss, False, True, (True, True))
    assert two.batch is not None and two.batch.queries.item() == 2.0
    broken = mean_result([result(math.nan, (True,)), result(2.0, (True,), memory=True)])
    assert math.isnan(broken.loss)
    assert broken.word.out_of_memory
    assert broken.batch is not None and math.isnan(broken.batch.queries.item()), "the one that explains it"


@pytest.mark.parametrize("keep_graph", [True, False])
def test_batches_of_a_step_add_up_with_their_weights(tokens: TokenCache, pool: TextPool, keep_graph: bool) -> None:
    objective = InfoNCEConfig(temperature=0.5).build()
    backend, once = Noting(), Noting()
    take(once, objective, tokens, by_hand(pool), keep_graph=keep_graph)
    for final in (False, True):
        work = replace(by_hand(pool), weight=0.5, final=final)
        take(backend, objective, tokens, work, keep_graph=keep_graph)
    assert backend.pushed == ([False, True] if keep_graph else [False, False, False, True])
    assert backend.table.weight.grad is not None and once.table.weight.grad is not None
    torch.testing.assert_close(backend.table.weight.grad, once.table.weight.grad)


def test_chunks_of_a_step_are_numbered_through(tokens: TokenCache, pool: TextPool) -> None:
    backend, objective = Noting(), InfoNCEConfig().build()
    work = Work(pool, CHUNKS, [8, 9], [[0, 1]], 0, KNOWN, first_number=7)
    take(backend, objective, tokens, work, keep_graph=True)
    for number, draw in zip((7, 8), backend.table.draws, strict=True):
        seed_chunk(3, 5, number)
        assert float(torch.rand(())) == draw


def test_what_examples_count_and_a_guides_vectors_reach_the_objective(pool: TextPool) -> None:
    vectors = {"query": np.arange(20.0, dtype=np.float32).reshape(10, 2), "document": np.ones((10, 3), np.float32)}
    heavy = replace(pool, weights=np.array([0.5, 2.0]), sources=np.array([3, 1]))
    batch = contrastive_batch(
        heavy, torch.zeros(5, 2), [], guide=lambda role, rows: vectors[role][rows].astype(np.float32)
    )
    assert batch.weights is not None and batch.sources is not None and batch.guide_queries is not None
    assert batch.weights.tolist() == [0.5, 2.0] and batch.denominator() == 2.5
    assert batch.sources.tolist() == [3, 1]
    assert batch.guide_queries.tolist() == vectors["query"][pool.items[pool.queries]].tolist()
    assert contrastive_batch(pool, torch.zeros(5, 2), []).denominator() == 2.0
