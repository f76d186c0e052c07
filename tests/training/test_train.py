"""``train`` called as a function: what it writes, tells, keeps and refuses."""

from __future__ import annotations

import json
import logging
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError, NonFiniteError, StoppedError
from nearfield.objectives import InfoNCEConfig
from nearfield.training import TrainingConfig, loop
from nearfield.training.checkpoint import checkpoint_paths
from nearfield.training.loop import TrainingInputs, TrainingResult, train
from nearfield.training.metrics import read_metrics
from nearfield.training.step import Padding
from tests.training.making import SIZES, make_plan

NAN = float("nan")


@pytest.fixture()
def go(tiny_model: Path, inputs: TrainingInputs, tmp_path: Path) -> Callable[..., TrainingResult]:
    """Train a fresh copy of the tiny model; keywords are settings, or parts of the call."""

    def go(
        *, seed: int = 5, fingerprint: str = "f", to: str = "run", model: Any = None, **settings: Any
    ) -> TrainingResult:
        config = TrainingConfig.model_validate({"trackers": [], "device": "cpu", **settings})
        fresh = load_encoder(str(tiny_model), device="cpu").model if model is None else model
        objective = InfoNCEConfig(temperature=0.1).build()
        return train(config, objective, fresh, inputs, tmp_path / to, seed=seed, fingerprint=fingerprint)

    return go


Go = Callable[..., TrainingResult]


def spy_on_steps(monkeypatch: pytest.MonkeyPatch, before: Callable[[dict[str, Any]], None] | None = None) -> list[Any]:
    """Every call of ``run_step`` from here on: its features, chunks, known positives and keywords."""
    calls: list[Any] = []
    run_step = loop.run_step

    def spy(encode, objective, backward, pool, features, chunks, known, **keywords):  # type: ignore[no-untyped-def]
        calls.append(SimpleNamespace(pool=pool, features=list(features), chunks=chunks, known=known, **keywords))
        if before is not None:
            before(keywords)
        return run_step(encode, objective, backward, pool, features, chunks, known, **keywords)

    monkeypatch.setattr(loop, "run_step", spy)
    return calls


