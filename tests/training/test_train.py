"""``train`` called as a function: what it writes, tells, keeps and refuses."""

from __future__ import annotations

import json
import logging
import math
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

from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError, NonFiniteError, OutOfMemoryStopError, StoppedError
from nearfield.files import read_metrics
from nearfield.objectives import InfoNCEConfig
from nearfield.training import TrainingConfig, checkpoint, trainer
from nearfield.training import step as step_module
from nearfield.training.backends.replicated import ReplicatedBackend
from nearfield.training.checkpoint import checkpoint_paths, newest_checkpoint, read_tensors
from nearfield.training.trainer import TrainingInputs, TrainingResult, train
from tests.training.making import SIZES, make_plan

NAN = float("nan")


# Token budgets of their own: auto measures memory, which is tested elsewhere.
DEFAULTS = {"trackers": [], "device": "cpu", "packing": "never", "micro_batch_tokens": 512, "graph_tokens": 65_536}


@pytest.fixture()
def go(tiny_model: Path, inputs: TrainingInputs, tmp_path: Path) -> Callable[..., TrainingResult]:
    """Train a fresh copy of the tiny model; keywords are settings, or parts of the call."""

    def go(
        *,
        seed: int = 5,
        fingerprint: str = "f",
        to: str = "run",
        model: Any = None,
        evaluate: Any = None,
        **settings: Any,
    ) -> TrainingResult:
        config = TrainingConfig.model_validate({**DEFAULTS, **settings})
        fresh = load_encoder(str(tiny_model), device="cpu").model if model is None else model
        objective = InfoNCEConfig(temperature=0.1).build()
        given = replace(inputs, evaluate=evaluate)
        return train(config, objective, fresh, given, tmp_path / to, seed=seed, fingerprint=fingerprint)

    return go


Go = Callable[..., TrainingResult]


def spy_on_steps(monkeypatch: pytest.MonkeyPatch, before: Callable[[dict[str, Any]], None] | None = None) -> list[Any]:
    """Every call of ``run_step`` from here on: its pool, features, chunks, known positives and keywords."""
    calls: list[Any] = []
    run_step = step_module.run_step

    def spy(engine, work, **keywords):  # type: ignore[no-untyped-def]
        make_features = engine.make_features(work.pool, keywords["seed"], keywords["step"])
        features = [make_features(chunk) for chunk in work.chunks]
        calls.append(
            SimpleNamespace(
                pool=work.pool, features=features, chunks=work.chunks, known=work.known_positives, **keywords
            )
        )
        if before is not None:
            before(keywords)
        return run_step(engine, work, **keywords)

    monkeypatch.setattr(step_module, "run_step", spy)
    return calls


def test_what_a_run_leaves_behind(go: Go, inputs: TrainingInputs, tmp_path: Path, tiny_model: Path) -> None:
    state = torch.random.get_rng_state()
    model = load_encoder(str(tiny_model), device="cpu").model
    schedule = {"kind": "linear", "warmup": 2}
    result = go(model=model, schedule=schedule, learning_rate=1e-3, log_every=4, checkpoints={"every_steps": 4})
    assert torch.equal(torch.random.get_rng_state(), state), "the process's generator is as it was"
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
        "alignment",
        "uniformity",
        "effective_rank",
        "rank_limit",
        "temperature",
        "negatives",
        "masked_share",
        "masked_known_positive",
        "effective_negatives",
        "hardest_gradient_share",
        "effective_examples",
    ]
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert result == TrainingResult(6, 0, 24, lines[-1]["loss"], result.seconds, "cpu", "fp32", "single", 1, last)
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
        assert 0 < saved.pop("seconds") <= result.seconds
        assert saved.pop("loss") == {line["step"]: line["loss"] for line in lines}[step]
        assert saved == {
            "version": 2,
            "step": step,
            "examples": 4 * step,
            "files": ["model.safetensors", "optimizer.safetensors"],
            "fingerprint": "f",
            "plans": ["a", "b"],
            "seed": 5,
            "world_size": 1,
            "backend": "single",
            "micro_batch_tokens": 512,
            "graph_tokens": 65_536,
            "cut_rule": 1,
            "cut_ranks": 1,
            "cut_apart": False,
        }
    assert not torch.distributed.is_initialized()
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    weights = read_tensors(found)[0]
    parameters = {f"encoder.{name}": parameter for name, parameter in model.named_parameters()}
    assert parameters.keys() <= weights.keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in parameters.items())


