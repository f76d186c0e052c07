"""From recipe to evidence: evaluation before and after, comparison and report, as stages of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.errors import NearfieldError
from nearfield.evaluation import ModelComparison
from nearfield.pipeline import open_run, run_stages, status
from tests.pipeline.fingerprints import fingerprints


@pytest.fixture()
def recipe(toy_recipe: Path, toy_data: Path, tmp_path: Path) -> Path:
    """The toy recipe with prompts and a held-out suite."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"name: toy\ntasks: [{{kind: heldout, name: ToyRetrieval, data: {toy_data}, source: pairs, distractors: 50}}]\n"
    )
    text = toy_recipe.read_text() + f"evaluation: {{suite: {suite}}}\nprompts: {{fallback: {{query: 'word199 '}}}}\n"
    toy_recipe.write_text(text)
    return toy_recipe


def test_evidence(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    result = run_stages(open_run(recipe, (), folder))
    assert result.ran == ("data", "tokens", "plan", "train", "evaluate", "compare", "report")
    comparison = ModelComparison.from_json(folder / "comparison.json")
    assert comparison.baseline == "before"
    assert {model.label for model in comparison.models} == {"before", "after", "bm25", "random"}
    assert [row.model for row in comparison.differences] == ["bm25", "random", "after"]
    scores = {row.model: row for row in comparison.scores}
    assert all(row.low is not None and row.low <= row.score <= row.high for row in scores.values())  # type: ignore[operator]
    assert scores["bm25"].score > scores["random"].score
    model = json.loads((folder / "model" / "config_sentence_transformers.json").read_text())
    assert model["prompts"]["query"] == model["prompts"]["Retrieval-query"] == "word199 "
    after = next(model for model in comparison.models if model.label == "after")
    assert after.name == "nearfield/toy"
    task = json.loads((Path(after.path) / "ToyRetrieval.json").read_text())
    assert task["dataset_revision"].startswith("local-")
    report = (folder / "report.html").read_text()
    assert "ToyRetrieval" in report
    assert {stage.state for stage in status(open_run(recipe, (), folder))} == {"done"}
    # A number that is another one by a flipped bit is made again, and so is what cannot be read.
    written = (folder / "comparison.json").read_bytes()
    for damaged in (written.replace(b"0.", b"1.", 1), written[:-9]):
        (folder / "comparison.json").write_bytes(damaged)
        (stale,) = [stage for stage in status(open_run(recipe, (), folder)) if stage.state != "done"]
        assert (stale.name, stale.detail) == ("compare", "its file was changed or is damaged")
        assert run_stages(open_run(recipe, (), folder)).ran == ("compare",)
        assert (folder / "comparison.json").read_bytes() == written
    changed = {stage.name: stage.state for stage in status(open_run(recipe, ["evaluation.baselines=[bm25]"], folder))}
    assert (changed["train"], changed["evaluate"]) == ("done", "stale")


def test_a_recipe_that_changes_the_encoder_is_compared_with_the_same_encoder_untrained(
    recipe: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "runs" / "toy"
    run_stages(open_run(recipe, ["encoder.pooling=cls", "evaluation.baselines=[]"], folder))
    untrained = SentenceTransformer(str(folder / "untrained"), device="cpu")
    assert untrained[1].pooling_mode == "cls"
    comparison = ModelComparison.from_json(folder / "comparison.json")
    assert [model.label for model in comparison.models] == ["before", "after"]


def test_one_model_alone_is_not_compared(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    result = run_stages(open_run(recipe, ["evaluation.baselines=[]", "evaluation.before=false"], folder))
    assert result.ran == ("data", "tokens", "plan", "train", "evaluate", "report")


def test_a_task_that_fails_stops_the_run_with_its_reason(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearfield.evaluation import runner

    def broken(*args: object) -> None:
        raise RuntimeError("the task is broken")

    monkeypatch.setattr(runner._Run, "_score", broken)
    with pytest.raises(NearfieldError, match="the task is broken") as error:
        run_stages(open_run(recipe, ["evaluation.baselines=[random]"], tmp_path / "runs" / "toy"))
    assert error.value.exit_code == 1


def test_a_suite_may_be_a_folder_and_its_content_counts(recipe: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "file").write_text("one")
    settings = [f"evaluation.suite={tasks}"]
    first = fingerprints(recipe, settings, tmp_path / "run")["evaluate"]
    (tasks / "file").write_text("two")
    assert fingerprints(recipe, settings, tmp_path / "run")["evaluate"] != first


def test_training_is_reproducible_from_a_copy_of_the_model(recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    """The weights depend on what the recipe says, not on where the files lie."""
    from safetensors.numpy import load_file

    weights = []
    for name in ("a", "b"):
        shutil.copytree(tiny_model, tmp_path / name / "model")
        run = tmp_path / name / "runs" / "toy"
        run_stages(open_run(recipe, [f"encoder.model={tmp_path / name / 'model'}"], run), "train")
        weights.append(load_file(run / "model" / "model.safetensors"))
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
    other = save_tiny_bert(tmp_path / "other", seed=7)
    run_stages(open_run(recipe, [f"encoder.model={other}"], tmp_path / "runs" / "other"), "train")
    third = load_file(tmp_path / "runs" / "other" / "model" / "model.safetensors")
    assert not all(np.array_equal(weights[0][key], third[key]) for key in third)
