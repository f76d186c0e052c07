"""The gradient of a step is that of one forward over the whole batch, however the batch is cut or cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfield.batching.plan import Batch
from nearfield.data.tokens import TokenCache, TokenTable
from nearfield.encoders import load_encoder
from nearfield.objectives import InfoNCEConfig
from nearfield.training import step as step_module
from nearfield.training.chunks import Pool, cut_chunks, pool_batch
from nearfield.training.step import Features, Padding, StepResult, chunk_features, contrastive_batch, run_step

pytestmark = pytest.mark.conformance


@dataclass
class Setup:
    """A tiny encoder in float64 with a batch of ragged texts."""

    model: torch.nn.Module
    pool: Pool
    tokens: TokenCache
    lengths: np.ndarray
    known: list[np.ndarray]
    seed: int = 5

    def encode(self, features: Features) -> Tensor:
        return self.model(dict(features))["sentence_embedding"]

    def gradients(
        self, budget: int, *, keep_graph: bool, dropout: bool = False, step: int = 3
    ) -> tuple[StepResult, dict[str, Tensor]]:
        self.model.train(dropout)
        self.model.zero_grad()
        chunks = cut_chunks(self.lengths, budget)
        padding = Padding(0, "right", torch.device("cpu"))
        result = run_step(
            self.encode,
            InfoNCEConfig(temperature=0.1, both_directions=True).build(),
            lambda loss: loss.backward(),
            self.pool,
            [chunk_features(self.pool, chunk, self.tokens, padding) for chunk in chunks],
            chunks,
            self.known,
            seed=self.seed,
            step=step,
            keep_graph=keep_graph,
        )
        return result, {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture()
def setup(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Eight queries with one or two positives and up to two negatives; texts of 3 to 20 tokens; one text in two roles."""
    # The step takes the loss in float32, as it must under autocast; here everything stays in float64.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    model = load_encoder(str(tiny_model), device="cpu").model.double()
    random = np.random.default_rng(0)
    sizes = random.integers(3, 21, size=40)
    ids = [np.r_[2, random.integers(5, 200, size=size - 2), 3].astype(np.int32) for size in sizes]
    rows = np.arange(40)
    table = TokenTable("", 0, rows, np.r_[0, np.cumsum(sizes)], np.concatenate(ids))
    tokens = object.__new__(TokenCache)
    tokens.tables = [table]
    documents = iter(random.permutation(np.arange(8, 40)))
    positives = [np.array([next(documents) for _ in range(1 + row % 2)]) for row in range(8)]
    negatives = [np.array([next(documents) for _ in range(row % 3)], dtype=np.int64) for row in range(8)]
    positives[7] = np.array([0])  # the text of the first query is the document of the last
    zeros = np.zeros(8, dtype=np.int64)
    pool = pool_batch(Batch(np.arange(8), np.arange(8), positives, negatives, zeros, zeros, 0))
    known = [np.r_[positives[row], negatives[3][:1]] if row == 0 else positives[row] for row in range(8)]
    lengths = sizes[pool.items]
    return Setup(model, pool, tokens, lengths, known)


def reference(setup: Setup) -> tuple[float, dict[str, Tensor]]:
    """One padded forward over the pool in its own order, the loss, one backward."""
    setup.model.eval()
    setup.model.zero_grad()
    whole = np.arange(len(setup.pool.items))
    features = chunk_features(setup.pool, whole, setup.tokens, Padding(0, "right", torch.device("cpu")))
    loss = InfoNCEConfig(temperature=0.1, both_directions=True).build()(
        contrastive_batch(setup.pool, setup.encode(features), setup.known)
    )
    (loss.total / loss.denominator).backward()
    return float(loss.total.detach()), {
        name: p.grad.clone() for name, p in setup.model.named_parameters() if p.grad is not None
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("keep_graph", [True, False], ids=["kept", "cached"])
@pytest.mark.parametrize("budget", [16, 60, 10_000], ids=["one text a chunk", "chunks", "whole"])
def test_chunked_equals_unchunked(setup: Setup, budget: int, keep_graph: bool) -> None:
    expected_loss, expected = reference(setup)
    result, gradients = setup.gradients(budget, keep_graph=keep_graph)
    assert float(result.loss.total.detach()) == pytest.approx(expected_loss, rel=1e-12)
    assert_same(gradients, expected, 1e-11)


def test_cached_equals_kept_with_dropout(setup: Setup) -> None:
    kept_loss, kept = setup.gradients(60, keep_graph=True, dropout=True)
    cached_loss, cached = setup.gradients(60, keep_graph=False, dropout=True)
    assert float(kept_loss.loss.total.detach()) == float(cached_loss.loss.total.detach())
    assert_same(cached, kept, 1e-11)
    _, without = setup.gradients(60, keep_graph=True, dropout=False)
    with pytest.raises(AssertionError):
        assert_same(without, kept, 1e-3)


def test_a_broken_replay_is_noticed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second encoding drew other masks, the equality above would fail."""
    _, kept = setup.gradients(60, keep_graph=True, dropout=True)
    calls = iter(range(10_000))
    seed_chunk: Callable[[int, int, int], None] = step_module.seed_chunk
    monkeypatch.setattr(step_module, "seed_chunk", lambda seed, step, chunk: seed_chunk(seed, next(calls), chunk))
    _, broken = setup.gradients(60, keep_graph=False, dropout=True)
    with pytest.raises(AssertionError):
        assert_same(broken, kept, 1e-3)


def test_dropout_depends_on_seed_step_and_chunk_alone(setup: Setup) -> None:
    losses = {}
    for seed, step in ((5, 3), (5, 4), (6, 3), (5, 3)):
        setup.seed = seed
        torch.rand(7)  # the global generator is somewhere else each time
        losses.setdefault((seed, step), []).append(
            float(setup.gradients(60, keep_graph=True, dropout=True, step=step)[0].loss.total.detach())
        )
    assert losses[5, 3][0] == losses[5, 3][1]
    assert len({values[0] for values in losses.values()}) == 3


def test_gradients_add_up(setup: Setup) -> None:
    """The step adds to the gradient that is there, so that losses can be summed."""
    _, once = setup.gradients(60, keep_graph=True)
    for parameter in setup.model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
    chunks = cut_chunks(setup.lengths, 60)
    features = [
        chunk_features(setup.pool, chunk, setup.tokens, Padding(0, "right", torch.device("cpu"))) for chunk in chunks
    ]
    objective = InfoNCEConfig(temperature=0.1, both_directions=True).build()
    run_step(
        setup.encode,
        objective,
        lambda loss: loss.backward(),
        setup.pool,
        features,
        chunks,
        setup.known,
        seed=5,
        step=3,
        keep_graph=False,
    )
    twice = {name: p.grad for name, p in setup.model.named_parameters() if p.grad is not None}
    assert_same(twice, {name: 2 * g for name, g in once.items()}, 1e-11)


def test_a_non_finite_loss_pushes_nothing_back(setup: Setup) -> None:
    with torch.no_grad():
        next(setup.model.parameters()).fill_(float("nan"))
    result, gradients = setup.gradients(60, keep_graph=True)
    assert not torch.isfinite(result.loss.total)
    assert gradients == {}
