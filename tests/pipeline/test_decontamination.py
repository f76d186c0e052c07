"""The command and the stored report: kept by fingerprints, picked up by the run whose data and suite it fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nearfield.cli.app import app
from nearfield.data.decontaminate import VERSION, read_statement
from nearfield.data.store import Store
from nearfield.errors import BadInputError
from nearfield.pipeline import Run, open_run, run_stages, status
from nearfield.pipeline.stages import Stages
from nearfield.pipeline.suites import report_of, stored_report

ROWS = [("planted query of some length", "a document about rivers"), ("another query", "the planted document")]


@pytest.fixture()
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, its data, and a suite of one STS task that holds a training text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    rows = [*ROWS, *((f"word{i} query", f"document word{i}") for i in range(30))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"query": a, "positives": [b]}) + "\n" for a, b in rows))
    source = {
        "name": "pairs",
        "task_type": "Retrieval",
        "reader": {"kind": "jsonl", "path": "rows.jsonl"},
        "examples": {"kind": "retrieval", "query": "query", "positives": "positives"},
        "split": {"kind": "all"},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"name": "data", "sources": [source]}))
    task = tmp_path / "tasks" / "Planted"
    task.mkdir(parents=True)
    meta = {"task": "Planted", "type": "STS", "split": "test", "subsets": ["default"]}
    (task / "meta.json").write_text(json.dumps(meta))
    columns = {"sentence1": ["PLANTED query, of some length", "x"], "sentence2": ["clean", "y"], "score": [1.0, 0.0]}
    pq.write_table(pa.table(columns), task / "default.test.parquet")
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump({"name": "small", "tasks": [{"kind": "folder", "path": "tasks"}]})
    )
    recipe = {
        "name": "run",
        "data": "data.yaml",
        "encoder": {"model": str(tiny_model)},
        "batches": {"kind": "single_source", "batch_size": 4},
        "training": {"epochs": 1, "max_steps": 1, "trackers": []},
        "evaluation": {"suite": "suite.yaml", "before": False, "baselines": []},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["--quiet", "data", "decontaminate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_reports_and_writes_what_to_remove(project: Path) -> None:
    output = call("data.yaml", "--suite", "suite.yaml", "--remove", "remove.jsonl", "--json", "report.json")
    assert "1 training texts match" in output
    assert '"PLANTED query, of some length"' in output
    (removal,) = map(json.loads, (project / "remove.jsonl").read_text().splitlines())
    assert removal["kind"] == "normalised"
    assert removal["task"] == "Planted"
    report = json.loads((project / "report.json").read_text())
    assert report["contaminated"] == 1
    recipe = yaml.safe_load((project / "data.yaml").read_text())
    cleaned = {**recipe, "steps": [{"kind": "removal_list", "path": "remove.jsonl"}]}
    (project / "cleaned.yaml").write_text(yaml.safe_dump(cleaned))
    assert "0 training texts match" in call("cleaned.yaml", "--suite", "suite.yaml", "--check")
    checked = CliRunner().invoke(app, ["-q", "data", "decontaminate", "data.yaml", "--suite", "suite.yaml", "--check"])
    assert checked.exit_code == 1


def test_training_picks_up_the_report_that_fits(project: Path) -> None:
    run = open_run(project / "recipe.yaml", (), project / "runs" / "run")
    unchecked = run_stages(run, "train")
    assert unchecked.model is not None
    assert "were not compared" in (unchecked.model / "README.md").read_text()
    assert run.record("train")["contamination"] is None

    call("data.yaml", "--suite", "suite.yaml")
    run_stages(run, "train", restart=True)
    entry = run.record("train")["contamination"]
    assert "translations" in entry["unseen"]
    assert entry["contaminated"] == 1
    assert entry["tasks"]["Planted"]["matched"] == {"text": {"normalised": 1}}
    card = (run.folder / "model" / "README.md").read_text()
    assert "## Benchmark texts in the training data" in card
    assert "| Planted | 4 | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in card

    # Another text in the data or in the suite: the report no longer fits.
    with (project / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"query": "new", "positives": ["row"]}) + "\n")
    other = open_run(project / "recipe.yaml", (), project / "runs" / "run")
    run_stages(other, "train", restart=True)
    assert other.record("train")["contamination"] is None


def test_a_report_of_other_sources_or_splits_does_not_fit(project: Path) -> None:
    call("data.yaml", "--suite", "suite.yaml")
    (path,) = (project / "runs" / ".cache" / "decontamination").glob("*.json")
    data, suite = path.stem.split("-")
    cache = project / "runs" / ".cache"
    assert stored_report(cache, data, suite, ["pairs"], "train") is not None
    assert stored_report(cache, data, suite, ["pairs", "more"], "train") is None
    assert stored_report(cache, data, suite, ["pairs"], "other") is None
    assert stored_report(cache, suite, data, ["pairs"], "train") is None


def test_a_report_of_another_version_is_left_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("data.yaml", "--suite", "suite.yaml")
    (path,) = (project / "runs" / ".cache" / "decontamination").glob("*.json")
    data, suite = path.stem.split("-")
    monkeypatch.setattr("nearfield.pipeline.suites.VERSION", VERSION + 1)
    assert stored_report(project / "runs" / ".cache", data, suite, ["pairs"], "train") is None


# The stage of a run.


def states(run: Run) -> dict[str, str]:
    return {stage.name: stage.state for stage in status(run)}


def fingerprints(run: Run) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in Stages.of(run).wanted("train")}


def test_a_run_compares_and_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fingerprints(open_run(project / "recipe.yaml", (), project / "runs" / "plain"))
    run = open_run(project / "recipe.yaml", ["decontaminate.matches=report"], project / "runs" / "run")
    assert states(run)["decontaminate"] == "missing"
    run_stages(run, "decontaminate")
    assert states(run)["decontaminate"] == "done"
    assert run.record("decontaminate")["contaminated"] == 1
    assert json.loads((run.folder / "contamination.removals.jsonl").read_text())["kind"] == "normalised"
    # A report changes nothing of what is trained.
    made = fingerprints(run)
    assert {name: made[name] for name in plain} == plain
    report = report_of(Stages.of(run).training_data)
    assert report is not None and report.path == run.folder / "contamination.json"
    assert report.report.line().endswith("1 training texts match")
    for change in ("decontaminate.ngram=8", "decontaminate.matches=leave_out", "split=other"):
        changed = open_run(project / "recipe.yaml", ["decontaminate.matches=report", change], run.folder)
        assert states(changed)["decontaminate"] != "done", change
    monkeypatch.setattr("nearfield.pipeline.data.DECONTAMINATION_VERSION", VERSION + 1)
    assert states(run)["decontaminate"] == "stale"


def test_a_run_goes_without_what_matches(project: Path) -> None:
    overrides = ["decontaminate.matches=leave_out"]
    run = open_run(project / "recipe.yaml", overrides, project / "runs" / "run")
    stages = Stages.of(run)
    run_stages(run, "plan")
    texts = stages.training_data.open()
    assert not {"planted query of some length", "a document about rivers"} & set(texts.texts(examples_items(texts)))
    assert stages.training_data.open().examples.num_rows == stages.data.open().examples.num_rows - 1
    assert run_stages(run, "plan").ran == ()
    made = run_stages(run, "train")
    assert made.model is not None
    card = (made.model / "README.md").read_text()
    assert (
        "none of their texts is in what was trained on: 1 training texts that match texts of Planted were left out"
        in card
    )
    statement = read_statement(card)
    assert statement is not None and statement.tasks == {"Planted"} and statement.matched == {}
    # A damaged store and a lost report are made again.
    shutil.rmtree(stages.decontaminate.output)
    assert "decontaminate" in run_stages(run, "plan").ran
    stages.decontaminate.report.unlink()
    assert states(run)["decontaminate"] == "missing"


def examples_items(store: Store) -> list[int]:
    """The items that examples have."""
    found: set[int] = set()
    for example in store.examples.to_pylist():
        found |= {example["query"], *example["positives"], *example["negatives"]}
    return sorted(found)


def test_trainings_in_a_row_are_compared_with_the_last_suite(project: Path) -> None:
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe |= {"decontaminate": {}, "stages": [{"name": "first"}, {"name": "second"}]}
    (project / "rows.yaml").write_text(yaml.safe_dump(recipe))
    run = open_run(project / "rows.yaml", (), project / "runs" / "rows")
    first = Stages.of(run.before[0]).decontaminate
    assert first.is_wanted and first.fingerprint == Stages.of(run).decontaminate.fingerprint


def test_a_comparison_needs_a_suite(project: Path) -> None:
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    del recipe["evaluation"]
    (project / "none.yaml").write_text(yaml.safe_dump({**recipe, "decontaminate": {}}))
    with pytest.raises(BadInputError, match="there is none"):
        open_run(project / "none.yaml")
    (project / "named.yaml").write_text(yaml.safe_dump({**recipe, "decontaminate": {"suite": "suite.yaml"}}))
    run = open_run(project / "named.yaml")
    run_stages(run, "decontaminate")
    assert run.record("decontaminate")["contaminated"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.yaml", "--suite", "suite.yaml"), "does not exist"),
        (("data.yaml", "--suite", "no.yaml"), "does not exist"),
        (("data.yaml", "--suite", "suite.yaml", "--set", "ngran=3"), "Did you mean 'ngram'"),
        (("data.yaml", "--suite", "suite.yaml", "--split", "dev"), "is in the split 'dev'"),
        (("data.yaml", "--suite", "suite.yaml", "--sources", "nope"), "no source 'nope'"),
    ],
)
def test_bad_input_is_one_message(
    project: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from nearfield.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["data", "decontaminate", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_vectors_of_a_model_are_compared_too(project: Path, tiny_model: Path) -> None:
    output = call("data.yaml", "--suite", "suite.yaml", "--embed", str(tiny_model), "--set", "cosine=0.2")
    assert "embedding" in output
    (path,) = (project / "runs" / ".cache" / "decontamination").glob("*.json")
    assert json.loads(path.read_text())["encoder"] == str(tiny_model)
