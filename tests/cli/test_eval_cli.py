"""The commands eval and compare: what they print and write, and one message with exit code 2 for bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer

from nearfield.cli import compare as compare_module
from nearfield.cli import eval as eval_module
from nearfield.errors import EXIT_BAD_INPUT, BadInputError
from tests.evaluation.conftest import Tasks, build_model

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path / "tasks")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command as the program does: its exit code, and what it said."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(pretty_exceptions_enable=False)
    eval_module.register(app)
    compare_module.register(app)

    def call(*arguments: str | Path) -> tuple[int, str]:
        try:
            app([str(argument) for argument in arguments])
        except SystemExit as stop:
            captured = capsys.readouterr()
            return int(stop.code or 0), captured.out + captured.err
        except BadInputError as error:
            capsys.readouterr()
            return error.exit_code, str(error)
        raise AssertionError("a command always exits")

    return call


def test_eval_writes_scores_and_compare_reads_them(run: Run, tasks: Tasks, model: str, tmp_path: Path) -> None:
    tasks.retrieval(clusters=True), tasks.sts()
    code, text = run("eval", model, "--suite", tasks.root, "--json", tmp_path / "scores.json", "--device", "cpu")
    assert code == 0, text
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"TinyRetrieval", "TinySTS"} and set(scores["TinySTS"]) == {"default"}
    assert f"{scores['TinySTS']['default']:.4f}" in text
    folder = next((tmp_path / "results").glob("local__tiny/*"))
    assert (folder / "TinySTS.json").is_file() and str(folder.relative_to(tmp_path)) in text
    code, text = run("eval", "random", "--suite", tasks.root)
    assert code == 0, text
    code, text = run("compare", "random", "local/tiny", "--json", "c.json", "--samples", "200", "--permutations", "200")
    assert code == 0, text
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["baseline"] == "mteb/baseline-random-encoder" and len(data["differences"]) == 2
    for row in data["differences"]:
        assert row["sentence"] in text
    assert "one component of units that are not independent holds 4 of 20 (20 %)" in text
    code, text = run(
        "compare", "random", "local/tiny", "--baseline", "local/tiny", "--samples", "100", "--tasks", "TinySTS"
    )
    assert code == 0 and "mteb/baseline-random-encoder is" in text and "TinyRetrieval" not in text


def test_eval_of_a_suite_file_with_an_override(run: Run, tasks: Tasks, model: str, tmp_path: Path) -> None:
    tasks.sts(), tasks.pairs()
    (tmp_path / "suite.yaml").write_text("name: s\ntasks:\n  - {kind: folder, path: tasks, only: [TinyPairs]}\n")
    code, text = run("eval", model, "--suite", "suite.yaml", "--json", "s.json", "tasks.0.only=[TinySTS]")
    assert code == 0, text
    assert set(json.loads((tmp_path / "s.json").read_text())) == {"TinySTS"}


def test_a_failing_task_gives_exit_code_1_and_keeps_the_rest(
    run: Run, tasks: Tasks, model: str, tmp_path: Path
) -> None:
    folder = tasks.sts()
    tasks.table(folder / "default.test.parquet", sentence1=["a"], sentence2=["b"], score=["high"])
    tasks.pairs()
    code, text = run("eval", model, "--suite", tasks.root, "--json", "s.json")
    assert code == 1 and "failed" in text and "Traceback" not in text
    assert set(json.loads((tmp_path / "s.json").read_text())) == {"TinyPairs"}


SUITES = {
    "no such file": (None, "does not exist"),
    "not yaml": ("tasks: [", "suite.yaml:1"),
    "no tasks": ("name: s\ntasks: []\n", "tasks"),
    "unknown key": ("name: s\ntasks:\n  - kind: folder\n    paht: x\n", "suite.yaml:4"),
    "unknown kind": ("name: s\ntasks:\n  - kind: foldr\n    path: x\n", "Did you mean 'folder'"),
    "no kind": ("name: s\ntasks:\n  - path: x\n", "kind"),
    "wrong type": ("name: s\ntasks:\n  - kind: mteb\n    names: STS12\n", "suite.yaml:4"),
    "nothing named": ("name: s\ntasks:\n  - kind: mteb\n", "give either 'names', 'benchmark' or filters"),
    "unknown official task": ("name: s\ntasks:\n  - {kind: mteb, names: [SciFacts]}\n", "Did you mean: 'SciFact'"),
    "unknown benchmark": ("name: s\ntasks:\n  - {kind: mteb, benchmark: 'MTEB(eng)x'}\n", "not found"),
    "no language left": (
        "name: s\ntasks:\n  - {kind: mteb, names: [STS12], languages: [fra]}\n",
        "No subsets were found",
    ),
    "no language left in a benchmark": (
        "name: s\ntasks:\n  - {kind: mteb, benchmark: 'MTEB(eng, v2)', languages: [fao]}\n",
        "no task of MTEB(eng, v2)",
    ),
    "missing folder": ("name: s\ntasks:\n  - {kind: folder, path: nowhere}\n", "nowhere"),
    "task twice": ("name: s\ntasks:\n  - {kind: folder, path: tasks}\n  - {kind: folder, path: tasks}\n", "twice"),
    "unknown task in folder": (
        "name: s\ntasks:\n  - {kind: folder, path: tasks, only: [Big]}\n",
        "Tasks here: TinySTS",
    ),
    "missing data recipe": ("name: s\ntasks:\n  - {kind: heldout, name: H, data: no.yaml, source: s}\n", "no.yaml"),
    "bad task name": ("name: s\ntasks:\n  - {kind: heldout, name: ../x, data: d, source: s}\n", "name"),
    "negative distractors": (
        "name: s\ntasks:\n  - {kind: heldout, name: H, data: d, source: s, distractors: -1}\n",
        "distractors",
    ),
}


@pytest.mark.parametrize("case", SUITES)
def test_a_malformed_suite_is_one_message(run: Run, tasks: Tasks, tmp_path: Path, case: str) -> None:
    text, expected = SUITES[case]
    tasks.sts()
    if text is not None:
        (tmp_path / "suite.yaml").write_text(text)
    code, said = run("eval", "random", "--suite", "suite.yaml")
    assert code == EXIT_BAD_INPUT and expected in said, said
    assert "Traceback" not in said


def damage(name: str, tasks: Tasks) -> None:
    folder = tasks.retrieval()
    meta = json.loads((folder / "meta.json").read_text())
    changes: dict[str, Any] = {
        "meta without type": lambda: meta.pop("type"),
        "unknown type": lambda: meta.update(type="Retrieving"),
        "subset without files": lambda: meta.update(subsets=["other"]),
        "subset that leaves the folder": lambda: meta.update(subsets=["../x"]),
        "type of another task": lambda: meta.update(mteb_class="STS12"),
    }
    if name in changes:
        changes[name]()
        (folder / "meta.json").write_text(json.dumps(meta))
    elif name == "meta is no json":
        (folder / "meta.json").write_text("{task")
    elif name == "missing file":
        (folder / "default.test.qrels.parquet").unlink()
    else:
        (folder / "meta.json").unlink()


FOLDERS = {
    "meta without type": "'type'",
    "unknown type": "Types: Retrieval",
    "subset without files": "other.test.corpus.parquet",
    "subset that leaves the folder": "'../x'",
    "type of another task": "'STS'",
    "meta is no json": "meta.json",
    "missing file": "default.test.qrels.parquet",
    "no meta": "holds no task",
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_malformed_task_folder_is_one_message(run: Run, tasks: Tasks, case: str) -> None:
    damage(case, tasks)
    code, said = run("eval", "random", "--suite", tasks.root)
    assert code == EXIT_BAD_INPUT and FOLDERS[case] in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no/such/model-folder"], "no/such/model-folder"),
        (["{file}"], "this is another file"),
        (["random", "--tasks", "Nothing"], "Tasks: TinySTS"),
        (["random", "--tasks", ","], "--tasks"),
        (["random", "--prompts", "maybe"], "Modes: contract, as-is"),
        (["{model}", "--batch-tokens", "0"], "batch_tokens"),
        (["{model}", "--name", "a/b/c"], "organisation/model"),
        (["random", "tasks.0.x=1"], "overrides change a suite file"),
    ],
)
def test_a_bad_argument_is_one_message(
    run: Run, tasks: Tasks, model: str, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    tasks.sts()
    (tmp_path / "file").write_text("x")
    filled = [argument.format(file=tmp_path / "file", model=model) for argument in arguments]
    code, said = run("eval", filled[0], "--suite", tasks.root, *filled[1:])
    assert code == EXIT_BAD_INPUT and expected in said, said
    assert "Traceback" not in said


@pytest.fixture
def results(run: Run, tasks: Tasks, model: str, tmp_path: Path) -> Path:
    tasks.sts()
    assert run("eval", model, "--suite", tasks.root)[0] == 0
    assert run("eval", "random", "--suite", tasks.root)[0] == 0
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["random"], "two models or more"),
        (["random", "nobody"], "no results of 'nobody'"),
        (["random", "local/tiny", "--baseline", "bm25"], "bm25"),
        (["random", "local/tiny", "--tasks", "STS"], "Tasks: TinySTS"),
        (["random", "local/tiny", "--samples", "10"], "at least 100"),
        (["random", "local/tiny", "--level", "2"], "level"),
        (["random", "local/tiny", "--labels", "one"], "labels"),
        (["random", "local/tiny", "--labels", "one,one"], "label 'one'"),
        (["random", "random"], "label"),
    ],
)
def test_a_bad_comparison_is_one_message(run: Run, results: Path, arguments: list[str], expected: str) -> None:
    code, said = run("compare", *arguments)
    assert code == EXIT_BAD_INPUT and expected in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize("how", ["text", "no metadata", "truncated", "no model"])
def test_damaged_results_are_one_message(run: Run, results: Path, how: str) -> None:
    file = next(results.glob("local__tiny/*/TinySTS.units.parquet"))
    if how == "text":
        file.write_text("not parquet")
    elif how == "no metadata":
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    elif how == "truncated":
        table = pq.read_table(file)
        pq.write_table(table.slice(0, table.num_rows - 3), file)
    else:
        (file.parent / "model_meta.json").write_text("[]")
    code, said = run("compare", "random", "local/tiny", "--samples", "100", "--permutations", "100")
    assert code == EXIT_BAD_INPUT and "local__tiny" in said, said
    assert "Traceback" not in said