def test_what_a_run_leaves_behind(go: Go, inputs: TrainingInputs, tmp_path: Path, tiny_model: Path) -> None:
    state = torch.random.get_rng_state()
    model = load_encoder(str(tiny_model), device="cpu").model
    schedule = {"kind": "linear", "warmup": 2}
    result = go(model=model, schedule=schedule, learning_rate=1e-3, log_every=4, checkpoints={"every_steps": 4})
    assert torch.equal(torch.random.get_rng_state(), state), "the process's generator is as it was"
    assert not model.training
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["epoch"]) for line in lines] == [(4, 1), (6, 1)], "every fourth, and the last"
    assert list(lines[0]) == [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "gradient_norm",
        "rows",
        "tokens",
        "padded_tokens",
        "seconds",
        "positive_similarity",
        "hardest_negative_similarity",
    ]
    assert result == TrainingResult(6, 0, 24, lines[-1]["loss"], result.seconds, "cpu", "fp32")
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * 3 / 4, 1e-3 / 4])
    assert [line["rows"] for line in lines] == [4, 4]
    plan = inputs.plans[1]
    assert [line["tokens"] for line in lines] == plan.tokens()[[0, 2]].tolist()
    assert all(line["padded_tokens"] >= line["tokens"] for line in lines)
    assert [path.name for path in checkpoint_paths(tmp_path / "run" / "checkpoints")] == [
        "step-00000004",
        "step-00000006",
    ]
    for step in (4, 6):
        saved = json.loads((tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
        assert saved == {
            "version": 1,
            "step": step,
            "fingerprint": "f",
            "plans": ["a", "b"],
            "seed": 5,
            "chunk_tokens": 512,
        }
    assert AcceleratorState._shared_state == {}
    assert PartialState._shared_state == {}


def test_seconds_are_those_of_the_steps(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one at each look: one look before the steps, two in each, one after."""
    ticks = iter(range(100, 1000))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    result = go(max_steps=3)
    assert result.seconds == 7.0
    assert [line["seconds"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1.0, 1.0, 1.0]


def test_a_step_gets_the_batch_of_the_plan(
    go: Go, inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    calls = spy_on_steps(monkeypatch)
    go(chunk_tokens=40)
    assert [call.step for call in calls] == [0, 1, 2, 3, 4, 5]
    assert {call.seed for call in calls} == {5}
    for call in calls:
        batch = inputs.plans[call.step // 3].batch(call.step % 3)
        assert call.pool.items[call.pool.queries].tolist() == batch.query.tolist()
        assert [known.tolist() for known in call.known] == [[query + 20] for query in batch.query.tolist()]
        assert sorted(np.concatenate(call.chunks).tolist()) == list(range(12))
        assert len(call.chunks) > 1
        for chunk, features in zip(call.chunks, call.features, strict=True):
            lengths = SIZES[call.pool.items[chunk]] + call.pool.prompts[chunk]
            assert features["attention_mask"].sum(dim=1).tolist() == lengths.tolist()
            assert features["input_ids"].numel() <= 40


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"gradient_cache": "never", "graph_tokens": 16}, True),
        ({"gradient_cache": "always"}, False),
        ({"gradient_cache": "auto"}, True),
        ({"gradient_cache": "auto", "graph_tokens": 16}, False),
    ],
    ids=str,
)
def test_when_the_graph_is_kept(go: Go, settings: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy_on_steps(monkeypatch)
    go(max_steps=1, **settings)
    assert [call.keep_graph for call in calls] == [kept]


def test_the_graph_is_kept_up_to_and_with_graph_tokens(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(max_steps=1, to="first")
    padded = read_metrics(tmp_path / "first" / "metrics.jsonl")[0]["padded_tokens"]
    calls = spy_on_steps(monkeypatch)
    go(max_steps=1, to="equal", graph_tokens=padded)
    go(max_steps=1, to="less", graph_tokens=padded - 1)
    assert [call.keep_graph for call in calls] == [True, False]


@pytest.mark.parametrize("leaves_out", [True, False])
def test_prompts_share_chunks_unless_the_pooling_leaves_them_out(
    go: Go, tiny_model: Path, leaves_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    model[1].include_prompt = not leaves_out
    calls = spy_on_steps(monkeypatch)
    go(model=model, max_steps=1)
    (call,) = calls
    prompts = [sorted(set(call.pool.prompts[chunk].tolist())) for chunk in call.chunks]
    assert prompts == ([[0], [1]] if leaves_out else [[0, 1]])
    if leaves_out:
        assert [features["prompt_length"] for features in call.features] == [1, 2]


@pytest.mark.parametrize(("side", "token"), [("left", 4), ("right", None)])
def test_padding_is_the_tokenizers(
    go: Go, tiny_model: Path, side: str, token: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    model.tokenizer.padding_side = side
    model.tokenizer.pad_token_id = token
    calls = spy_on_steps(monkeypatch)
    asked: list[Padding] = []
    monkeypatch.setattr(loop, "Padding", lambda *settings: asked.append(Padding(*settings)) or asked[-1])
    go(model=model, max_steps=1)
    assert asked == [Padding(token or 0, side, torch.device("cpu"))]
    features = calls[0].features[0]
    padding = features["attention_mask"] == 0
    assert padding.any()
    assert set(features["input_ids"][padding].tolist()) == {token or 0}
    assert bool(padding[:, 0].any()) == (side == "left")


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_can_be_off(go: Go, tiny_model: Path, dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    modes: list[bool] = []
    spy_on_steps(monkeypatch, lambda keywords: modes.append(model.training))
    go(model=model, max_steps=2, dropout=dropout)
    assert modes == [dropout, dropout]


@pytest.mark.parametrize("limit", [0.01, None])
def test_the_norm_is_told_as_it_was_before_clipping(
    go: Go, tiny_model: Path, tmp_path: Path, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any, **keywords: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    go(model=model, max_steps=1, max_gradient_norm=limit)
    told = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["gradient_norm"]
    assert told > 0.1
    assert norms == [pytest.approx(limit if limit else told, rel=1e-4)]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def ask(keywords: dict[str, Any]) -> None:
        if keywords["step"] == step - 1:
            signal.raise_signal(signal.SIGTERM)

    spy_on_steps(monkeypatch, ask)


def test_a_stop_says_where_it_goes_on(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nearfield")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StoppedError) as error:
            go()
    assert error.value.what == "stopped by SIGTERM after step 2 of 6"
    assert error.value.where == str(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert error.value.hint == "The same command goes on from this checkpoint."
    result = go()
    assert "Resuming from step 2 of 6 (step-00000002)" in caplog.messages
    assert (result.steps, result.resumed_from, result.examples) == (6, 2, 16)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    again = go()
    assert (again.resumed_from, again.examples, again.last_loss) == (6, 0, None)


def test_a_stop_at_the_last_step_is_the_end(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 6)
    assert go().steps == 6


def test_a_resumed_run_keeps_its_chunks(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StoppedError):
            go(chunk_tokens=32)
    calls = spy_on_steps(monkeypatch)
    go(chunk_tokens=400)
    assert all(features["input_ids"].numel() <= 32 for call in calls for features in call.features)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["chunk_tokens"] == 32


@pytest.mark.parametrize(
    ("key", "other"), [("fingerprint", {"fingerprint": "g"}), ("seed", {"seed": 6}), ("plans", {})]
)
def test_a_checkpoint_of_another_run_is_refused(
    go: Go, inputs: TrainingInputs, tmp_path: Path, key: str, other: dict[str, Any]
) -> None:
    go(max_steps=1)
    if key == "plans":
        object.__setattr__(inputs, "plan_hashes", ("a", "c"))
    with pytest.raises(BadInputError, match="none of the checkpoints") as error:
        go(max_steps=2, **other)
    assert f"it belongs to another run (its {key} differs)" in error.value.what
    assert str(tmp_path / "run" / "checkpoints" / "step-00000001") in error.value.what


def test_a_plan_without_steps(go: Go, inputs: TrainingInputs, tmp_path: Path) -> None:
    object.__setattr__(inputs, "plans", [make_plan(tmp_path / "empty.parquet", 0, steps=0)])
    with pytest.raises(BadInputError) as error:
        go()
    assert error.value.what == "the plan has no steps"
    assert error.value.where == str(tmp_path / "run" / "plan")
    assert error.value.hint == "Is batch_size larger than the data?"


def test_precisions_of_one_process(go: Go) -> None:
    """Accelerate would refuse a second precision if its state stayed."""
    precisions = [go(max_steps=1, to=name, precision=name).precision for name in ("bf16", "fp32", "bf16")]
    assert precisions == ["bf16", "fp32", "bf16"]


@pytest.mark.parametrize(("factor", "what"), [(NAN, "the gradient"), (1.0, "the loss")])
def test_a_step_that_is_not_finite_changes_no_weight(
    go: Go, tmp_path: Path, factor: float, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step = loop.run_step

    def sabotaged(encode, objective, backward, *args, **keywords):  # type: ignore[no-untyped-def]
        result = run_step(encode, objective, lambda loss: backward(loss * factor), *args, **keywords)
        if factor == 1.0:
            return replace(result, loss=replace(result.loss, total=result.loss.total * NAN))
        return result

    monkeypatch.setattr(loop, "run_step", sabotaged)
    with pytest.raises(NonFiniteError, match=re.escape(f"{what} of step 1 is not finite")):
        go()
    report = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert (report["loss"] == "nan") == (what == "the loss")
    assert (report["gradient_norm"] == "nan") == (what == "the gradient")
    assert [path.name for path in checkpoint_paths(tmp_path / "run" / "checkpoints")] == ["step-00000000"]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []
