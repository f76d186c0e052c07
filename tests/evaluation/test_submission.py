"""Every ``ok`` of a submission checks content: one right submission, and each thing that the leaderboard would not take of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import pytest
import yaml
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult

from nearfield.data.decontaminate import ContaminationReport, TaskContamination, read_statement
from nearfield.errors import BadInputError
from nearfield.evaluation.hub import with_index
from nearfield.evaluation.scores import TaskScores
from nearfield.evaluation.submission import Submission, submit
from tests.cli.command import run

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSION = {"mteb": "2.26.24"}
TASKS = ("STS12", "STS17", "ArguAna")
ADVISED = {"contamination report", "public_training_code", "public_training_data", "no notice"}


def write_results(folder: Path, tasks: tuple[str, ...] = TASKS) -> Path:
    """Results of tasks of mteb as its own classes file them, all subsets and splits."""
    folder.mkdir(parents=True)
    meta = {
        "name": "org/mine", "revision": COMMIT, "embed_dim": 32, "max_tokens": 128, "similarity_fn_name": "cosine",
        "framework": ["Sentence Transformers", "PyTorch"], "release_date": "2026-01-02", "languages": ["eng-Latn"],
        "n_parameters": 1000, "license": "apache-2.0", "open_weights": True, "use_instructions": False,
        "training_datasets": ["MSMARCO"], "public_training_code": "https://x.org/code", "public_training_data": True,
    }  # fmt: skip
    (folder / "model_meta.json").write_text(json.dumps(ModelMeta.create_empty(meta).to_dict(), default=str))
    settings, prompts = [], {}
    for name in tasks:
        task = mteb.get_task(name)
        metric = task.metadata.main_score
        of_subset = {subset: {metric: 0.5, "other": 0.4, "main_score": 0.5} for subset in task.metadata.hf_subsets}
        scores = dict.fromkeys(task.metadata.eval_splits, of_subset)
        TaskResult.from_task_results(task, scores, evaluation_time=1.0).to_disk(folder / f"{name}.json")
        settings += [
            {"task": name, "splits": [split], "subsets": sorted(of_subset), "version": VERSION, "encode_kwargs": {}}
            for split in scores
        ]
        prompts[name] = {"prompts": {"None": ""}}
    (folder / "run_settings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in settings))
    (folder / "manifest.jsonl").write_text(json.dumps({"tasks": prompts, "failures": {}}) + "\n")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results" / "org__mine" / COMMIT)


def report(tasks: tuple[TaskContamination, ...]) -> list[str]:
    """A model card's sentences on the comparison with these tasks."""
    made = ContaminationReport(
        "d",
        "a suite (all)",
        ("pairs",),
        "train",
        {},
        None,
        {},
        1234,
        tasks,
        sum(task.contaminated for task in tasks),
    )
    return made.lines()


