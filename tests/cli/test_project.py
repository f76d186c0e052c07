"""``nearfield init``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfield.cli import main
from nearfield.data import DataConfig
from nearfield.evaluation import HeldOutTask, SuiteConfig
from nearfield.recipe import Recipe
from nearfield.shipped import shipped_files, shipped_root


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    output = capsys.readouterr()
    assert stopped.value.code == code, output.err
    assert "Traceback" not in output.err
    return output.out, output.err


def write_pairs(path: Path) -> None:
    rows = "".join(f'"what, is {n}?",the answer number {n}\n' for n in range(200))
    path.write_text("Question,Answer\n" + rows)


def test_the_shipped_files_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "init", "project")
    assert "training/recipes/wordnet.yaml" in shipped_files()
    for name in shipped_files():
        assert (tmp_path / "project" / name).read_bytes() == (shipped_root() / name).read_bytes()
        assert name in out
    assert "nearfield train training/recipes/wordnet.yaml" in out
    out, _ = run(capsys, "init", "project")
    assert "wrote" not in out
    assert f"{len(shipped_files())} files were there already" in out


def test_files_that_differ_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "project" / "data_recipes" / "wordnet.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    _, error = run(capsys, "init", "project", code=2)
    assert "data_recipes/wordnet.yaml" in error
    assert "--force" in error
    assert mine.read_text() == "mine"
    assert not (tmp_path / "project" / "training").exists()
    run(capsys, "init", "project", "--force")
    assert mine.read_bytes() == (shipped_root() / "data_recipes" / "wordnet.yaml").read_bytes()


def test_links_out_of_the_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data_recipes").symlink_to(tmp_path / "outside")
    _, error = run(capsys, "init", "project", code=2)
    assert "leaves its folder" in error
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "project").write_text("")
    _, error = run(capsys, "init", "project", code=2)
    assert "a folder is wanted" in error


def test_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "my data.csv")
    out, _ = run(capsys, "init", "project", "--data", "my data.csv")
    assert "200 rows, read as retrieval examples in 200 groups" in out
    assert "query: Question" in out
    assert "positives: Answer" in out
    assert out.count("\nexample ") == 5
    assert "nearfield train training/recipes/my-data.yaml" in out
    recipe = DataConfig.load(tmp_path / "project" / "data_recipes" / "my-data.yaml")
    assert recipe.sources[0].name == "my-data"
    suite = SuiteConfig.load(tmp_path / "project" / "eval" / "suites" / "my-data.yaml")
    (task,) = suite.tasks
    assert isinstance(task, HeldOutTask)
    assert (task.name, task.source, task.split) == ("MyData", "my-data", "test")
    assert task.data == tmp_path / "project" / "data_recipes" / "my-data.yaml"
    out, _ = run(capsys, "recipe", "check", "project/training/recipes/my-data.yaml")
    assert "valid" in out
    out, _ = run(capsys, "data", "build", "project/data_recipes/my-data.yaml")
    assert "200 examples" in out


def test_own_data_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "x.csv")
    run(capsys, "init", "project", "--data", "x.csv")
    run(capsys, "init", "project", "--data", "x.csv")
    recipe = tmp_path / "project" / "training" / "recipes" / "x.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    _, error = run(capsys, "init", "project", "--data", "x.csv", code=2)
    assert "training/recipes/x.yaml" in error
    assert "seed: 1" in recipe.read_text()
    run(capsys, "init", "project", "--data", "x.csv", "--force")
    assert "seed: 0" in recipe.read_text()


def test_own_data_under_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "x.csv")
    run(capsys, "init", "project", "--data", "x.csv", "--name", "../no yes: [")
    assert (tmp_path / "project" / "data_recipes" / "no-yes.yaml").is_file()
    run(capsys, "init", "project", "--name", "x", code=2)


@pytest.mark.parametrize(("kind", "objective"), [("graded", "cosent"), ("labelled", "supcon")])
def test_each_kind_of_data_gets_its_objective(
    kind: str, objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "graded": {"sentence1": "a {n}", "sentence2": "b {n}", "score": 0.5},
        "labelled": {"text": "t {n}", "label": "l"},
    }[kind]
    lines = [json.dumps({k: v.format(n=n) if isinstance(v, str) else v for k, v in row.items()}) for n in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    run(capsys, "init", "project", "--data", "x.jsonl")
    assert SuiteConfig.load(tmp_path / "project" / "eval" / "suites" / "x.yaml").tasks
    recipe = Recipe.load(tmp_path / "project" / "training" / "recipes" / "x.yaml")
    assert recipe.objective.kind == objective
    out, _ = run(capsys, "recipe", "check", "project/training/recipes/x.yaml")
    assert "Trains on x" in out
    out, _ = run(capsys, "data", "build", "project/data_recipes/x.yaml")
    assert "40 examples" in out


def test_data_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("a,b,c\n1,2,3\n")
    _, error = run(capsys, "init", "project", "--data", "x.csv", code=2)
    assert "Columns here: 'a', 'b', 'c'" in error
    assert not (tmp_path / "project").exists()
