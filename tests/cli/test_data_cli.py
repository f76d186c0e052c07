"""``nearfield data``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfield.cli import main
from nearfield.data import Store

RECIPE = """\
name: test
max_bad_rows: 0.5
sources:
  - name: pairs
    task_type: Retrieval
    reader: {kind: jsonl, path: rows.jsonl}
    examples: {kind: retrieval, query: query, positives: positives, negatives: negatives}
    split: {kind: column, column: part}
"""
ROWS = [
    {"query": "red [bold]fish[/bold]", "positives": "a fish that is red", "negatives": "a boat", "part": "train"},
    {"query": "blue boat", "positives": "a boat", "negatives": ["a boat", "x"], "part": "test"},
    {"query": "bad", "positives": 3, "negatives": None, "part": "test"},
]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "test.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    output = capsys.readouterr()
    assert stopped.value.code == code, output.err
    assert "Traceback" not in output.err
    return output.out, output.err


def test_build_and_reuse(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "data", "build", "test.yaml")
    assert "The store test is built: 5 items, 2 examples" in out
    assert "1 rows quarantined: 'positives' is not a text (int)" in out
    assert "1 texts were positive and negative of one query" in out
    (folder,) = (project / "runs" / ".cache" / "data").iterdir()
    assert Store.open(folder).fingerprint == folder.name
    again, _ = run(capsys, "data", "build", "test.yaml")
    assert "is there already" in again


def test_out_and_overrides(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "data", "build", "test.yaml", "--out", "here", "name=other")
    assert "The store other is built" in out
    assert Store.open(project / "here").name == "other"
    assert not (project / "runs").exists()
    _, error = run(capsys, "data", "build", "test.yaml", "max_bad_row=1", code=2)
    assert "Did you mean 'max_bad_rows'?" in error


def test_too_many_bad_rows(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, error = run(capsys, "data", "build", "test.yaml", "--out", "here", "max_bad_rows=0.1", code=2)
    assert "1 of 3 rows cannot be used" in error
    assert "here.quarantine.jsonl" in error
    assert (project / "here.quarantine.jsonl").is_file()
    assert not (project / "here").exists()


def test_stats(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "data", "stats", "test.yaml")
    assert "Lengths in words (no --tokenizer was named)" in out
    assert "pairs, query: 2 items" in out
    out, _ = run(capsys, "data", "stats", "test.yaml", "--json")
    stats = json.loads(out)
    assert stats["examples"] == 2
    assert stats["sources"][0]["splits"] == {"test": 1, "train": 1}


def test_stats_in_tokens(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "data", "stats", "test.yaml", "--json", "--tokenizer", str(tiny_model))
    stats = json.loads(out)
    assert stats["unit"] == f"tokens of {tiny_model}"
    query = stats["sources"][0]["lengths"][0]
    # Two words each at least, between [CLS] and [SEP].
    assert query["mean"] >= 4
    _, error = run(capsys, "data", "stats", "test.yaml", "--tokenizer", str(tiny_model.parent), code=2)
    assert "no tokenizer can be loaded" in error


def test_sample(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "data", "build", "test.yaml", "--out", "here")
    out, _ = run(capsys, "data", "sample", "here", "-n", "9", "--source", "pairs")
    assert "red [bold]fish[/bold]" in out
    assert "pairs / test / example 1" in out
    out, _ = run(capsys, "data", "sample", "here", "--split", "test")
    assert "red" not in out
    _, error = run(capsys, "data", "sample", "here", "--source", "pear", code=2)
    assert "Sources: pairs." in error
    _, error = run(capsys, "data", "sample", "here", "name=x", code=2)
    assert "not with a built store" in error


@pytest.mark.parametrize("command", ["stats", "sample"])
def test_what_is_not_there(command: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, error = run(capsys, "data", command, "missing.yaml", code=2)
    assert "missing.yaml: this file does not exist" in error
    (project / "folder").mkdir()
    _, error = run(capsys, "data", command, "folder", code=2)
    assert "store" in error
