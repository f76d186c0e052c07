"""Notices that a user of a training must see are in the log, the manifest, the report and the card, or end a strict run."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch

import nearfield
from nearfield.encoders import LoadedEncoder
from nearfield.encoders.load import build_encoder
from nearfield.errors import BadInputError, Notice
from nearfield.pipeline import open_run, status, training
from nearfield.pipeline.planning import setting_notices
from nearfield.pipeline.stages import Stages
from tests.cli.command import run
from tests.conftest import write_toy_recipe
from tests.evaluation.conftest import Tasks

OF_ENCODER = Notice("of-encoder", "this encoder is a strange one", "Take another.")
SETTINGS = ["encoder.max_length=8", "training.max_steps=2", "batches.drop_last=false"]


def strange_encoder(*arguments: Any, **options: Any) -> LoadedEncoder:
    """The encoder that was asked for, with a notice."""
    return dataclasses.replace(build_encoder(*arguments, **options), notices=(OF_ENCODER,))


@pytest.fixture(scope="module")
def noticed(tiny_model: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run of which there is much to say, and what its log said."""
    folder = tmp_path_factory.mktemp("noticed")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nearfield")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_encoder", strange_encoder)
        recipe = write_toy_recipe(folder, tiny_model, toy_data)
        nearfield.train(recipe, SETTINGS, folder / "run")
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    return folder / "run", said


def test_a_training_says_what_the_dry_run_does(
    noticed: tuple[Path, list[str]], tiny_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder, said = noticed
    monkeypatch.setattr(training, "build_encoder", strange_encoder)
    dry = nearfield.dry_run(write_toy_recipe(tmp_path, tiny_model, toy_data), SETTINGS, tmp_path / "dry")
    assert dry is not None
    lasting = {notice for notice in dry.notices if notice.code not in ("time-of-chunks", "training-under-way")}
    kept = {Notice.from_json(one) for one in json.loads((run_folder / "manifest.json").read_text())["notices"]}
    assert kept == lasting
    assert OF_ENCODER in kept
    assert any("cut at 8 tokens" in notice.what for notice in kept)
    assert [said.count(notice.sentence) for notice in kept] == [1] * len(kept)


def test_report_and_card_show_them(noticed: tuple[Path, list[str]]) -> None:
    run_folder, _ = noticed
    page, card = (run_folder / "report.html").read_text(), (run_folder / "model" / "README.md").read_text()
    for one in json.loads((run_folder / "manifest.json").read_text())["notices"]:
        assert f"- {one['what']}" in card
        assert f"<li><bdi>{one['what']}</bdi>".replace("'", "&#39;") in page
    assert "Take another." in page


def test_a_strict_training_ends_before_it_begins(
    toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(toy_recipe), *SETTINGS, "--run-folder", str(tmp_path / "run"), "--strict"]
    assert run(*command) == 2
    printed = capsys.readouterr().err
    assert "cut at 8 tokens" in printed
    assert "Without --strict this is a warning." in printed
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run(*command, "--dry-run") == 2
    assert "The run would not start." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        ("{kind: infonce, temperature: 1.0e-9}", "objective.temperature is 1e-09"),
        (
            "{kind: combined, parts: [{objective: {kind: siglip}}, {objective: {kind: infonce, temperature: 0.0005}}]}",
            "objective.parts.1.objective.temperature is 0.0005",
        ),
        (
            "{kind: infonce, mixing: {list_temperature: 1.0e-6}}",
            "objective.mixing.list_temperature is 1e-06",
        ),
        ("{kind: infonce, temperature: 0.01}", None),
    ],
)
def test_a_temperature_that_leaves_no_softmax_is_said(
    toy_recipe: Path, tmp_path: Path, objective: str, key: str | None
) -> None:
    run = open_run(toy_recipe, [f"objective={objective}"], tmp_path / "run")
    found = [one.what for one in setting_notices(Stages.of(run).plan, 10) if one.code == "temperature-too-low"]
    assert len(found) == (key is not None)
    if key is not None:
        assert found[0].startswith(key)
        # The notice is true: of two documents that differ by 0.1 the farther one has no probability and no gradient.
        cosines = torch.tensor([0.5, 0.4], requires_grad=True)
        chances = (cosines / float(key.split()[-1])).softmax(0)
        assert chances[1] == 0 and torch.autograd.grad(chances[1], cosines)[0].abs().max() == 0