def card(folder: Path, lines: list[str] | None, front: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    section = "" if lines is None else "\n".join(["## Benchmark texts in the training data", "", *lines, ""])
    (folder / "README.md").write_text(f"---\nlibrary_name: x\n{front}---\n\n# Mine\n\n{section}")
    return folder


CLEAN = tuple(TaskContamination(name, {"text": 100}) for name in TASKS)


def bad(made: Submission) -> dict[str, str]:
    """Name and detail of each check that is not ok."""
    return {check.name: check.detail for check in made.checks if not check.ok}


def test_what_is_right_is_ok_and_mteb_takes_it(results: Path, tmp_path: Path) -> None:
    made = submit(results, tmp_path / "out", model=card(tmp_path / "model", report(CLEAN)))
    assert bad(made) == {} and made.complete
    folder = tmp_path / "out" / "results" / "org__mine" / COMMIT
    assert {path.name for path in folder.iterdir()} == {
        "run_settings.jsonl", "model_meta.json", *(f"{task}.json" for task in TASKS),
    }  # fmt: skip
    loaded = mteb.ResultCache(tmp_path / "out").load_results(
        models=["org/mine"], tasks=list(TASKS), include_remote=False, validate_and_filter=True
    )
    assert {one.task_name: one.get_score() for one in loaded.model_results[0].task_results} == dict.fromkeys(TASKS, 0.5)


Change = Callable[[dict[str, Any]], None]


def entry(change: Change) -> Change:
    """A change of the first entry of scores."""
    return lambda result: change(next(iter(result["scores"].values()))[0])


def everything(value: Any) -> Change:
    def change(of: dict[str, Any]) -> None:
        of |= {key: value for key in of if isinstance(of[key], float)}

    return entry(change)


def rename_split(result: dict[str, Any]) -> None:
    result["scores"] = {"train": result["scores"]["test"]}


def both_versions(result: dict[str, Any]) -> None:
    result["mteb_version"] = "1.38.0"
    for of in result["scores"]["test"]:
        of["mteb_version"] = "1.38.0"


@pytest.mark.parametrize(
    ("task", "change", "check", "words"),
    [
        ("STS12", lambda r: r.update(dataset_revision="1" * 40), "data revisions", "STS12 (revision 1111"),
        ("STS12", both_versions, "mteb version", "STS12 (mteb 1.38.0)"),
        ("STS12", lambda r: r.update(mteb_version="1.39.0-2.26.24"), "mteb version", "mteb 1.39.0"),
        ("STS12", lambda r: r.update(mteb_version="newest"), "mteb version", "mteb newest"),
        ("STS12", entry(lambda e: e.update(mteb_version="1.12.0")), "mteb version", "mteb 1.12.0"),
        ("STS12", everything(50.0), "scores", "the main score 50 is not between -1 and 1"),
        ("ArguAna", everything(-0.1), "scores", "the main score -0.1 is not between 0 and 1"),
        ("STS12", everything(float("nan")), "scores", "the main score nan is no number"),
        ("STS12", entry(lambda e: e.update(main_score=None)), "scores", "the main score None is no number"),
        ("STS12", entry(lambda e: e.update(main_score=0.4)), "scores", "0.4 is not its cosine_spearman, 0.5"),
        ("STS12", entry(lambda e: e.pop("cosine_spearman")), "scores", "there is no cosine_spearman"),
        ("STS12", rename_split, "splits and subsets", "split 'train' is not one that is scored (test)"),
        ("STS12", rename_split, "tasks", "missing: STS12 (default/test)"),
        ("STS12", lambda r: r.update(scores={}), "tasks", "missing: STS12 (default/test)"),
        ("STS17", lambda r: r["scores"]["test"].pop(), "tasks", "missing: STS17 ("),
        ("STS17", entry(lambda e: e.update(hf_subset="xx-yy")), "splits and subsets", "subset 'xx-yy' is none of"),
        ("STS17", lambda r: r["scores"]["test"].append(r["scores"]["test"][0]), "splits and subsets", "stands 2 times"),
        ("STS12", entry(lambda e: e.update(languages=["deu-Latn"])), "splits and subsets", "said to be in deu-Latn"),
    ],
)  # fmt: skip
def test_what_the_leaderboard_would_not_take_is_no_ok(
    results: Path, tmp_path: Path, task: str, change: Change, check: str, words: str
) -> None:
    file = results / f"{task}.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    made = submit(results, tmp_path / "out")
    assert words in bad(made).get(check, ""), bad(made)
    assert not made.complete


def test_scores_below_zero_are_right_where_the_metric_reaches_there(results: Path, tmp_path: Path) -> None:
    value = json.loads((results / "STS12.json").read_text())
    everything(-0.3)(value)
    (results / "STS12.json").write_text(json.dumps(value))
    assert submit(results, tmp_path / "out").complete


def test_a_task_that_mteb_does_not_have_is_none_of_the_leaderboard(results: Path, tmp_path: Path) -> None:
    value = json.loads((results / "STS12.json").read_text())
    (results / "STS99.json").write_text(json.dumps(value | {"task_name": "STS99"}))
    found = bad(submit(results, tmp_path / "out"))
    assert "STS99 (mteb has no task of this name)" in found["data revisions"]
    assert "not as they are: STS99" in found["read back by mteb"] and "STS99" in found["prompts"]


@pytest.mark.parametrize("lines", [None, 2])
def test_run_settings_are_asked_for_each_score(results: Path, tmp_path: Path, lines: int | None) -> None:
    file = results / "run_settings.jsonl"
    kept = file.read_text().splitlines(keepends=True)[:lines]
    file.write_text("".join(kept)) if lines is not None else file.unlink()
    assert "ArguAna (default/test" in bad(submit(results, tmp_path / "out"))["run settings"]


def test_an_aggregate_is_missing_where_only_its_parts_are(tmp_path: Path) -> None:
    whole = mteb.get_task("CQADupstackRetrieval")
    parts = tuple(str(part.metadata.name) for part in whole.metadata.tasks)
    results = write_results(tmp_path / "org__mine" / COMMIT, parts)
    missing = bad(submit(results, tmp_path / "out", benchmark="MTEB(eng, v1)"))["tasks"].partition("missing: ")[2]
    assert "CQADupstackRetrieval" in missing.split(", ") and not set(parts) & set(missing.split(", "))


@pytest.mark.parametrize(
    ("facts", "check", "words"),
    [
        ({"embed_dim": 384}, "embed_dim", "the model that was scored has 32"),
        ({"max_tokens": 512}, "max_tokens", "the model that was scored has 128"),
        ({"similarity_fn_name": "dot"}, "similarity_fn_name", "the model that was scored has"),
        ({"n_parameters": 0}, "n_parameters", "it must be positive"),
        ({"languages": []}, "languages", "it says nothing"),
        ({"framework": []}, "framework", "it says nothing"),
        ({"public_training_code": "yes"}, "public_training_code", "it is no address"),
        ({"name": "org/other"}, "name and revision", f"the results are filed as org__mine/{COMMIT}"),
        ({"name": "local/mine"}, "name and revision", "a hub name"),
        ({"revision": "main"}, "name and revision", "the commit of its weights"),
        ({"release_date": "2999-01-01"}, "release_date", "it is in the future"),
        ({"public_training_code": "https://"}, "public_training_code", "it is no address"),
        ({"embed_dim": []}, "embed_dim", "not stated"),
        ({"training_datasets": ["msmarco", "STS12"]}, "training_datasets", "msmarco is MSMARCO"),
        ({"training_datasets": ["pairs of my own"]}, "training_datasets", "mteb has no task pairs of my own: so the list"),
    ],
)  # fmt: skip
def test_facts_that_what_was_scored_contradicts_are_no_ok(
    results: Path, tmp_path: Path, facts: dict[str, Any], check: str, words: str
) -> None:
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(facts))
    made = submit(results, tmp_path / "out", facts=tmp_path / "facts.yaml")
    assert words in bad(made)[check] and (check in ADVISED or not made.complete)


