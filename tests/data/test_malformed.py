"""Malformed files and recipes: one message with place and hint, exit code 2, no traceback."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from nearfield.cli import main

GOOD = json.dumps({"query": "q", "positives": "p", "negatives": None})
RECIPE = """\
name: test
sources:
  - name: pairs
    task_type: Retrieval
    reader: {kind: jsonl, path: rows.jsonl}
    examples: {kind: retrieval, query: query, positives: positives}
    split: {kind: all, name: train}
"""
CSV = RECIPE.replace("jsonl, path: rows.jsonl", "csv, path: rows.csv")
PARQUET = RECIPE.replace("jsonl, path: rows.jsonl", "parquet, path: rows.parquet")
Files = Mapping[str, bytes]

CASES: dict[str, tuple[str, Files, list[str]]] = {
    "no data file": (RECIPE, {}, ["rows.jsonl: this file does not exist", "relative to the recipe"]),
    "empty file": (RECIPE, {"rows.jsonl": b""}, ["'pairs' is empty", "Check its reader"]),
    "blank lines": (RECIPE, {"rows.jsonl": b"\n\n \n"}, ["'pairs' is empty"]),
    "not JSON": (RECIPE, {"rows.jsonl": b"query,positives\n"}, ["rows.jsonl:1: not valid JSON", "max_bad_rows"]),
    "binary": (RECIPE, {"rows.jsonl": bytes(range(128, 256)) * 9}, ["rows.jsonl:1: not UTF-8", "quarantine.jsonl"]),
    "UTF-16": (RECIPE, {"rows.jsonl": GOOD.encode("utf-16")}, ["UTF-16, not UTF-8", "Save it as UTF-8"]),
    "one JSON array": (RECIPE, {"rows.jsonl": f"[{GOOD}]".encode()}, ["rows.jsonl:1: not a JSON object"]),
    "misnamed column": (
        RECIPE.replace("query: query", "query: querry"),
        {"rows.jsonl": GOOD.encode()},
        ["rows.jsonl:1: no column 'querry'"],
    ),
    "null bytes": (RECIPE, {"rows.jsonl": b"\0" * 300}, ["rows.jsonl:1: not valid JSON"]),
    "cut gzip": (
        RECIPE.replace("rows.jsonl", "rows.jsonl.gz"),
        {"rows.jsonl.gz": gzip.compress(GOOD.encode() * 999)[:-9]},
        ["rows.jsonl.gz", "broken or cut short", "again"],
    ),
    "no gzip": (
        RECIPE.replace("rows.jsonl", "rows.jsonl.gz"),
        {"rows.jsonl.gz": GOOD.encode()},
        ["broken or cut short"],
    ),
    "no xz": (RECIPE.replace("rows.jsonl", "rows.jsonl.xz"), {"rows.jsonl.xz": GOOD.encode()}, ["broken or cut short"]),
    "no zstd": (
        RECIPE.replace("rows.jsonl", "rows.jsonl.zst"),
        {"rows.jsonl.zst": GOOD.encode()},
        ["broken or cut short"],
    ),
    "empty CSV": (CSV, {"rows.csv": b""}, ["rows.csv:1: this file is empty", "first line"]),
    "header only": (CSV, {"rows.csv": b"query,positives\n"}, ["'pairs' is empty"]),
    "CSV without the column": (CSV, {"rows.csv": b"qeury,positives\na,b\n"}, ["rows.csv:1", "Did you mean 'qeury'"]),
    "column twice": (CSV, {"rows.csv": b"query,query\na,b\n"}, ["rows.csv:1", "'query' twice"]),
    "open quote": (CSV, {"rows.csv": b'query,positives\n"a,b\nc,d\n'}, ["rows.csv:2: not valid CSV"]),
    "short CSV row": (CSV, {"rows.csv": b"query,positives\na\n"}, ["rows.csv:2: wrong number of cells"]),
    "no Parquet": (
        PARQUET,
        {"rows.parquet": b"PAR1 not really PAR1"},
        ["rows.parquet: this is not a readable Parquet"],
    ),
    "numbers for texts": (RECIPE, {"rows.jsonl": b'{"query": 1, "positives": 2}'}, ["'query' is not a text (int)"]),
    "recipe: bad YAML": ("name: [", {}, ["test.yaml:", "not valid YAML"]),
    "recipe: no sources": ("name: test\nsources: []\n", {}, ["test.yaml:2", "sources"]),
    "recipe: misspelt key": (RECIPE.replace("task_type", "tasktype"), {}, ["test.yaml:4", "Did you mean 'task_type'"]),
    "recipe: task type": (
        RECIPE.replace(": Retrieval", ": Retreival"),
        {},
        ["test.yaml:4", "Did you mean 'Retrieval'"],
    ),
    "recipe: reader": (RECIPE.replace("kind: jsonl", "kind: jsonll"), {}, ["test.yaml:5", "Did you mean 'jsonl'"]),
    "recipe: examples": (RECIPE.replace("kind: retrieval", "kind: pairs"), {}, ["test.yaml:6", "Kinds: "]),
    "recipe: fractions": (
        RECIPE.replace("kind: all, name: train", "kind: hash, fractions: {train: 0.9, test: 0.2}"),
        {},
        ["test.yaml:7", "sum to 1.1"],
    ),
    "recipe: source twice": (RECIPE + RECIPE.partition("sources:\n")[2], {}, ["two sources are called 'pairs'"]),
    "recipe: name with a path": (RECIPE.replace("name: pairs", "name: ../pairs"), {}, ["test.yaml:3", "pattern"]),
    "recipe: hub without revision": (
        RECIPE.replace("kind: jsonl, path: rows.jsonl", "kind: hub, name: org/data"),
        {},
        ["test.yaml:5", "'revision' is required"],
    ),
    "recipe: no such disk folder": (
        RECIPE.replace("kind: jsonl, path: rows.jsonl", "kind: hub, path: folder"),
        {},
        ["folder: this folder does not exist", "save_to_disk"],
    ),
    "recipe: embedded name": (
        RECIPE.replace("kind: jsonl, path: rows.jsonl", "kind: embedded, name: wordnet/gloss"),
        {},
        ["test.yaml:5", "Did you mean 'wordnet/lemma_gloss'"],
    ),
    "recipe: embedded column": (
        RECIPE.replace("kind: jsonl, path: rows.jsonl", "kind: embedded, name: wordnet/lemma_gloss"),
        {},
        ["no column 'query'", "Columns here: lemma"],
    ),
    "recipe: package that is not installed": (
        RECIPE.replace("kind: jsonl, path: rows.jsonl", "kind: docstrings, packages: [no-such-package]"),
        {},
        ["'no-such-package' is not installed"],
    ),
    "recipe: group of a wrong type": (
        RECIPE + "    group: 3\n",
        {"rows.jsonl": GOOD.encode()},
        ["test.yaml:8", "group"],
    ),
    "recipe: group of an unknown kind": (RECIPE + "    group: {kind: dupes}\n", {}, ["test.yaml:8", "group"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, files, fragments = CASES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.yaml").write_text(recipe)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "build", "test.yaml"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2, message
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message
    stores = tmp_path / "runs" / ".cache" / "data"
    assert not stores.exists() or not [path for path in stores.iterdir() if path.is_dir()]
