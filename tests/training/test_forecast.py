"""The forecast of a run: counted as the loop will cut it, kept beside what came, and never in its way."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nearfield
from nearfield.conformance.cases import Case
from nearfield.files import read_json
from nearfield.objectives import InfoNCEConfig
from nearfield.pipeline import open_run, run_stages
from nearfield.training import TrainingConfig, memory, trainer
from nearfield.training import forecast as forecasting
from nearfield.training.chunks import Budget, Cut
from nearfield.training.engine import Engine
from nearfield.training.forecast import (
    FILE,
    Forecast,
    Memory,
    foresee,
    plan_costs,
    predict,
    run_trial,
    sampled_steps,
    say_bytes,
    say_seconds,
)
from nearfield.training.launch import Launch
from nearfield.training.memory import held_bytes, measure_profile, peak_resident_bytes, resident_bytes
from nearfield.training.trainer import TrainingInputs

CONFIG = TrainingConfig(device="cpu", precision="fp32", averaged_batches=1)


@pytest.fixture()
def engine(tiny_model: Path, inputs: TrainingInputs) -> Engine:
    """A tiny BERT with dropout, in float32, over the tokens of ``inputs``."""
    case = Case.make(InfoNCEConfig(), folder=tiny_model, dtype=torch.float32)
    engine = case.engine(Launch(), "single", dropout=True)
    return replace(engine, data=inputs.data)


def expect(engine: Engine, inputs: TrainingInputs, config: TrainingConfig = CONFIG, held: int = 10**9) -> Forecast:
    return foresee(replace(engine, config=config), inputs.plans, fingerprint="f", held=held).forecast


def test_counts_are_those_of_the_plan(engine: Engine, inputs: TrainingInputs) -> None:
    found = expect(engine, inputs)
    works = [engine.work(plan.batch(step), Cut(512)) for plan in inputs.plans for step in range(len(plan))]
    assert (found.steps, found.examples) == (6, 24)
    assert found.tokens == sum(int(lengths.sum()) for _, lengths in works)
    assert found.encoded_tokens == pytest.approx(sum(sum(work.tokens) for work, _ in works), abs=1)
    assert found.encoded_tokens > found.tokens
    assert not found.sampled
    module = engine.backend.module
    assert found.parameters == sum(p.numel() for p in module.parameters())
    assert found.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert found.memory.gradients == 4 * found.trained
    assert found.memory.base + found.memory.weights == 10**9
    assert found.memory.peak == sum(dataclasses.astuple(found.memory))
    assert (found.reductions, found.reduced_a_step) == (0, 0)
    assert found.seconds > 0
    assert Forecast.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_max_steps_and_averaged_batches(engine: Engine, inputs: TrainingInputs) -> None:
    first = expect(engine, inputs, CONFIG.model_copy(update={"max_steps": 4}))
    assert (first.steps, first.examples) == (4, 16)
    assert first.tokens < expect(engine, inputs).tokens
    halves = expect(engine, inputs, CONFIG.model_copy(update={"averaged_batches": 2, "max_steps": 4}))
    assert halves.examples == first.examples
    assert halves.memory.activations < first.memory.activations
    assert len(sampled_steps(inputs.plans, 4, 200)) == 4


def test_cached_gradients_take_less_memory_and_more_time(engine: Engine, inputs: TrainingInputs) -> None:
    config = CONFIG.model_copy(update={"micro_batch_tokens": 32, "gradient_cache": "never"})
    profile = measure_profile(replace(engine, config=config), inputs.plans)

    def of(cache: str) -> Forecast:
        now = config.model_copy(update={"gradient_cache": cache})
        costs = plan_costs(replace(engine, config=now), Budget(32, 10**6), profile, inputs.plans)
        return predict(
            replace(engine, config=now), inputs.plans, costs, Budget(32, 10**6), profile, fingerprint="f", held=0
        )

    kept, cached = of("never"), of("always")
    assert (kept.kept_graphs, cached.kept_graphs) == (1.0, 0.0)
    assert cached.memory.activations < kept.memory.activations / 2
    assert cached.seconds > kept.seconds


def test_checkpoints_in_the_background_take_memory(engine: Engine, inputs: TrainingInputs) -> None:
    def of(checkpoints: dict[str, object]) -> Memory:
        return expect(
            engine, inputs, TrainingConfig.model_validate({"device": "cpu", "checkpoints": checkpoints})
        ).memory

    profile = measure_profile(replace(engine, config=CONFIG), inputs.plans)
    assert of({"every_steps": 2}).checkpoint == profile.state.checkpoint
    assert of({"every_steps": 100}).checkpoint < profile.state.checkpoint
    assert of({"every_steps": 2, "background": False}).checkpoint < profile.state.checkpoint


def test_trial_steps_change_no_weight(engine: Engine, inputs: TrainingInputs) -> None:
    trained = replace(engine, config=CONFIG.model_copy(update={"micro_batch_tokens": 64, "graph_tokens": 10_000}))
    outlook = foresee(trained, inputs.plans, fingerprint="f", held=0)
    before = {name: tensor.clone() for name, tensor in engine.backend.module.state_dict().items()}
    held = held_bytes(engine.backend.device)
    trial = run_trial(trained, outlook, held=held, seed=0, limit_seconds=100)
    assert trial.forecast.measured == "steps"
    assert trial.finite
    assert not trial.out_of_memory
    assert trial.steps == 8
    assert trial.forecast.seconds > 0
    assert trial.forecast.cpu_seconds > 0
    after = engine.backend.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    short = run_trial(trained, outlook, held=held, seed=0, limit_seconds=-1)
    assert short.forecast == outlook.forecast
    assert short.steps == 1


def test_auto_is_the_run_with_the_chosen_numbers(toy_recipe: Path, tmp_path: Path) -> None:
    """Bit for bit: measuring leaves neither gradients nor random state behind."""
    from safetensors.torch import load_file

    settings = ["training.max_steps=3", "training.gradient_cache=always"]
    auto = run_stages(open_run(toy_recipe, settings, tmp_path / "a"), "train").folder
    numbers = read_json(auto / FILE, "forecast")
    given = [f"training.{key}={numbers[key]}" for key in ("micro_batch_tokens", "graph_tokens")]
    explicit = run_stages(open_run(toy_recipe, [*settings, *given], tmp_path / "b"), "train").folder
    one, other = (load_file(run / "model" / "model.safetensors") for run in (auto, explicit))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_measuring_at_the_start_changes_no_bit(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    settings = ["training.max_steps=3", "training.micro_batch_tokens=64", "training.graph_tokens=64"]
    measured = run_stages(open_run(toy_recipe, settings, tmp_path / "a"), "train").folder
    unmeasured = (Budget(64, 64), forecasting.Expected(None, None, 0.0))
    monkeypatch.setattr(trainer, "begin_forecast", lambda *args, **kwargs: unmeasured)
    plain = run_stages(open_run(toy_recipe, settings, tmp_path / "b"), "train").folder
    assert not (plain / FILE).exists()
    one, other = (load_file(run / "model" / "model.safetensors") for run in (measured, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_says_what_was_predicted_and_what_came(
    toy_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of the process as it begins, and its peak since then; what other tests have left moves neither."""
    run, asked = tmp_path / "run", []

    def told(name: str, value: int) -> None:
        monkeypatch.setattr(memory, name, lambda: asked.append(name) or value)

    assert resident_bytes() > 50_000_000 and peak_resident_bytes() > 50_000_000
    told("reset_peak_resident", 0)
    told("resident_bytes", 300_000_000)
    told("peak_resident_bytes", 360_000_000)
    with caplog.at_level(logging.INFO, logger="nearfield"):
        run_stages(open_run(toy_recipe, ["training.max_steps=3"], run), "train")
    assert len([r for r in caplog.records if r.message.startswith("Predicted") and "; actual " in r.message]) == 1
    found = read_json(run / FILE, "forecast")
    assert found["measured"] == "chunks"
    assert found["steps"] == 3
    assert found["actual"]["steps"] == 3
    assert found["actual"]["seconds"] > 0
    assert asked == ["reset_peak_resident", "resident_bytes", "peak_resident_bytes"]
    before, weights = found["memory"]["base"], found["memory"]["weights"]
    assert (before + weights, found["actual"]["peak"]) == (300_000_000, 360_000_000) and weights > 0
    assert found["at_start"]["peak"] == found["memory"]["peak"]


