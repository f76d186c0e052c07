"""Evaluation during the training: what is encoded, what is left alone, what is kept, and when it ends."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError, StoppedError
from nearfield.files import read_metrics
from nearfield.objectives import InfoNCEConfig
from nearfield.training import TrainingConfig
from nearfield.training import step as step_module
from nearfield.training.checkpoint import checkpoint_paths, open_checkpoint
from nearfield.training.chunks import TrainingData
from nearfield.training.engine import Engine, build_engine
from nearfield.training.evaluation import EncodeTexts, Evaluations, EvaluationState, encode_texts, undisturbed
from nearfield.training.launch import Launch
from nearfield.training.optimizers import make_optimizer
from nearfield.training.trainer import TrainingInputs, TrainingResult, train
from tests.training.making import make_tokens

CPU = torch.device("cpu")
TEXTS = ["word1", "word2 word3", "word1 word2 word3 word4 word5 word6", "", *(f"word{n} word7" for n in range(40))]


def make_engine(model: Path, **settings: Any) -> Engine:
    config = TrainingConfig.model_validate({"device": "cpu", **settings})
    encoder = load_encoder(str(model), device="cpu").model
    return build_engine(
        config,
        encoder,
        InfoNCEConfig().build(),
        lambda named: make_optimizer(named, config, CPU),
        TrainingData(make_tokens()),
        CPU,
        Launch(),
    )


@pytest.mark.parametrize("packing", ["auto", "never"])
@pytest.mark.parametrize("prompt", ["", "word9 : "])
def test_embeddings_are_those_of_sentence_transformers(tiny_model: Path, packing: str, prompt: str) -> None:
    engine = make_engine(tiny_model, packing=packing)
    with undisturbed(engine.backend.module, CPU):
        found = encode_texts(engine, TEXTS, prompt, budget=40)
    plain = load_encoder(str(tiny_model), device="cpu").model
    expected = plain.encode(TEXTS, prompt=prompt or None)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert encode_texts(engine, [], prompt, budget=40).shape == (0, 32)


def test_nothing_is_disturbed(tiny_model: Path) -> None:
    engine = make_engine(tiny_model)
    module = engine.backend.module
    module.encoder[1].eval()
    modes = [part.training for part in module.modules()]
    assert len(set(modes)) == 2
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    with pytest.raises(ZeroDivisionError), undisturbed(module, CPU):
        assert not any(part.training for part in module.modules())
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        1 / 0  # noqa: B018
    assert [part.training for part in module.modules()] == modes
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_gains_are_counted_from_the_best() -> None:
    state = EvaluationState()
    told = []
    for step, score in enumerate([math.nan, 0.5, 0.55, 0.5, 0.61, 0.61, 0.72], start=1):
        state = state.after(step, score, minimum_gain=0.1)
        told.append((state.best_step, state.without_gain))
    assert told == [(None, 1), (2, 0), (3, 1), (3, 2), (5, 3), (5, 4), (7, 0)], (
        "a small improvement is the best, and no gain"
    )
    assert state.evaluated == 7


def due(steps: int, epochs: Sequence[int], tiny_model: Path, **settings: Any) -> list[int]:
    config = TrainingConfig.model_validate({"evaluation": {"suite": "s", **settings}}).evaluation
    evaluations = Evaluations(
        config,
        lambda encode: {},
        make_engine(tiny_model),
        epochs,
        steps,
    )
    return [step for step in range(steps + 1) if evaluations.due(step)]


def test_when_an_evaluation_is_due(tiny_model: Path) -> None:
    assert due(10, [6, 6], tiny_model, every_steps=4) == [0, 4, 8, 10]
    assert due(10, [6, 6], tiny_model, every_steps=5, at_start=False) == [5, 10]
    assert due(12, [4, 5, 3], tiny_model, every_epochs=1) == [0, 4, 9, 12]
    assert due(12, [4, 5, 3], tiny_model, every_epochs=2) == [0, 9, 12]


@pytest.mark.parametrize("settings", [{}, {"every_steps": 2, "every_epochs": 1}])
def test_one_cadence(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="either 'every_steps' or 'every_epochs'"):
        TrainingConfig.model_validate({"evaluation": {"suite": "s", **settings}})


Scorer = Callable[[EncodeTexts], Mapping[str, float]]
Go = Callable[..., TrainingResult]


def unruly(scores: Sequence[float]) -> Scorer:
    """Gives the scores in turn, and does all that mteb's tasks do to a process."""
    left = list(scores)

    def evaluate(encode: EncodeTexts) -> Mapping[str, float]:
        assert encode(TEXTS, "word1 ").shape == (len(TEXTS), 32)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        return {"mean": left.pop(0), "other": 1.0}

    return evaluate


def norm_of_embeddings(encode: EncodeTexts) -> Mapping[str, float]:
    """A score that depends on the weights alone."""
    return {"mean": float(np.abs(encode(TEXTS, "").astype(np.float64)).sum())}