def test_seconds_are_those_of_the_steps(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one at each look: one look before the steps, two in each, one at the checkpoint, one after."""
    ticks = iter(range(100, 1000))
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    result = go(max_steps=3)
    assert result.seconds == 8.0
    assert [line["seconds"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1.0, 1.0, 1.0]


def test_a_step_gets_the_batch_of_the_plan(
    go: Go, inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    calls = spy_on_steps(monkeypatch)
    go(micro_batch_tokens=40)
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
    go(model=model, max_steps=1)
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
    assert "Resuming from step 2 of 6" in caplog.messages
    assert (result.steps, result.resumed_from, result.examples) == (6, 2, 24), "of the run, not of this call"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    again = go()
    assert again.resumed_from == 6
    assert (again.examples, again.last_loss) == (24, result.last_loss)
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert again.seconds >= saved["seconds"] > 0


def test_a_stop_at_the_last_step_is_the_end(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 6)
    assert go().steps == 6


def test_a_resumed_run_keeps_its_chunks(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StoppedError):
            go(micro_batch_tokens=32)
    calls = spy_on_steps(monkeypatch)
    go(micro_batch_tokens=400)
    assert all(features["input_ids"].numel() <= 32 for call in calls for features in call.features)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["micro_batch_tokens"] == 32


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
    precisions = [go(max_steps=1, to=name, precision=name).precision for name in ("bf16-mixed", "fp32")]
    assert precisions == ["bf16-mixed", "fp32"]


def poison(monkeypatch: pytest.MonkeyPatch, what: str, at: int = 0) -> None:
    """Make the loss or the gradient of a step not a number."""
    run_step, encode_chunk, backward = step_module.run_step, step_module.encode_chunk, ReplicatedBackend.backward
    now: list[int] = []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        now[:] = [keywords["step"]]
        return run_step(*arguments, **keywords)

    monkeypatch.setattr(step_module, "run_step", watched)

    def encode(*arguments: Any) -> torch.Tensor:
        embeddings: torch.Tensor = encode_chunk(*arguments)
        if now != [at]:
            return embeddings
        factors = torch.ones(len(embeddings), 1)
        factors[0] = NAN
        return embeddings * factors

    def push(self: ReplicatedBackend, scalar: torch.Tensor, last: bool, settle: bool = False) -> None:
        backward(self, scalar * NAN if now == [at] else scalar, last, settle)

    if what == "the loss":
        monkeypatch.setattr(step_module, "encode_chunk", encode)
    else:
        monkeypatch.setattr(ReplicatedBackend, "backward", push)


@pytest.mark.parametrize("what", ["the gradient", "the loss"])
def test_a_step_that_is_not_finite_changes_no_weight(
    go: Go, tmp_path: Path, tiny_model: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, what)
    with pytest.raises(NonFiniteError, match=re.escape(f"{what} of step 1 is not finite")) as error:
        go()
    assert error.value.exit_code == 4
    report = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert (report["loss"] == "nan") == (what == "the loss")
    assert report["gradient_norm"] == "nan"
    assert report["queries"]
    assert set(report["queries"]) <= {f"id{item}" for item in range(20)}
    assert report["queries"][0] in error.value.what
    (path,) = checkpoint_paths(tmp_path / "run" / "checkpoints")
    assert path.name == "step-00000000"
    weights, moments = read_tensors(checkpoint.open_checkpoint(path))
    fresh = load_encoder(str(tiny_model), device="cpu").model
    assert all(torch.equal(weights[f"encoder.{name}"], parameter) for name, parameter in fresh.named_parameters())
    assert moments == {}
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []


@pytest.mark.parametrize("what", ["the gradient", "the loss"])
def test_after_a_step_that_is_not_finite_the_last_good_state_goes_on(
    go: Go, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(to="plain")
    with monkeypatch.context() as patch:
        poison(patch, what, at=3)
        with pytest.raises(NonFiniteError, match="step 4"):
            go()
    assert [path.name for path in checkpoint_paths(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert go().resumed_from == 3
    assert same_tensors(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_checkpoint_of_the_last_good_state_is_not_written_again(
    go: Go, tmp_path: Path, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    settings = {"checkpoints": {"every_steps": 3}}
    if resumed:
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_at(patch, 3)
            go(**settings)
    written: list[Path] = []
    write = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda path, *rest: (written.append(path), write(path, *rest)))
    poison(monkeypatch, "the loss", at=3)
    with pytest.raises(NonFiniteError, match="step 4"):
        go(**settings)
    assert written == ([] if resumed else [folder])
    assert checkpoint.open_checkpoint(folder).step == 3


def same_tensors(one: Path, other: Path) -> bool:
    found = [newest_checkpoint(run / "checkpoints") for run in (one, other)]
    assert found[0] is not None and found[1] is not None
    assert found[0].step == found[1].step
    for ours, theirs in zip(read_tensors(found[0]), read_tensors(found[1]), strict=True):
        assert ours.keys() == theirs.keys()
        if not all(torch.equal(ours[name], theirs[name]) for name in ours):
            return False
    return True


class ShortOfMemory:
    """Memory that runs out once, at a place of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str, at: int, times: int = 1) -> None:
        self.left, self.at = times, at
        self.place = place
        self.now = -1
        self.pushes = 0
        self.queries: list[tuple[int, list[int]]] = []
        self.weights: list[torch.Tensor] = []
        self.run_step, self.encode_chunk = step_module.run_step, step_module.encode_chunk
        monkeypatch.setattr(step_module, "run_step", self.step)
        monkeypatch.setattr(step_module, "encode_chunk", self.encode)

    def fail(self) -> None:
        if self.now == self.at and self.left > 0:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    def step(self, engine: Any, work: Any, **keywords: Any) -> Any:
        self.now, self.encoded, self.chunks = keywords["step"], 0, len(work.chunks)
        self.queries.append((self.now, work.pool.items[work.pool.queries].tolist()))
        if self.now == self.at:
            self.weights.append(torch.cat([p.detach().flatten().clone() for p in engine.backend.module.parameters()]))
        objective = engine.objective
        forward = objective.forward
        if self.place == "objective":

            def failing(batch: Any) -> Any:
                self.fail()
                return forward(batch)

            objective.forward = failing
        try:
            return self.run_step(engine, work, **keywords)
        finally:
            if self.place == "objective":
                del objective.forward

    def encode(self, *arguments: Any) -> Any:
        self.encoded += 1
        second = self.encoded > self.chunks
        if (self.place == "first pass" and not second) or (self.place == "second pass" and second):
            self.fail()
        return self.encode_chunk(*arguments)