def test_the_forecast_of_a_dry_run_stands(toy_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = nearfield.dry_run(toy_recipe, run=run)
    assert found is not None
    assert found.forecast is not None
    assert found.forecast.measured == "steps"
    assert read_json(run / FILE, "forecast")["seconds"] == found.forecast.seconds
    run_stages(open_run(toy_recipe, (), run), "train")
    after = read_json(run / FILE, "forecast")
    b = found.forecast.to_json()
    assert after["measured"] == "steps", str([(k, after[k], b[k]) for k in b if after[k] != b[k]])
    assert after["seconds"] == found.forecast.seconds
    assert after["actual"]["predicted_seconds"] == pytest.approx(found.forecast.seconds, abs=1e-3)
    # Another training in the same folder makes its own.
    run_stages(open_run(toy_recipe, ["training.learning_rate=1.0e-4"], run), "train")
    assert read_json(run / FILE, "forecast")["measured"] == "chunks"


def test_words() -> None:
    assert [say_bytes(n) for n in (0, 3_400_000, 999_000_000, 1_250_000_000)] == ["0 MB", "3 MB", "999 MB", "1.25 GB"]
    assert [say_seconds(n) for n in (0.234, 12.6, 1200, 7500)] == ["0.2 s", "13 s", "20 min", "2.1 h"]
    assert np.isfinite(forecasting.slowest([1.5], torch.device("cpu"))[0])
