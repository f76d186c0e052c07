"""The functions that the loop is made of, one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfield.arrays import Rows
from nearfield.batching.plan import Batch
from nearfield.errors import BadInputError, NonFiniteError
from nearfield.objectives import ContrastiveBatch, LossSum, diagnostics
from nearfield.objectives.diagnostics import similarities
from nearfield.training import TrainingConfig
from nearfield.training.chunks import TextPool, TrainingData
from nearfield.training.config import AdamWConfig
from nearfield.training.diagnostics import non_finite_error
from nearfield.training.engine import Engine, open_backend, pick_device, pick_precision
from nearfield.training.launch import Launch
from nearfield.training.memory import FAST_MICRO_BATCH_TOKENS, Budget
from nearfield.training.optimizers import make_optimizer
from nearfield.training.step import ControlWord, StepResult
from nearfield.training.trainer import TrainingInputs, halve_budget
from tests.training.making import SIZES, make_tokens

NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "cuda", "native", "device", "precision"),
    [
        ({}, False, False, "cpu", "fp32"),
        ({"precision": "bf16-mixed"}, False, False, "cpu", "bf16-mixed"),
        ({"precision": "bf16-pure"}, False, False, "cpu", "bf16-pure"),
        ({}, True, True, "cuda:0", "bf16-mixed"),
        ({}, True, False, "cuda:0", "fp32"),
        ({"device": "cuda", "precision": "fp32"}, True, True, "cuda:0", "fp32"),
        ({"device": "cpu"}, True, True, "cpu", "fp32"),
    ],
    ids=str,
)
def test_device_and_precision(
    settings: dict[str, str], cuda: bool, native: bool, device: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    config = TrainingConfig.model_validate(settings)
    found = pick_device(config, Launch())
    assert found == torch.device(device)
    assert pick_precision(config, found) == precision


def test_devices_that_are_not_here_and_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInputError) as error:
        pick_device(TrainingConfig(device="cuda"), Launch())
    assert error.value.what == "training.device is cuda, but no CUDA device is here"
    assert error.value.hint == "Use training.device=auto."
    assert pick_device(TrainingConfig(), Launch(3, 4, 3)) == torch.device("cpu"), "several processes share one CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(TrainingConfig(), Launch(3, 4, 1)) == torch.device("cuda", 1)
    with pytest.raises(BadInputError) as error:
        pick_device(TrainingConfig(), Launch(2, 4, 2))
    assert error.value.what == "local rank 2 has no GPU: 2 are here"
    assert error.value.hint == "Start one process a GPU."


@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero2", "zero3"])
def test_one_process_has_nothing_to_spread(name: Any) -> None:
    module: Any = torch.nn.Linear(2, 2)
    with pytest.raises(BadInputError) as error:
        open_backend(name, TrainingConfig(), module, torch.optim.SGD, torch.device("cpu"), Launch())  # type: ignore[arg-type]
    assert error.value.what == f"{name} spreads a model over several processes, and there is one"
    assert error.value.where == "training.backend"
    assert error.value.hint is not None
    assert f"accelerate launch --config_file training/accelerate/{name}.yaml" in error.value.hint


def test_default_chunks() -> None:
    assert FAST_MICRO_BATCH_TOKENS == {"cpu": 512, "cuda": 16_384}


def test_budgets_are_halved_down_to_the_smallest() -> None:
    budget = Budget(100, 1001)
    assert Budget.from_json({**budget.to_json(), "step": 3}) == budget
    seen = []
    while budget is not None:
        seen.append((budget.micro_batch_tokens, budget.graph_tokens))
        budget = budget.halved()  # type: ignore[assignment]
    assert seen == [(100, 1001), (50, 500), (25, 250), (16, 125)]
    with pytest.raises(BadInputError) as error:
        halve_budget(Budget(16, 125), 4)
    assert error.value.what == "memory ran out in step 5 with 16 tokens at a time, and less is no use"
    assert error.value.where == "training.max_length"
    assert error.value.hint is not None
    assert "Lower training.max_length" in error.value.hint


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
        found, batch = inputs.batch_of_step(step)
        assert found == epoch
        assert batch.query.tolist() == inputs.plans[epoch].batch(inner).query.tolist()
    with pytest.raises(IndexError, match="the plans have fewer steps"):
        inputs.batch_of_step(6)


def test_lengths_are_those_with_the_prompt() -> None:
    items, prompts = np.array([3, 9, 3, 0]), np.array([1, 0, 0, 1])
    nothing: Any = None
    part = Engine(
        nothing, nothing, nothing, Launch(), TrainingData(make_tokens()), "varlen", False, 3, TrainingConfig()
    )
    none = np.zeros(0, dtype=np.int64)
    lengths = part.lengths(TextPool(items, prompts, none, none, none, none.astype(bool)))
    assert lengths.tolist() == (SIZES[items] + prompts).tolist()
    assert lengths.dtype == np.int64


def test_similarities_of_queries_and_documents() -> None:
    """Rows of several lengths; the hardest of the first query is its own negative, of the second another's positive."""
    queries = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    documents = torch.tensor([[0.6, 0.8], [4.0, 3.0], [0.0, -5.0], [-1.0, 0.0]])
    figures = similarities(seen(queries, documents))
    assert set(figures) == {"positive_similarity", "hardest_negative_similarity"}
    assert figures["positive_similarity"] == pytest.approx((0.6 - 1.0) / 2)
    assert figures["hardest_negative_similarity"] == pytest.approx((0.8 + 0.8) / 2)