def pairs(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["gradient_norm"]) for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("place", ["first pass", "objective", "second pass"])
def test_a_step_without_memory_is_repeated_with_half_the_budget(
    go: Go,
    inputs: TrainingInputs,
    tmp_path: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"dropout": False, "gradient_cache": "always", "micro_batch_tokens": 64, "graph_tokens": 1000}
    go(to="plain", **settings)
    with monkeypatch.context() as patch:
        short = ShortOfMemory(patch, place, at=2)
        calls = spy_on_steps(patch)
        with pytest.raises(StoppedError):
            stop_at(patch, 5)
            go(**settings)
    assert short.left == 0
    assert [call.step for call in calls] == [0, 1, 2, 2, 3, 4], "the step was repeated at once"
    assert [step for step, _ in short.queries] == [0, 1, 2, 2, 3, 4]
    assert short.queries[2] == short.queries[3], "the same batch"
    assert torch.equal(*short.weights), "the same parameters"
    widest = [max(features["input_ids"].numel() for features in call.features) for call in calls]
    assert all(32 < tokens <= 64 for tokens in widest[:3])
    assert all(tokens <= 32 for tokens in widest[3:])
    assert "Memory ran out in step 3: 32 tokens at a time from now on (was 64)" in caplog.messages
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert (state["micro_batch_tokens"], state["graph_tokens"]) == (32, 500)
    # A resumed run cuts with the budget that it was stopped with.
    calls = spy_on_steps(monkeypatch)
    go(**settings)
    assert [call.step for call in calls] == [5]
    assert max(features["input_ids"].numel() for features in calls[0].features) <= 32
    expected, found = pairs(tmp_path / "plain"), pairs(tmp_path / "run")
    assert len(found) == 6
    for (loss, norm), (plain_loss, plain_norm) in zip(found[:3], expected[:3], strict=True):
        assert loss == pytest.approx(plain_loss, abs=1e-6)
        assert norm == pytest.approx(plain_norm, rel=1e-5)