@pytest.fixture()
def go(tiny_model: Path, inputs: TrainingInputs, tmp_path: Path) -> Go:
    """Train a fresh copy of the tiny model, scored every second of six steps."""

    def go(scorer: Scorer | None = None, *, to: str = "run", every: int = 2, **settings: Any) -> TrainingResult:
        evaluation = None if scorer is None else {"suite": "s", "every_steps": every, **settings.pop("evaluation", {})}
        object.__setattr__(inputs, "evaluate", scorer)
        config = TrainingConfig.model_validate(
            {"trackers": [], "device": "cpu", "learning_rate": 1e-3, "evaluation": evaluation, **settings}
        )
        model = load_encoder(str(tiny_model), device="cpu").model
        objective = InfoNCEConfig(temperature=0.1).build()
        return train(config, objective, model, inputs, tmp_path / to, seed=5, fingerprint="f")

    return go


def evaluations(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["scores"]["mean"]) for line in read_metrics(run / "evaluations.jsonl")]


def figures(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]


def names(run: Path) -> list[int]:
    return [int(path.name[-8:]) for path in checkpoint_paths(run / "checkpoints")]


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.conformance
@pytest.mark.parametrize("settings", [{}, {"gradient_cache": "always", "micro_batch_tokens": 24}], ids=str)
def test_the_training_is_the_one_without_evaluations(go: Go, tmp_path: Path, settings: dict[str, Any]) -> None:
    """To the bit: weights, optimiser and all figures."""
    plain = go(to="plain", **settings)
    scored = go(unruly([0.1, 0.2, 0.3, 0.4]), to="scored", **settings)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(plain.checkpoint / name, scored.checkpoint / name)
    assert figures(tmp_path / "plain") == figures(tmp_path / "scored")
    assert evaluations(tmp_path / "scored") == [(0, 0.1), (2, 0.2), (4, 0.3), (6, 0.4)]
    assert not (tmp_path / "plain" / "evaluations.jsonl").exists()
    assert (plain.best, scored.best) == (None, (6, 0.4))


def test_the_best_checkpoint_is_kept_and_is_the_outcome(go: Go, tmp_path: Path) -> None:
    scores = [0.9, 0.1, 0.5, 0.2, 0.4, 0.3]
    kept = {"every_steps": 1, "keep_last": 1}
    result = go(unruly([*scores, 0.3]), every=1, evaluation={"keep_best": True}, checkpoints=kept)
    assert result.best == (2, 0.5), "the score of the untrained model does not count"
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert names(tmp_path / "run") == [2, 6]
    state = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000006").state["evaluation"]
    assert state == {"evaluated": 6, "best_step": 2, "best_score": 0.5, "without_gain": 4}
    again = go(unruly([]), every=1, evaluation={"keep_best": True}, checkpoints=kept)
    assert (again.best, again.checkpoint, again.resumed_from) == (result.best, result.checkpoint, 6)


def test_a_best_evaluation_writes_a_checkpoint_of_its_own(go: Go, tmp_path: Path) -> None:
    result = go(unruly([0.1, 0.2, 0.5, 0.4]), evaluation={"keep_best": True}, checkpoints={"every_steps": 100})
    assert names(tmp_path / "run") == [2, 4, 6]
    assert result.checkpoint.name == "step-00000004"
    go(unruly([0.1, 0.2, 0.5, 0.4]), to="last", checkpoints={"every_steps": 100})
    assert names(tmp_path / "last") == [6]


def test_the_best_of_an_older_checkpoint_stays_as_long_as_that_may_be_used(go: Go, tmp_path: Path) -> None:
    """If the newest checkpoint is damaged, the one before it is resumed from: the best that it knows must be there."""
    run, kept = tmp_path / "run", {"every_steps": 1, "keep_last": 2}
    go(
        unruly([0.5, 0.1, 0.2, 0.3, 0.9]),
        every=1,
        evaluation={"keep_best": True, "at_start": False},
        checkpoints=kept,
        max_steps=5,
    )
    assert names(run) == [1, 4, 5], "step 1 was the best when step 4 was written"
    newest = run / "checkpoints" / "step-00000005" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    result = go(unruly([0.1, 0.1]), every=1, evaluation={"keep_best": True, "at_start": False}, checkpoints=kept)
    assert (result.resumed_from, result.best) == (4, (1, 0.5))
    assert open_checkpoint(result.checkpoint).step == 1


def test_patience(go: Go, tmp_path: Path, tiny_model: Path) -> None:
    settings: dict[str, Any] = {"every": 1, "evaluation": {"patience": 2, "minimum_gain": 0.1, "at_start": False}}
    result = go(unruly([0.2, 0.4, 0.45, 0.3]), **settings)
    assert (result.steps, result.stopped_early, result.best) == (4, True, (3, 0.45))
    assert result.checkpoint.name == "step-00000004", "without keep_best the model is the last one"
    assert names(tmp_path / "run") == [4]
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4]
    again = go(unruly([]), **settings)
    assert (again.steps, again.resumed_from, again.stopped_early, again.examples) == (4, 4, True, 16)
    assert evaluations(tmp_path / "run") == [(1, 0.2), (2, 0.4), (3, 0.45), (4, 0.3)]
    assert not go(unruly([0.3, 0.2, 0.1]), to="end", every=3, evaluation={"patience": 1}).stopped_early, (
        "patience that ends with the training stops nothing"
    )


