"""The memory of the loss, foretold from a part of a batch, is what the whole takes."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nearfield.batching.plan import Batch
from nearfield.objectives import ContrastiveBatch, InfoNCEConfig, LossSum, Objective
from nearfield.training import TrainingConfig, memory
from nearfield.training.chunks import TrainingData
from nearfield.training.engine import Engine
from nearfield.training.launch import Launch
from nearfield.training.memory import LossCost, measure_loss
from tests.training.making import make_tokens

CPU = torch.device("cpu")
DIMENSION = 64
RICH = {
    "learn_temperature": True,
    "directions": ["query_document", "query_query", "document_query"],
    "score_mask": {"margin": 0.1},
    "matryoshka": {"dimensions": [16, 64]},
}


def make_engine(objective: Objective, ranks: int = 1) -> Engine:
    backend: Any = SimpleNamespace(device=CPU, whole=lambda learnt: contextlib.nullcontext())
    encoder: Any = None
    return Engine(
        backend,
        encoder,
        objective,
        Launch(0, ranks),
        TrainingData(make_tokens()),
        None,
        False,
        DIMENSION,
        TrainingConfig(),
    )


def make_batch(size: int) -> Batch:
    """Each query with a positive and a negative of its own."""
    rows = np.arange(size)
    zeros = np.zeros(size, dtype=np.int64)
    positives, negatives = ([np.array([row + start]) for row in rows] for start in (size, 2 * size))
    return Batch(rows, rows, positives, negatives, zeros, zeros, 0)


def none(query: int) -> np.ndarray[Any, Any]:
    return np.zeros(0, dtype=np.int64)


@pytest.mark.parametrize("settings", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("name", ["dense", "blockwise"])
def test_a_part_foretells_the_whole(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = InfoNCEConfig.model_validate({"implementation": name, **settings}).build()
    objective.tile = 384
    monkeypatch.setattr(memory, "_CELLS", 1 << 17)
    engine, batch = make_engine(objective), make_batch(800)
    cost = measure_loss(engine, [batch])
    assert set(cost.lines) == {name} and (objective.tile, objective.implementation) == (384, name)
    true = memory._loss_bytes(engine, batch)
    assert true <= cost(batch) * 1.05
    assert cost(batch) <= true * 1.3


def test_tiles_take_memory_by_texts_and_a_matrix_by_cells() -> None:
    found = {}
    for name in ("dense", "blockwise"):
        objective = InfoNCEConfig.model_validate({"implementation": name}).build()
        cost = measure_loss(make_engine(objective), [make_batch(200)])
        found[name] = cost(make_batch(16_000)) / cost(make_batch(8_000))
    assert found["dense"] > 3.5
    assert found["blockwise"] < 2.1


def test_ranks_share_the_rows() -> None:
    objective = InfoNCEConfig(implementation="dense").build()
    lines = measure_loss(make_engine(objective), [make_batch(200)]).lines
    one, four = (LossCost(lines, [objective], CPU, ranks)(make_batch(4_000)) for ranks in (1, 4))
    assert 3 < one / four < 4


def test_a_ring_takes_two_parts_of_the_batch() -> None:
    objective = InfoNCEConfig(implementation="blockwise").build()
    objective.tile = 256
    lines = measure_loss(make_engine(objective), [make_batch(200)]).lines
    batch = make_batch(40_000)
    whole, ring = (LossCost(lines, [objective], CPU, 8, ring=passed) for passed in (False, True))
    assert ring.size(batch, "blockwise") == (30_000, 256 * 256)
    assert ring(batch) < whole(batch) / 3


@pytest.mark.parametrize("settings", [{}, RICH], ids=["plain", "rich"])
def test_auto_holds_the_matrix_while_it_is_small(settings: dict[str, Any]) -> None:
    objective = InfoNCEConfig.model_validate(settings).build()
    small, large = make_batch(100), make_batch(20_000)
    assert [LossCost({}, [objective], CPU, 1).implementation(b) for b in (small, large)] == ["dense", "blockwise"]
    assert LossCost({}, [], CPU, 1).implementation(large) == "dense"
    cost = measure_loss(make_engine(objective), [small])
    assert set(cost.lines) == {"dense"}
    assert cost(small) > 0


@pytest.mark.parametrize("settings", [{}, RICH, {"shared_negatives": False}, {"in_batch_negatives": False}], ids=str)
def test_counted_logits_are_those_of_the_blocks(settings: dict[str, Any]) -> None:
    from nearfield.objectives import infonce
    from nearfield.training.chunks import contrastive_batch

    objective = InfoNCEConfig.model_validate({"implementation": "dense", **settings}).build()
    engine, batch = make_engine(objective), make_batch(30)
    pool = engine.pool(batch)
    seen: list[int] = []
    objective.choose = lambda cells, device: seen.append(cells) or "dense"  # type: ignore[method-assign,func-returns-value,assignment]
    objective(contrastive_batch(pool, torch.randn(len(pool.items), DIMENSION), [none(0)] * 30))
    assert seen == [objective.logits(30, 30, 30)]
    assert infonce.DENSE_CELLS["cpu"] < infonce.DENSE_CELLS["cuda"]


def test_any_other_objective_is_measured_by_its_cells() -> None:
    class Sum(Objective):
        def forward(self, batch: ContrastiveBatch) -> LossSum:
            total = (batch.queries @ batch.documents.T).exp().sum()
            return LossSum(total, 1.0, total.detach()[None])

    cost = measure_loss(make_engine(Sum()), [make_batch(300)])
    assert cost(make_batch(600)) > 3 * cost(make_batch(300)) > 0