def test_strict_lets_minor_ones_pass_and_knows_a_finished_run(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch of an epoch need not be full."""
    settings = ["training.max_steps=1"]
    nearfield.train(toy_recipe, settings, tmp_path / "run", strict=True, until="train")
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["notices"]
    assert {one["code"]: one.get("minor") for one in kept} == {"examples-left-out": True}
    monkeypatch.setattr(training, "build_encoder", strange_encoder)
    nearfield.train(toy_recipe, settings, tmp_path / "run", until="train", restart=True)
    assert OF_ENCODER.to_json() in json.loads((tmp_path / "run" / "manifest.json").read_text())["notices"]
    with pytest.raises(BadInputError, match="a strange one"):
        nearfield.train(toy_recipe, settings, tmp_path / "run", strict=True, until="train")
    monkeypatch.undo()
    nearfield.train(toy_recipe, settings, tmp_path / "run", until="train", restart=True)
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["notices"]
    assert "of-encoder" not in {one["code"] for one in kept}


def test_missing_data_of_the_suite_is_found_before_training(toy_recipe: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: s\ntasks:\n  - {kind: folder, path: nowhere}\n")
    toy_recipe.write_text(toy_recipe.read_text() + f"evaluation: {{suite: {suite}}}\n")
    with pytest.raises(BadInputError, match="the data of a task is missing"):
        nearfield.train(toy_recipe, run=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert nearfield.train(toy_recipe, run=tmp_path / "run", until="train").ran[-1] == "train"


def test_notices_of_scores_are_kept_and_end_a_strict_run_once_they_are_filed(
    tiny_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearfield.errors import say
    from nearfield.evaluation import scoring

    monkeypatch.setattr(scoring, "read_columns_whole", lambda task: say(OF_ENCODER))
    tasks = Tasks(tmp_path / "tasks")
    tasks.retrieval()
    recipe = write_toy_recipe(tmp_path, tiny_model, toy_data)
    more = f"evaluation: {{suite: {tasks.root}, baselines: [], before: false, analysed_texts: 0}}\n"
    recipe.write_text(recipe.read_text() + more)
    settings = ["training.max_steps=2", "batches.drop_last=false"]
    made = nearfield.train(recipe, settings, tmp_path / "run", until="evaluate")
    entry = json.loads((made.folder / "manifest.json").read_text())["stages"]["evaluate"]
    kept = {task: [one["what"] for one in said] for task, said in entry["notices"]["after"].items()}
    assert kept == {"TinyRetrieval": [OF_ENCODER.what]}
    with pytest.raises(BadInputError, match="a strange one"):
        nearfield.train(recipe, settings, tmp_path / "strict", until="evaluate", strict=True)
    (file,) = (tmp_path / "strict" / "results").rglob("TinyRetrieval.json")
    assert [one["what"] for one in json.loads(file.read_text())["notices"]] == [OF_ENCODER.what]


def test_an_mteb_that_scores_other_data_makes_the_evaluation_stale(
    toy_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said in one line by status and log; the scores are made and compared anew, once."""
    suite, folder = tmp_path / "suite.yaml", tmp_path / "run"
    suite.write_text(f"name: s\ntasks:\n  - {{kind: folder, path: {Tasks(tmp_path / 'tasks').sts()}}}\n")
    toy_recipe.write_text(toy_recipe.read_text() + f"evaluation: {{suite: {suite}, baselines: [random]}}\n")
    settings = ["training.max_steps=1"]
    nearfield.train(toy_recipe, settings, folder)
    opened = open_run(toy_recipe, settings, folder)
    assert {stage.state for stage in status(opened)} == {"done"}
    manifest = json.loads((folder / "manifest.json").read_text())
    record = manifest["stages"]["evaluate"]
    # As if an earlier mteb had scored an official task on earlier data.
    now, record["versions"]["mteb"] = record["versions"]["mteb"], "2.0.0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    results = folder / record["results"]["after"]
    assert {stage.state for stage in status(open_run(toy_recipe, settings, folder))} == {"done"}, "none has moved"
    revision = mteb.get_task("STS12").metadata.revision
    (results / "STS12.json").write_text(json.dumps({"dataset_revision": "0123456789", "task_name": "STS12"}))
    states = {stage.name: stage for stage in status(open_run(toy_recipe, settings, folder))}
    said = f"mteb {now} scores other data than mteb 2.0.0: STS12 ({revision[:8]}, was 01234567)"
    assert (states["evaluate"].state, states["evaluate"].detail) == ("stale", said)
    assert [name for name, stage in states.items() if stage.state != "done"] == ["evaluate", "compare", "report"]
    with caplog.at_level(logging.WARNING):
        result = nearfield.train(toy_recipe, settings, folder)
    assert [record.message for record in caplog.records if said in record.message] == [
        f"The stage evaluate runs again: {said}"
    ]
    assert result.ran == ("evaluate", "compare", "report")
    assert {stage.state for stage in status(open_run(toy_recipe, settings, folder))} == {"done"}