def seen(queries: torch.Tensor, documents: torch.Tensor) -> ContrastiveBatch:
    """Each query brought a positive and a negative."""
    owner = torch.arange(len(queries)).repeat_interleave(2)
    positive = torch.arange(len(documents)) % 2 == 0
    ids = torch.arange(len(documents))
    return ContrastiveBatch(queries, documents, owner, positive, ids, ids[::2, None])


def test_of_many_queries_some_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw of them; all documents are looked at."""
    angles = torch.arange(9.0) / 10
    queries = torch.stack([angles.cos(), angles.sin()], dim=1)
    documents = torch.eye(2).repeat(9, 1)
    whole = similarities(seen(queries, documents))
    assert whole["positive_similarity"] == pytest.approx(float(angles.cos().mean()))
    monkeypatch.setattr(diagnostics, "ROWS", 3)
    part = similarities(seen(queries, documents))
    drawn = diagnostics.sample(9, 3, None, "rows")
    assert part["positive_similarity"] == pytest.approx(float(angles[drawn].cos().mean()))


class Told(torch.nn.Module):
    """An objective that says what it was told to."""

    def __init__(self, rows: list[float]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        return LossSum(self.rows.sum(), len(self.rows), self.rows)


def broken(count: int, loss: float) -> tuple[Batch, StepResult]:
    numbers: Rows = np.arange(count)
    batch = Batch(numbers + 100, numbers, [], [], numbers, numbers, 0)
    word = ControlWord(loss * count, False, False, ())
    return batch, StepResult(word, count, seen(torch.zeros(count, 2), torch.zeros(2 * count, 2)))


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
    batch, result = broken(len(rows), loss)
    error = non_finite_error(tmp_path, 7, batch, result, inputs, Told(rows), norm, writes=False)
    assert not (tmp_path / "non_finite.json").exists(), "one rank writes it"
    error = non_finite_error(tmp_path, 7, batch, result, inputs, Told(rows), norm, writes=True)
    assert isinstance(error, NonFiniteError)
    assert error.exit_code == 4
    assert error.what == what
    assert error.where == str(tmp_path / "non_finite.json")
    assert error.hint is not None
    assert error.hint.startswith("The state before that step is in checkpoints/step-00000007. ")
    assert json.loads((tmp_path / "non_finite.json").read_text()) == {
        "step": 8,
        "loss": str(loss),
        "gradient_norm": str(norm),
        "examples": [100 + slot for slot in slots],
        "queries": [f"id{slot}" for slot in slots],
    }
