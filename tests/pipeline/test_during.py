"""Evaluation during the training, from the recipe to the model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nearfield.errors import BadInputError, StoppedError
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages, status
from nearfield.pipeline.dry_run import dry_run
from nearfield.training import step as step_module
from tests.evaluation.conftest import Tasks
from tests.pipeline.fingerprints import fingerprints


@pytest.fixture()
def suite(tmp_path: Path, toy_data: Path) -> Path:
    """The held-out split of the toy data."""
    path = tmp_path / "small.yaml"
    path.write_text(f"name: small\ntasks:\n  - {{kind: heldout, name: Toy, data: {toy_data}, source: pairs}}\n")
    return path


def scored(suite: Path, **settings: Any) -> list[str]:
    return [f"training.evaluation={json.dumps({'suite': str(suite), 'every_steps': 3, **settings})}"]


def scores(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["scores"]) for line in read_metrics(run / "evaluations.jsonl")]


def same_model(a: Path, b: Path) -> bool:
    first, second = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_a_run_with_evaluations(toy_recipe: Path, suite: Path, tmp_path: Path) -> None:
    """The last evaluation is what the saved model scores by itself; stopping in between changes nothing."""
    from nearfield.evaluation import evaluate

    whole, stopped = tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped"
    overrides = [*scored(suite, keep_best=True), 'prompts.fallback={"query": "word9 ", "document": ""}']
    run_stages(open_run(toy_recipe, overrides, whole), "train")
    assert [step for step, _ in scores(whole)] == [0, 3, 6, 9, 12]
    record = json.loads((whole / "manifest.json").read_text())["stages"]["train"]
    best = max(scores(whole)[1:], key=lambda entry: entry[1]["mean"])
    assert record["best"] == {"step": best[0], "score": best[1]["mean"]}
    assert record["checkpoint"] == f"step-{best[0]:08d}"
    assert record["stopped_early"] is False
    card = (whole / "model" / "README.md").read_text()
    assert f"- steps: 12, the model of step {best[0]} scored best (mean)\n" in card
    alone = evaluate(str(whole / "model"), suite, tmp_path / "results")
    assert alone.scores["Toy"]["default"] == pytest.approx(best[1]["Toy"], abs=2e-5)

    run_step = step_module.run_step

    def interrupted(*args: Any, **keywords: Any) -> Any:
        if keywords["step"] == 7:
            signal.raise_signal(signal.SIGTERM)
        return run_step(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "run_step", interrupted)
        with pytest.raises(StoppedError):
            run_stages(open_run(toy_recipe, overrides, stopped), "train")
    assert [step for step, _ in scores(stopped)] == [0, 3, 6]
    run_stages(open_run(toy_recipe, overrides, stopped), "train")
    assert scores(stopped) == scores(whole)
    assert same_model(stopped, whole)


def test_the_model_is_the_best_one(toy_recipe: Path, suite: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the best is an early one, and patience ends the run."""
    run = tmp_path / "runs" / "toy"
    overrides = [
        *scored(suite, keep_best=True, patience=2, every_steps=1),
        "training.learning_rate=1.0",
        "training.optimizer={kind: sgd}",
        "training.schedule={kind: constant, warmup: 0}",
    ]
    run_stages(open_run(toy_recipe, overrides, run), "report")
    record = json.loads((run / "manifest.json").read_text())["stages"]["train"]
    told = scores(run)
    best = max(told[1:], key=lambda entry: entry[1]["mean"])
    assert record["stopped_early"]
    assert record["steps"] == told[-1][0] == best[0] + 2 < 12
    assert record["best"]["step"] == best[0]
    saved = load_file(run / "checkpoints" / f"step-{best[0]:08d}" / "model.safetensors")
    model = load_file(run / "model" / "model.safetensors")
    assert len(saved) > 20
    for name, tensor in saved.items():
        assert np.array_equal(tensor, model[name.removeprefix("encoder.0.model.")]), name
    page = (run / "report.html").read_text()
    assert "The training ended early" in page
    assert "Evaluation: Toy" in page
    assert {stage.name: stage.state for stage in status(open_run(toy_recipe, overrides, run))}["train"] == "done"


def test_what_makes_a_training_stale(toy_recipe: Path, suite: Path, toy_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "toy"

    def train_print(*overrides: str) -> str:
        return fingerprints(toy_recipe, overrides, run)["train"]

    plain = train_print()
    assert train_print("training.trackers=[{kind: tensorboard}]") == plain
    assert train_print(*scored(suite)) == plain, "looking on changes nothing"
    assert train_print(*scored(suite, every_steps=5, metric="Toy")) == plain
    best = train_print(*scored(suite, keep_best=True))
    assert best != plain
    others = [{"every_steps": 5}, {"metric": "Toy"}, {"patience": 3}, {"keep_best": False, "patience": 3}]
    others += [{"every_steps": None, "every_epochs": 1}, {"minimum_gain": 0.1}]
    prints = {train_print(*scored(suite, **{"keep_best": True, **other})) for other in others}
    assert len(prints | {best}) == len(others) + 1
    for same in ({"at_start": False}, {"prompts": "as-is"}):
        assert train_print(*scored(suite, keep_best=True, **same)) == best
    suite.write_text(suite.read_text().replace("source: pairs", "source: pairs, max_queries: 9"))
    assert train_print(*scored(suite, keep_best=True)) != best


def test_a_suite_that_cannot_be_run_is_told_before_the_training(
    toy_recipe: Path, suite: Path, toy_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "toy"
    with pytest.raises(BadInputError, match="no task of the suite gives the metric 'Toys'"):
        run_stages(open_run(toy_recipe, scored(suite, metric="Toys"), run), "train")
    assert not (run / "checkpoints").exists()
    with pytest.raises(BadInputError, match="there is no source 'missing'"):
        suite.write_text(suite.read_text().replace("source: pairs", "source: missing"))
        open_run(toy_recipe, scored(suite), run)
    with pytest.raises(BadInputError, match="does not exist"):
        open_run(toy_recipe, scored(tmp_path / "nowhere.yaml"), run)


def test_types_that_no_source_had_are_said_of_the_suite_during_training(toy_recipe: Path, tmp_path: Path) -> None:
    """By the dry run and by the training, in log and manifest; with --strict it ends before a step."""
    pairs = tmp_path / "pairs.yaml"
    pairs.write_text(f"name: pairs\ntasks:\n  - {{kind: folder, path: {Tasks(tmp_path / 'tasks').sts()}}}\n")
    dry = dry_run(open_run(toy_recipe, scored(pairs), tmp_path / "looked-at"))
    assert dry is not None and dry.would_start
    (expected,) = [notice for notice in dry.notices if notice.code == "type-not-trained"]
    assert "no source of the training was of type STS; TinySTS puts no prompt before its texts" in expected.what
    settings = [*scored(pairs, prompts="as-is"), "training.max_steps=1"]
    run_stages(open_run(toy_recipe, settings, tmp_path / "run"), "train")
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["notices"]
    assert expected.to_json() in kept
    assert [one["code"] for one in kept].count("prompts-as-is") == 1
    with pytest.raises(BadInputError, match="type not trained"):
        run_stages(open_run(toy_recipe, scored(pairs), tmp_path / "strict"), "train", strict=True)
    assert not (tmp_path / "strict" / "checkpoints").exists()
