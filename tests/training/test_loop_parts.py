"""The functions that the loop is made of, one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfield.batching.plan import Batch
from nearfield.batching.planner import Rows
from nearfield.errors import BadInputError, NonFiniteError
from nearfield.objectives.infonce import LossSum
from nearfield.training import TrainingConfig, loop
from nearfield.training.loop import TrainingInputs
from nearfield.training.optimizer_configs import AdamWConfig
from nearfield.training.optimizers import make_optimizer
from nearfield.training.step import StepResult
from tests.training.making import SIZES, make_tokens


class FakeAccelerator:
    """Notes how it was asked."""

    num_processes = 1

    def __init__(self, **asked: Any) -> None:
        self.asked = asked


@pytest.mark.parametrize(
    ("settings", "cuda", "native", "expected"),
    [
        ({}, False, False, {"cpu": True, "mixed_precision": "no"}),
        ({"precision": "bf16"}, False, False, {"cpu": True, "mixed_precision": "bf16"}),
        ({}, True, True, {"cpu": False, "mixed_precision": "bf16"}),
        ({}, True, False, {"cpu": False, "mixed_precision": "no"}),
        ({"device": "cuda", "precision": "fp32"}, True, True, {"cpu": False, "mixed_precision": "no"}),
        ({"device": "cpu"}, True, True, {"cpu": True, "mixed_precision": "no"}),
    ],
    ids=str,
)
def test_device_and_precision(
    settings: dict[str, str], cuda: bool, native: bool, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(loop, "Accelerator", FakeAccelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert loop._accelerator(TrainingConfig.model_validate(settings)).asked == expected  # type: ignore[attr-defined]


def test_devices_that_are_not_here_and_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInputError) as error:
        loop._accelerator(TrainingConfig(device="cuda"))
    assert error.value.what == "training.device is cuda, but no CUDA device is here"
    assert error.value.hint == "Use training.device=auto."
    monkeypatch.setattr(FakeAccelerator, "num_processes", 4)
    monkeypatch.setattr(loop, "Accelerator", FakeAccelerator)
    with pytest.raises(BadInputError) as error:
        loop._accelerator(TrainingConfig())
    assert error.value.what == "training runs in one process, and the launcher started 4"
    assert error.value.hint == "Start it with `nearfield train RECIPE`."


def test_default_chunks() -> None:
    assert loop.DEFAULT_CHUNK_TOKENS == {"cpu": 512, "cuda": 16_384}


def test_optimizer_settings() -> None:
    adamw = AdamWConfig(betas=(0.7, 0.8), epsilon=1e-4, weight_decay=0.25)
    config = TrainingConfig(learning_rate=0.5, optimizer=adamw)
    model = torch.nn.Linear(3, 2)
    model.frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    matrices, vectors = make_optimizer(model.named_parameters(), config, torch.device("cpu")).param_groups
    assert [len(group["params"]) for group in (matrices, vectors)] == [1, 1]
    assert matrices["params"][0] is model.weight
    assert vectors["params"][0] is model.bias
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)
    for group in (matrices, vectors):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.7, 0.8), 1e-4, True)
    other = make_optimizer(model.named_parameters(), config, torch.device("meta"))
    assert not other.param_groups[0]["fused"]


def test_steps_run_through_the_epochs(inputs: TrainingInputs) -> None:
    for step, (epoch, inner) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        found, batch = loop.batch_of_step(inputs.plans, step)
        assert found == epoch
        assert batch.query.tolist() == inputs.plans[epoch].batch(inner).query.tolist()
    with pytest.raises(IndexError, match="the plans have fewer steps"):
        loop.batch_of_step(inputs.plans, 6)


def test_lengths_are_those_with_the_prompt() -> None:
    items, prompts = np.array([3, 9, 3, 0]), np.array([1, 0, 0, 1])
    lengths = loop._pool_lengths(make_tokens(), items, prompts)
    assert lengths.tolist() == (SIZES[items] + prompts).tolist()
    assert lengths.dtype == np.int64


def test_similarities_of_queries_and_documents() -> None:
    """Rows of several lengths; the hardest of the first query is its own negative, of the second another's positive."""
    queries = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    documents = torch.tensor([[0.6, 0.8], [4.0, 3.0], [0.0, -5.0], [-1.0, 0.0]])
    result = StepResult(None, queries, documents)  # type: ignore[arg-type]
    figures = loop.watch(result, np.array([0, 0, 1, 1]), np.array([True, False, True, False]))
    assert set(figures) == {"positive_similarity", "hardest_negative_similarity"}
    assert figures["positive_similarity"] == pytest.approx((0.6 - 1.0) / 2)
    assert figures["hardest_negative_similarity"] == pytest.approx((0.8 + 0.8) / 2)


def broken(rows: list[float]) -> tuple[Batch, StepResult]:
    count = len(rows)
    numbers: Rows = np.arange(count)
    batch = Batch(numbers + 100, numbers, [], [], numbers, numbers, 0)
    loss = LossSum(torch.tensor(sum(rows)), count, torch.tensor(rows))
    return batch, StepResult(loss, torch.zeros(0), torch.zeros(0))


NAN = float("nan")


@pytest.mark.parametrize(
    ("rows", "loss", "norm", "what", "slots"),
    [
        ([0.5, NAN, 1.0, float("inf")], NAN, NAN, "the loss of step 8 is not finite; queries id1, id3", [1, 3]),
        ([0.5, 1.0], 0.75, float("inf"), "the gradient of step 8 is not finite; queries id0, id1", [0, 1]),
        ([NAN] * 3, NAN, 0.0, "the loss of step 8 is not finite; queries id0, id1, id2", [0, 1, 2]),
        ([1.0] * 5, 1.0, NAN, "the gradient of step 8 is not finite; queries id0, id1, id2 and 2 more", list(range(5))),
    ],
)
def test_what_is_not_finite_is_named(
    inputs: TrainingInputs, tmp_path: Path, rows: list[float], loss: float, norm: float, what: str, slots: list[int]
) -> None:
    batch, result = broken(rows)
    with pytest.raises(NonFiniteError) as error:
        loop._stop_non_finite(tmp_path, 7, batch, result, inputs, loss, norm)
    assert error.value.what == what
    assert error.value.where == str(tmp_path / "non_finite.json")
    assert error.value.hint is not None
    assert error.value.hint.startswith("The state before that step is in checkpoints/step-00000007. ")
    assert json.loads((tmp_path / "non_finite.json").read_text()) == {
        "step": 8,
        "loss": str(loss),
        "gradient_norm": str(norm),
        "examples": [100 + slot for slot in slots],
        "queries": [f"id{slot}" for slot in slots],
    }