def signalled(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run_step = step_module.run_step

    def interrupted(*args: Any, **keywords: Any) -> Any:
        if keywords["step"] == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return run_step(*args, **keywords)

    monkeypatch.setattr(step_module, "run_step", interrupted)


@pytest.mark.conformance
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_with_the_same_evaluations(
    go: Go, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the stop came at a step that was to be scored."""
    settings = {"evaluation": {"keep_best": True}, "checkpoints": {"every_steps": 3}}
    whole = go(norm_of_embeddings, to="whole", **settings)
    with monkeypatch.context() as patch:
        signalled(patch, stop_after)
        with pytest.raises(StoppedError, match=f"after step {stop_after} of 6"):
            go(norm_of_embeddings, to="stopped", **settings)
    assert evaluations(tmp_path / "stopped")[-1][0] == max(0, stop_after - 1) // 2 * 2
    result = go(norm_of_embeddings, to="stopped", **settings)
    assert result.resumed_from == stop_after
    assert evaluations(tmp_path / "stopped") == evaluations(tmp_path / "whole")
    assert len({score for _, score in evaluations(tmp_path / "whole")}) == 4
    assert (result.best, result.checkpoint.name) == (whole.best, whole.checkpoint.name)
    assert same_tensors(result.checkpoint / "model.safetensors", whole.checkpoint / "model.safetensors")
    state = "checkpoints/step-00000006/state.json"
    stopped, straight = (json.loads((tmp_path / name / state).read_text()) for name in ("stopped", "whole"))
    assert {**stopped, "seconds": 0} == {**straight, "seconds": 0}, "all but the time that it took"


def test_a_crash_between_checkpoints_loses_no_evaluation(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"evaluation": {"keep_best": True}, "checkpoints": {"every_steps": 100}, "every": 1}
    rising = [0.1, 0.5, 0.2, 0.3, 0.2, 0.1, 0.1]
    go(unruly(rising), to="whole", **settings)
    run_step = step_module.run_step

    def crashing(*args: Any, **keywords: Any) -> Any:
        if keywords["step"] == 4:
            raise KeyError("a crash")
        return run_step(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "run_step", crashing)
        with pytest.raises(KeyError):
            go(unruly(rising), to="crashed", **settings)
    assert [step for step, _ in evaluations(tmp_path / "crashed")] == [0, 1, 2, 3, 4]
    result = go(unruly(rising[2:]), to="crashed", **settings)
    assert result.resumed_from == 1, "the checkpoint of the best evaluation"
    assert evaluations(tmp_path / "crashed") == evaluations(tmp_path / "whole")
    assert result.best == (1, 0.5)


@pytest.mark.parametrize("at", [0, 4, 6])
def test_a_signal_ends_an_evaluation_which_is_done_again(go: Go, tmp_path: Path, at: int) -> None:
    calls: list[int] = []

    def slow(encode: EncodeTexts) -> Mapping[str, float]:
        calls.append(len(calls))
        if calls[-1] == at // 2:
            signal.raise_signal(signal.SIGINT)
            try:
                encode(TEXTS, "")
            except Exception:
                pytest.fail("what scores a task would take this for the task's failure")
        return norm_of_embeddings(encode)

    go(norm_of_embeddings, to="whole")
    with pytest.raises(StoppedError, match=f"stopped by SIGINT after step {at} of 6"):
        go(slow)
    assert [step for step, _ in evaluations(tmp_path / "run")] == [0, 2, 4][: at // 2]
    assert names(tmp_path / "run")[-1] == at
    result = go(norm_of_embeddings)
    assert result.resumed_from == at
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert same_tensors(
        result.checkpoint / "model.safetensors", tmp_path / "whole/checkpoints/step-00000006/model.safetensors"
    )


def test_a_score_that_is_no_number_is_told_as_none(go: Go, tmp_path: Path) -> None:
    result = go(unruly([math.nan, math.inf, 0.2, math.nan]), evaluation={"keep_best": True})
    assert evaluations(tmp_path / "run") == [(0, None), (2, None), (4, 0.2), (6, None)]
    assert result.best == (4, 0.2)


def test_a_metric_that_the_evaluation_does_not_give(go: Go) -> None:
    with pytest.raises(BadInputError, match="gives no score 'Task") as error:
        go(unruly([0.1]), evaluation={"metric": "Task.f1"})
    assert error.value.hint == "Scores: mean, other."


def test_evaluation_without_anything_that_evaluates(inputs: TrainingInputs, tmp_path: Path, tiny_model: Path) -> None:
    config = TrainingConfig.model_validate({"device": "cpu", "evaluation": {"suite": "s", "every_steps": 1}})
    model = load_encoder(str(tiny_model), device="cpu").model
    with pytest.raises(BadInputError, match="nothing was handed in"):
        train(config, InfoNCEConfig().build(), model, inputs, tmp_path / "r", seed=0, fingerprint="f")
