"""The meaning of columns, guessed by name and by content."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nearfield.data import DataConfig, Store, build_data
from nearfield.data.config import DuplicateGroups, GradedExamples
from nearfield.data.infer import data_recipe, infer_source, safe_name, task_name, training_recipe
from nearfield.errors import BadInputError

LONG = "a rather long text about the thing with the number"


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header, *rows])
    return path


@pytest.mark.parametrize(
    ("header", "row", "columns"),
    [
        (["query", "positive"], ["q{n}", "p{n}"], {"query": "query", "positives": "positive"}),
        (["Question", "Answer"], ["q{n}", "p{n}"], {"query": "Question", "positives": "Answer"}),
        (
            ["id", "anchor", "pos", "neg"],
            ["{n}", "q{n}", "p{n}", "x{n}"],
            {"query": "anchor", "positives": "pos", "negatives": ("neg",)},
        ),
        (
            ["query", "passage", "negative_1", "negative_2"],
            ["q{n}", "p{n}", "x{n}", "y{n}"],
            {"query": "query", "positives": "passage", "negatives": ("negative_1", "negative_2")},
        ),
        (["kurz", "lang"], ["item {n}", LONG + " {n}"], {"query": "kurz", "positives": "lang"}),
        (["lang", "kurz"], [LONG + " {n}", "item {n}"], {"query": "kurz", "positives": "lang"}),
        (["sentence1", "sentence2"], ["a {n}", "b {n}"], {"query": "sentence1", "positives": "sentence2"}),
        (
            ["sentence1", "sentence2", "score"],
            ["a {n}", "b {n}", "0.{n}"],
            {"first": "sentence1", "second": "sentence2", "score": "score"},
        ),
        (
            ["question1", "question2", "label"],
            ["a {n}", "b {n}", "{b}"],
            {"first": "question1", "second": "question2", "score": "label"},
        ),
        (["text", "label"], ["a text {n}", "{b}"], {"item": "text", "label": "label"}),
        (["body", "was"], ["a text {n}", "kind {b}"], {"item": "body", "label": "was"}),
        (["category", "title"], ["kind {b}", "a title {n}"], {"item": "title", "label": "category"}),
        (["query", "positive", "label"], ["q{n}", "p{n}", "l{b}"], {"query": "query", "positives": "positive"}),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_columns(tmp_path: Path, header: list[str], row: list[str], columns: dict[str, object], suffix: str) -> None:
    rows: list[list[object]] = [[cell.format(n=n, b=n % 2) for cell in row] for n in range(40)]
    inferred = infer_source(write_csv(tmp_path / f"my data{suffix}", header, rows))
    assert inferred.columns == columns
    assert (inferred.rows, inferred.bad_rows, inferred.source.name) == (40, 0, "my-data")
    assert len(inferred.examples) == 5


def test_lists_in_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "pos": [f"p{n}", f"r{n}"], "neg": [f"x{n}"], "pos_scores": [1.0, 0.5]} for n in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert infer_source(tmp_path / name).columns == {"query": "query", "positives": "pos", "negatives": ("neg",)}


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ([0, 0.5, 1], (0, 1)),
        ([0, 2.5, 5], (0, 5)),
        ([-1, 0, 1], (-1, 1)),
        ([3, 99], (0, 100)),
        ([-7, 400], (-7, 400)),
        ([500], None),
    ],
)
def test_the_scale_follows_from_the_scores(
    tmp_path: Path, scores: list[float], scale: tuple[float, float] | None
) -> None:
    rows: list[list[object]] = [[f"a{n}", f"b{n}", score] for n, score in enumerate(scores)]
    examples = infer_source(write_csv(tmp_path / "x.csv", ["sentence1", "sentence2", "score"], rows)).source.examples
    assert isinstance(examples, GradedExamples)
    assert examples.scale == scale


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (["a", "b", "c"], [LONG + " a{n}", LONG + " b{n}", LONG + " c{n}"]),
        (["number"], ["{n}"]),
        (["sentence1", "sentence2", "label"], ["a{n}", "b{n}", "kind {b}"]),
    ],
)
def test_columns_that_cannot_be_told_apart(tmp_path: Path, header: list[str], row: list[str]) -> None:
    rows: list[list[object]] = [[cell.format(n=n, b=n % 3) for cell in row] for n in range(40)]
    with pytest.raises(BadInputError) as error:
        infer_source(write_csv(tmp_path / "x.csv", header, rows))
    assert error.value.hint is not None
    assert f"Columns here: {', '.join(map(repr, header))}" in error.value.hint


@pytest.mark.parametrize("name", ["x.txt", "x.json", "folder", "missing.csv", "empty.csv"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.csv").write_text("query,positive\n")
    with pytest.raises(BadInputError):
        infer_source(tmp_path / name)


def test_common_negatives_do_not_make_one_group(tmp_path: Path) -> None:
    rows: list[list[object]] = [[f"q{n}", f"p{n}", "the same"] for n in range(40)]
    inferred = infer_source(write_csv(tmp_path / "x.csv", ["query", "positive", "negative"], rows))
    assert inferred.source.group == DuplicateGroups(negatives=False)
    assert (inferred.groups, inferred.largest_group) == (40, 1)
    assert any("share their negatives" in note for note in inferred.notes)


def test_rows_that_share_texts_are_one_group(tmp_path: Path) -> None:
    rows: list[list[object]] = [[f"q{n // 4}", f"p{n}", f"x{n}"] for n in range(40)]
    inferred = infer_source(write_csv(tmp_path / "x.csv", ["query", "positive", "negative"], rows))
    assert inferred.source.group == DuplicateGroups(negatives=True)
    assert (inferred.groups, inferred.largest_group) == (10, 4)


def test_the_recipe_of_a_guess_builds(tmp_path: Path) -> None:
    rows: list[list[object]] = [[f"q{n // 3}", f"p{n}"] for n in range(300)]
    inferred = infer_source(write_csv(tmp_path / "my data.csv", ["query", "positive"], rows))
    recipe = data_recipe(inferred, tmp_path / "data_recipes")
    (tmp_path / "data_recipes").mkdir()
    (tmp_path / "data_recipes" / "x.yaml").write_text(json.dumps(recipe))
    assert recipe["sources"][0]["reader"]["path"] == "../my data.csv"  # type: ignore[index]
    summary = build_data(DataConfig.load(tmp_path / "data_recipes" / "x.yaml"), tmp_path / "store")
    assert summary.sources[0].groups == 100 == inferred.groups
    assert set(summary.sources[0].splits) == {"train", "validation", "test"}
    assert summary.shared_between_splits == {}
    assert len(Store.open(tmp_path / "store").select("my-data", "train")) == summary.sources[0].splits["train"]


@pytest.mark.parametrize(
    ("queries", "negatives", "batches"),
    [
        (400, 400, {"negatives": 1}),
        (400, 3, {"negatives": 0}),
        (100, 400, {"negatives": 1}),
        (3, 400, {"negatives": 1, "duplicates": "allow"}),
    ],
)
def test_items_in_many_rows_do_not_keep_batches_from_filling(
    tmp_path: Path, queries: int, negatives: int, batches: dict[str, object]
) -> None:
    cells: list[list[object]] = [[f"q{n % queries}", f"p{n}", f"x{n % negatives}"] for n in range(400)]
    inferred = infer_source(write_csv(tmp_path / "x.csv", ["query", "positive", "negative"], cells))
    assert training_recipe(inferred)["batches"] == {"kind": "single_source", "batch_size": 64, **batches}


@pytest.mark.parametrize(("rows", "size"), [(4, 2), (40, 8), (100, 16), (5000, 64)])
def test_the_batch_fits_the_rows(tmp_path: Path, rows: int, size: int) -> None:
    cells: list[list[object]] = [[f"q{n}", f"p{n}"] for n in range(rows)]
    recipe = training_recipe(infer_source(write_csv(tmp_path / "x.csv", ["query", "positive"], cells)))
    assert recipe["batches"] == {"kind": "single_source", "batch_size": size, "negatives": 0}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my data.csv", "my-data"),
        ("a.b.jsonl.gz", "a.b"),
        ("../../x.tsv", "x"),
        ("\u4e2d\u6587.csv", "data"),
        ("-x-.csv", "x"),
        ("$(rm).csv", "rm"),
    ],
)
def test_names(file: str, name: str) -> None:
    assert safe_name(Path(file)) == name


def test_task_names() -> None:
    assert [task_name(name) for name in ("my-data", "a.b_c", "X")] == ["MyData", "ABC", "X"]
