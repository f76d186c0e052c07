"""Notices of scores: said once, filed with the score, shown wherever the score is, and errors under --strict."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import pytest
from mteb.results import TaskResult

from nearfield.encoders import LoadedEncoder, load_encoder
from nearfield.errors import BadInputError, Notice, from_file, in_file, listening, refuse, say
from nearfield.evaluation import ModelComparison, compare, evaluate, label_results, runner, scoring
from nearfield.evaluation.hub import scores_section
from nearfield.evaluation.leaderboard import leaderboard
from nearfield.evaluation.results import read_manifest, read_scores
from nearfield.evaluation.runner import DuringTraining
from nearfield.evaluation.tasks import SuiteTask
from tests.cli.command import run
from tests.evaluation.made import write_result

OF_MODEL = Notice("mates", "vectors depend on their batch mates", "Pad to the maximum.")
OF_TASK = Notice("zero", "3 texts have zero vectors")


@pytest.fixture
def nearfield(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line: its exit code, and what it wrote to standard output and error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part deep in the scoring of TinySTS says a notice, twice."""
    own = scoring.read_columns_whole

    def read(task: Any) -> Any:
        if task.metadata.name == "TinySTS":
            say(OF_TASK), say(OF_TASK)
        return own(task)

    monkeypatch.setattr(scoring, "read_columns_whole", read)


def with_notice(folder: Path) -> LoadedEncoder:
    import dataclasses

    return dataclasses.replace(load_encoder(str(folder), device="cpu"), notices=(OF_MODEL,))


def files_of(folder: Path) -> dict[str, list[str]]:
    """Task -> codes of the notices in mteb's result file; those with the units are the same."""
    units = {task: [notice.code for notice in of.notices] for (task, _, _), of in read_scores(folder).items()}
    results = {p.stem: json.loads(p.read_text()) for p in folder.glob("Tiny*.json")}
    found = {task: [notice["code"] for notice in value["notices"]] for task, value in results.items()}
    assert units == found
    return found


def test_notices_are_filed_with_their_scores_and_said_once(
    tasks: Any, model_folder: Path, tmp_path: Path, noisy: None, caplog: pytest.LogCaptureFixture
) -> None:
    tasks.sts(), tasks.pairs()
    with caplog.at_level(logging.WARNING):
        result = evaluate(with_notice(model_folder), tasks.root, tmp_path / "out")
    assert result.notices == {"": (OF_MODEL,), "TinySTS": (OF_TASK,)}
    said = [record.getMessage() for record in caplog.records if record.name == "nearfield.notices"]
    assert said == [f"{OF_MODEL.what} ({OF_MODEL.hint})", f"TinySTS: {OF_TASK.what}"]
    folder = result.results_dir
    assert files_of(folder) == {"TinySTS": ["mates", "zero"], "TinyPairs": ["mates"]}
    assert read_manifest(folder)[-1]["notices"] == {"": in_file([OF_MODEL]), "TinySTS": in_file([OF_TASK])}
    # mteb's own readers pass over the key.
    assert TaskResult.from_disk(folder / "TinySTS.json").get_score() == pytest.approx(
        result.scores["TinySTS"]["default"], abs=1e-6
    )
    (tmp_path / "out").rename(tmp_path / "results")
    loaded = mteb.ResultCache(tmp_path).load_results(models=["local/tiny"], tasks=["TinySTS"], include_remote=False)
    assert [one.task_name for one in loaded.model_results[0].task_results] == ["TinySTS"]