@pytest.mark.parametrize(
    ("file", "text"), [("STS12.json", "[]"), ("STS12.json", "3"), ("facts.yaml", "release_date: 2026-06-31")]
)
def test_files_of_another_shape_are_one_message(results: Path, tmp_path: Path, file: str, text: str) -> None:
    facts = tmp_path / "facts.yaml" if file == "facts.yaml" else None
    (facts or results / file).write_text(text)
    with pytest.raises(BadInputError, match=r"cannot|does not accept this description") as error:
        submit(results, tmp_path / "out", facts=facts)
    assert file in str(error.value.where)


def test_run_settings_of_an_old_mteb_are_none(results: Path, tmp_path: Path) -> None:
    """Its results repository looks at the version there; the last line of a score counts."""
    file = results / "run_settings.jsonl"
    lines = file.read_text()
    old = lines.replace(VERSION["mteb"], "1.38.0")
    for text, fine in ((old, False), (lines + old, False), (old + lines, True)):
        file.write_text(text)
        found = bad(submit(results, tmp_path / "out")).get("run settings", "")
        assert ("STS12 (default/test)" in found) != fine


def test_several_dimensions_hold_the_one_that_was_scored(results: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.yaml").write_text("embed_dim: [8, 16, 32]\n")
    assert submit(results, tmp_path / "out", facts=tmp_path / "facts.yaml").complete


def test_prompts_are_instructions(results: Path, tmp_path: Path) -> None:
    line = json.loads((results / "manifest.jsonl").read_text())
    line["tasks"]["ArguAna"] = {"prompts": {"query": "Find: ", "document": ""}}
    (results / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    made = submit(results, tmp_path / "out")
    assert (
        "'Find: '" in bad(made)["use_instructions"]
        and "as-is" not in {c.name: c.detail for c in made.checks}["prompts"]
    )
    (results / "manifest.jsonl").write_text(json.dumps(line | {"prompts": "as-is"}) + "\n")
    told = {check.name: check.detail for check in submit(results, tmp_path / "out").checks}["prompts"]
    assert "not held against what was trained (--prompts as-is): ArguAna" in told


def test_parameters_are_those_of_the_folder(results: Path, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    model = card(tmp_path / "model", report(CLEAN))
    save_file({"weight": np.zeros((10, 3), np.float32)}, model / "model.safetensors")
    assert "hold 30" in bad(submit(results, tmp_path / "out", model=model))["n_parameters"]


HIT = (TaskContamination("STS12", {"text": 100}, matched={"text": {"exact": 5}}), *CLEAN[1:])
UNREAD = (TaskContamination("STS12", {}, problem="the hub is not reachable"), *CLEAN[1:])


@pytest.mark.parametrize(
    ("lines", "front", "stated", "report_words", "datasets_words"),
    [
        (None, "", ["MSMARCO"], "has none", None),
        (["The training texts were not compared with the texts of the suite."], "", ["MSMARCO"], "were not compared", None),
        (["The training texts were not compared with the texts of the suite."], "", [], "not compared", "an empty list"),
        (None, "", [], "has none", "an empty list"),
        (report(CLEAN), "", [], None, None),
        (report(CLEAN[:1]), "", [], "does not speak of ArguAna, STS17", "ArguAna, STS17 was not compared"),
        (report(UNREAD), "", [], "does not speak of STS12", "STS12 was not compared"),
        (report(HIT), "", ["MSMARCO"], None, "hold texts of STS12: name them"),
        (report(HIT), "", ["STS12"], None, None),
        (report(CLEAN), "base_model: sentence-transformers/all-MiniLM-L6-v2\n", [], None, "its base sentence-transformers/all"),
        (report(CLEAN), "base_model: nobody/knows-this\n", [], None, "what its base nobody/knows-this was trained on"),
        (report(CLEAN), "base_model: nobody/knows-this\n", ["MSMARCO"], None, None),
        ([*report(CLEAN), "", "Fine-tuned from `local/first-stage` (revision `1`) with nearfield."], "", [], None, "its base local/first-stage"),
        (report(CLEAN), "", ["pairs of my own"], None, None),
        ([*report(CLEAN), "", *report(CLEAN[:2])], "", [], "does not speak of ArguAna", "ArguAna was not compared"),
        ([*report(CLEAN), "", *report(HIT)], "", [], None, "hold texts of STS12: name them"),
        ([*report(CLEAN), "", "The training texts were not compared with the texts of the suite."], "", [], "were not compared", "nothing shows"),
        ([line.replace("1,234", "0") for line in report(CLEAN)], "", [], "were not compared", "nothing shows"),
        (["", "## Other", *report(CLEAN)], "", [], "were not compared", "nothing shows"),
    ],
)  # fmt: skip
def test_cards_and_training_data_are_read(
    results: Path,
    tmp_path: Path,
    lines: list[str] | None,
    front: str,
    stated: list[str],
    report_words: str | None,
    datasets_words: str | None,
) -> None:
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({"training_datasets": stated}))
    made = submit(
        results, tmp_path / "out", facts=tmp_path / "facts.yaml", model=card(tmp_path / "model", lines, front)
    )
    found = bad(made)
    for check, words in (("contamination report", report_words), ("training_datasets", datasets_words)):
        assert (found.get(check) is None) if words is None else words in found[check], (check, found)
    assert made.complete == (datasets_words is None)


def test_a_statement_is_what_the_report_wrote() -> None:
    tasks = (*HIT, TaskContamination("Far.v2", {"document": 2_000}, matched={"document": {"minhash": 1_200}}))
    statement = read_statement("# M\n\n## Benchmark texts in the training data\n\n" + "\n".join(report(tasks)))
    assert statement is not None
    assert statement.tasks == {*TASKS, "Far.v2"} and statement.matched == {"STS12": 5, "Far.v2": 1_200}
    clean = read_statement("## Benchmark texts in the training data\n" + "\n".join(report(CLEAN)))
    assert clean is not None and clean.matched == {}


def test_the_index_of_a_card_names_the_data_sets_of_the_tasks() -> None:
    tasks = mteb.get_benchmark("MTEB(eng, v2)").tasks
    found = {
        (str(t.metadata.name), str(t.hf_subsets[0]), str(t.eval_splits[0])): TaskScores(
            str(t.metadata.main_score), 0.5, str(t.metadata.revision), "none", task_type=str(t.metadata.type)
        )
        for t in tasks
    }
    head = yaml.safe_load(with_index("---\na: b\n---\n# M\n", "m", found)[4:].partition("\n---\n")[0])
    named = {
        one["dataset"]["name"].partition(" (")[0]: one["dataset"]["type"] for one in head["model-index"][0]["results"]
    }
    assert named == {str(t.metadata.name): t.metadata.dataset["path"] for t in tasks} and len(named) == 41
    odd = {("NoTask", "default", "test"): TaskScores("accuracy", 0.5, "d" * 40, "none")}
    assert "model-index" not in with_index("---\na: b\n---\n# M\n", "m", odd)


def test_notices_of_the_scores_are_told_and_errors_under_strict(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json.loads((results / "STS12.json").read_text())
    value["notices"] = [{"code": "zero", "what": "3 texts have zero vectors", "hint": None}]
    (results / "STS12.json").write_text(json.dumps(value))
    made = submit(results, tmp_path / "out")
    assert bad(made)["no notice"] == "STS12: 3 texts have zero vectors" and made.complete
    (results / "STS12.units.parquet").touch()
    arguments = ["submit", str(results), "--out", str(tmp_path / "out")]
    assert run(*arguments) == 0 and "advised no notice: STS12: 3 texts" in capsys.readouterr().out
    assert run(*arguments, "--strict") == 2 and "3 texts have zero vectors" in capsys.readouterr().err
    assert (tmp_path / "out" / "results").is_dir()