def test_memory_may_run_out_again(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ShortOfMemory(monkeypatch, "first pass", at=1, times=2)
    go(max_steps=3, micro_batch_tokens=100)
    assert [step for step, _ in short.queries] == [0, 1, 1, 1, 2]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["micro_batch_tokens"] == 25
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_with_the_smallest_budget_there_is_nothing_to_halve(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    ShortOfMemory(monkeypatch, "first pass", at=1, times=10)
    with pytest.raises(BadInputError) as error:
        go(max_steps=3, micro_batch_tokens=40)
    assert error.value.what == "memory ran out in step 2 with 16 tokens at a time, and less is no use"
    assert error.value.exit_code == 2


def test_where_a_step_cannot_be_repeated_the_last_checkpoint_gets_half_the_budget(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on backends whose chunks hold collectives."""
    settings = {"micro_batch_tokens": 100, "graph_tokens": 1000, "checkpoints": {"every_steps": 2}}
    with monkeypatch.context() as patch:
        patch.setattr(ReplicatedBackend, "retries_in_place", False)
        ShortOfMemory(patch, "second pass", at=4)
        with pytest.raises(OutOfMemoryStopError) as error:
            go(gradient_cache="always", **settings)
    assert error.value.exit_code == 75
    assert error.value.what == "memory ran out in step 5 with 100 tokens at a time"
    assert error.value.hint is not None and "nearfield train --resume" in error.value.hint
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert (found.step, found.state["micro_batch_tokens"], found.state["graph_tokens"]) == (4, 50, 500)
    calls = spy_on_steps(monkeypatch)
    assert go(gradient_cache="always", **settings).resumed_from == 4
    assert all(features["input_ids"].numel() <= 50 for call in calls for features in call.features)


@pytest.mark.parametrize("place", ["update", "evaluation"])
def test_memory_that_runs_out_beside_the_step_ends_the_run_with_half_the_budget(
    go: Go, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, updates = ReplicatedBackend.update, 0

    def short(self: ReplicatedBackend, *arguments: Any) -> Any:
        nonlocal updates
        updates += 1
        if updates == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(self, *arguments)

    def scores(encode: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings: dict[str, Any] = {"micro_batch_tokens": 100, "graph_tokens": 1000, "checkpoints": {"every_steps": 3}}
    scored: dict[str, Any] = {"evaluation": {"suite": "s", "every_steps": 4, "at_start": False}, "evaluate": scores}
    with monkeypatch.context() as patch:
        if place == "update":
            patch.setattr(ReplicatedBackend, "update", short)
        with pytest.raises(OutOfMemoryStopError) as error:
            go(**settings, **({} if place == "update" else scored))
    where = {"update": "the update of step 4", "evaluation": "the evaluation after step 4"}[place]
    assert error.value.what == f"memory ran out in {where} with 100 tokens at a time"
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert (found.step, found.state["micro_batch_tokens"], found.state["graph_tokens"]) == (3, 50, 500)
    assert go(**settings).resumed_from == 3


def test_memory_that_runs_out_in_the_first_step_finds_a_checkpoint(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ReplicatedBackend, "retries_in_place", False)
        for left in (50, 25):
            ShortOfMemory(patch, "first pass", at=0)
            with pytest.raises(OutOfMemoryStopError):
                go(micro_batch_tokens=100)
            found = newest_checkpoint(tmp_path / "run" / "checkpoints")
            assert found is not None
            assert (found.step, found.state["micro_batch_tokens"]) == (0, left)


def test_a_full_disk_ends_the_run_and_loses_no_checkpoint(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(to="plain", checkpoints={"every_steps": 1})
    write, seen = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        seen.append(path)
        if len(seen) > 5:
            raise OSError(28, "No space left on device")
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(BadInputError) as error:
            go(checkpoints={"every_steps": 1})
    assert error.value.what == "the checkpoint of step 3 could not be written: [Errno 28] No space left on device"
    assert error.value.hint is not None
    size = re.match(r"It takes ([\d.]+) MB, and [\d,.]+ MB are free", error.value.hint)
    assert size is not None
    written = tmp_path / "plain" / "checkpoints" / "step-00000006"
    bytes_written = sum((written / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    assert float(size[1]) == pytest.approx(bytes_written / 1e6, abs=0.06)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000001", "step-00000002"]
    assert go(checkpoints={"every_steps": 1}).resumed_from == 2
    assert same_tensors(tmp_path / "run", tmp_path / "plain")


def test_several_batches_of_a_step_are_averaged(go: Go, inputs: TrainingInputs, tmp_path: Path) -> None:
    """Each is a batch of its own: its loss is that of a plan whose batches are half as large."""
    settings = {"dropout": False, "max_gradient_norm": None}
    result = go(max_steps=1, averaged_batches=2, to="halves", **settings)
    line = read_metrics(tmp_path / "halves" / "metrics.jsonl")[0]
    assert (result.steps, result.examples, line["rows"]) == (1, 4, 4)
    small = make_plan(tmp_path / "small.parquet", 0, steps=2, size=2)
    both = np.concatenate([small.batch(0).query, small.batch(1).query])
    assert both.tolist() == inputs.plans[0].batch(0).query.tolist()
    object.__setattr__(inputs, "plans", [small])
    go(to="small", learning_rate=1e-12, **settings)
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "small" / "metrics.jsonl")]
    assert len(losses) == 2
    assert line["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert math.isfinite(line["gradient_norm"])


def test_of_several_batches_the_one_that_is_not_finite_is_named(
    go: Go, inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two: its queries, not those that stand at the same places of the first."""
    run_step = step_module.run_step
    calls: list[None] = []

    def second(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        result = run_step(*arguments, **keywords)
        if len(calls) != 2:
            return result
        broken = replace(result.batch, queries=result.batch.queries * torch.tensor([[1.0], [NAN]]))
        return replace(result, word=replace(result.word, loss=NAN), batch=broken)

    monkeypatch.setattr(step_module, "run_step", second)
    with pytest.raises(NonFiniteError):
        go(averaged_batches=2)
    report = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    batch = inputs.plans[0].batch(0)
    assert report["examples"] == [int(batch.example[3])]
    assert report["queries"] == [f"id{batch.query[3]}"]