def test_results_that_are_taken_up_again_keep_and_gain_notices(
    tasks: Any, model_folder: Path, tmp_path: Path, noisy: None, caplog: pytest.LogCaptureFixture
) -> None:
    tasks.sts()
    first = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    caplog.clear()
    again = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    assert again.reused == ("TinySTS",) and again.notices == first.notices == {"TinySTS": (OF_TASK,)}
    assert OF_TASK.what in caplog.text
    more = evaluate(with_notice(model_folder), tasks.root, tmp_path / "out")
    assert more.reused == ("TinySTS",) and files_of(more.results_dir) == {"TinySTS": ["mates", "zero"]}
    assert more.scores == first.scores
    with pytest.raises(BadInputError, match="3 texts have zero vectors"):
        evaluate(str(model_folder), tasks.root, tmp_path / "out", strict=True)


def test_strict_stops_for_the_model_first_and_for_tasks_when_all_are_filed(
    tasks: Any, model_folder: Path, tmp_path: Path, noisy: None
) -> None:
    tasks.sts(), tasks.pairs()
    with pytest.raises(BadInputError, match="batch mates"):
        evaluate(with_notice(model_folder), tasks.root, tmp_path / "none", strict=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(BadInputError, match="3 texts have zero vectors") as caught:
        evaluate(str(model_folder), tasks.root, tmp_path / "out", strict=True)
    assert caught.value.exit_code == 2 and "Without --strict" in str(caught.value.hint)
    assert len(list((tmp_path / "out").rglob("Tiny*.json"))) == 2


def test_the_command_shows_notices_and_leaves_with_2_under_strict(
    tasks: Any, model_folder: Path, tmp_path: Path, noisy: None, nearfield: Callable[..., tuple[int, str, str]]
) -> None:
    tasks.sts(), tasks.pairs()
    arguments = ["eval", str(model_folder), "--suite", str(tasks.root), "--out", str(tmp_path / "out"), "--no-cache"]
    code, out, err = nearfield(*arguments, "--dims", "8")
    assert code == 0 and out.count(f"* TinySTS: {OF_TASK.what}") == 2 and err.count(OF_TASK.what) == 1
    assert sum(" *" in line for line in out.splitlines() if "TinySTS" in line and "0." in line) == 2
    assert not any(" *" in line for line in out.splitlines() if "TinyPairs" in line)
    code, _, err = nearfield(*arguments, "--strict")
    assert code == 2 and OF_TASK.what in err


def test_an_aggregate_has_the_notices_of_its_parts(
    tasks: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noisy: None
) -> None:
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    from nearfield.evaluation.folder import folder_task

    parts = [folder_task(tasks.sts()).task, folder_task(tasks.sts("TinyOther", count=25)).task]

    class Both(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="TinyBoth",
            description="Two",
            tasks=parts,
            main_score="cosine_spearman",
            type="STS",
            eval_splits=["test"],
        )

    monkeypatch.setattr(runner, "open_suite", lambda *_, **__: [SuiteTask(Both())])
    result = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    assert result.notices == {"TinySTS": (OF_TASK,), "TinyBoth": (OF_TASK,)}
    assert json.loads((result.results_dir / "TinyBoth.json").read_text())["notices"] == in_file([OF_TASK])


def test_a_failed_task_keeps_its_notices_in_the_manifest(
    tasks: Any, model_folder: Path, tmp_path: Path, noisy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring.mteb, "evaluate", None)
    tasks.sts()
    result = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    assert set(result.failures) == {"TinySTS"} and result.notices == {"TinySTS": (OF_TASK,)}
    assert read_manifest(result.results_dir)[-1]["notices"] == {"TinySTS": in_file([OF_TASK])}


def test_scores_during_training_say_a_notice_once(
    tasks: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tasks.sts()
    monkeypatch.setattr(scoring, "read_columns_whole", lambda task: say(OF_TASK))
    model = load_encoder(str(model_folder), device="cpu").model
    scorer = DuringTraining(model, tasks.root, name="me/tiny", metric="mean", contract=None)
    for _ in range(2):
        scorer(lambda texts, prompt: model.encode(list(texts)))
    assert [r.getMessage() for r in caplog.records if r.name == "nearfield.notices"] == [f"TinySTS: {OF_TASK.what}"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two models on two tasks; the second has a notice on one of them and another on both."""
    found = []
    for model, notices in (("A", {}), ("B", {"One": [OF_MODEL, OF_TASK], "Two": [OF_MODEL]})):
        for task in ("One", "Two"):
            values = [0.1 * i for i in range(10)]
            said = in_file(notices.get(task, []))
            found.append(write_result(tmp_path / f"local__{model}" / "1", values, task=task, notices=said))
    return list(dict.fromkeys(found))


def test_comparison_leaderboard_and_card_tell_the_notices_of_their_scores(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(label_results(folders, ["A", "B"]), samples=200, permutations=200)
    lines = [notice.sentence for notice in comparison.notices]
    assert lines == [f"* B on all tasks: {OF_MODEL.what}", f"* B on One: {OF_TASK.what}"]
    (tmp_path / "comparison.json").write_text(json.dumps(comparison.to_json()))
    assert ModelComparison.from_json(tmp_path / "comparison.json").notices == comparison.notices
    board = leaderboard(folders, ["A", "B"], samples=200)
    assert [notice.sentence for notice in board.notices] == lines
    assert compare(label_results(folders, ["A", "B"]), tasks=["Two"], samples=200, permutations=200).notices[
        0
    ].tasks == ("Two",)
    card = scores_section(folders[1], samples=200)
    assert f"- all tasks: {OF_MODEL.what}" in card and f"- One: {OF_TASK.what}" in card
    assert card.count("0.4500 * |") == 2 and "asterisk" not in scores_section(folders[0], samples=200)


def test_the_commands_and_the_report_mark_scores_with_notices(
    folders: list[Path], tmp_path: Path, nearfield: Callable[..., tuple[int, str, str]]
) -> None:
    from nearfield.reporting import build_report

    made = tmp_path / "run"
    made.mkdir()
    names = [str(folder) for folder in folders]
    code, out, _ = nearfield(
        "compare", *names, "--samples", "200", "--permutations", "200", "--json", str(made / "comparison.json")
    )
    assert code == 0 and out.count("0.4500 *") == 2 and f"* local/B on One: {OF_TASK.what}" in out
    code, out, _ = nearfield("leaderboard", *names, "--samples", "200", "--markdown", str(tmp_path / "board.md"))
    assert code == 0 and f"* local/B on One: {OF_TASK.what}" in out and "local/B *" in out and "local/A *" not in out
    board = (tmp_path / "board.md").read_text()
    assert "| local/B | 0.4500 * | 0.4500 * |" in board and f"\\* local/B on One: {OF_TASK.what}" in board
    page = build_report(made).path.read_text()
    assert f"local/B on One: {OF_TASK.what}" in page and f"{OF_MODEL.what} {OF_MODEL.hint}" in page
    assert "0.450 *" in page or "0.4500 *" in page


def test_refusal_lists_each_notice_once_and_old_files_have_none() -> None:
    with pytest.raises(BadInputError, match=r"^there: 3 texts have zero vectors; vectors depend"):
        refuse([OF_TASK, OF_TASK, OF_MODEL], where="there")
    refuse([])
    assert from_file(None) == () and from_file([{"code": "only"}]) == () and from_file(in_file([OF_TASK])) == (OF_TASK,)


def test_what_nobody_hears_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    say(OF_TASK, "Some")
    with listening() as outer:
        say(OF_TASK)
        with listening() as inner, inner.about("Task"):
            say(OF_TASK), say(OF_MODEL, "Other")
    assert outer.all() == {"": (OF_TASK,)} and inner.all() == {"Task": (OF_TASK,), "Other": (OF_MODEL,)}
    assert [record.getMessage() for record in caplog.records] == [
        f"Some: {OF_TASK.what}", OF_TASK.what, f"Other: {OF_MODEL.what} ({OF_MODEL.hint})",
    ]  # fmt: skip
