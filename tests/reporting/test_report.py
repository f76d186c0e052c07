"""The page of a whole run, of runs that lack parts, and of damaged ones."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nearfield.errors import BadInputError
from nearfield.reporting import build_report
from tests.reporting.runs import QUERIES, STEPS, item, store_of, write_run
from tests.reporting.test_hostile import Outline, check_structure, outline

SECTIONS = ["trained", "comparison", "queries", "geometry", "curves", "batches", "data", "manifest"]


@pytest.fixture()
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A run folder of one's own, with its store beside it."""
    shutil.copytree(whole_run.parent, tmp_path / "runs")
    copy = tmp_path / "runs" / whole_run.name
    text = (copy / "manifest.json").read_text().replace(str(whole_run.parent), str(tmp_path / "runs"))
    (copy / "manifest.json").write_text(text)
    return copy


def page(run: Path, out: Path | None = None) -> tuple[Outline, str, dict[str, str | None]]:
    """The parsed report of a run, its words on one line, and what is missing."""
    result = build_report(run, out)
    html = result.path.read_text(encoding="utf-8")
    assert result.size == len(html.encode())
    parsed = outline(html)
    check_structure(parsed)
    return parsed, re.sub(r"[ \t\r\n]+", " ", " ".join(parsed.words)), result.sections


def data_of(parsed: Outline) -> dict[str, Any]:
    """The figures in the page."""
    found: dict[str, Any] = json.loads(
        next(content for _, attrs, content in parsed.raw if attrs.get("id") == "report-data")
    )
    return found


def test_a_whole_run_has_all_sections(run: Path) -> None:
    parsed, words, sections = page(run)
    assert list(sections) == SECTIONS
    assert set(sections.values()) == {None}
    assert [
        value for tag, attrs in parsed.elements if tag == "section" for name, value in attrs if name == "id"
    ] == SECTIONS
    assert (run / "report.html").is_file()
    for expected in (
        "sentence-transformers/all-MiniLM-L6-v2 was trained on gloss and gloss-similarity with the objective infonce (temperature 0.05) "
        "for 120 steps of 64 examples (2026-11-23 19:41 UTC).",
        "after is better than before on WordNetGloss: +0.0815 [+0.0715, +0.0915], p = 0.0001.",
        "0.4312 0.4192 to 0.4422",
        "The last line of metrics.jsonl is torn",
        "21 last batch too small",
        "10 rows",
        "4 pairs of a query and a text are called positive and negative",
        "7 items are in examples of two splits: test and train.",
        "5 of 2\u202f000 rows (0.2 %) cannot be used",
        "rows.jsonl:17",
        "bank",
        "1 min 48 s",
        "2 CPU threads (x86_64)",
        "“search: ”",
    ):
        assert expected in words, expected


def test_the_report_does_not_depend_on_the_time_or_place(run: Path, tmp_path: Path) -> None:
    """Two reports of one run differ in the moment of writing alone."""
    first = build_report(run, tmp_path / "a.html").path.read_text()
    second = build_report(run, tmp_path / "b" / "c.html").path.read_text()
    strip = lambda html: [line for line in html.splitlines() if not line.startswith("<p>Written by")]  # noqa: E731
    assert strip(first) == strip(second)
    assert str(tmp_path) not in first.replace(str(run), "")


def test_queries_are_the_largest_gains_and_losses(run: Path) -> None:
    """By brute force over the two files of scores; each result is marked as the store's positives say."""
    parsed, words, _ = page(run)
    scores = {}
    for side, folder in json.loads((run / "manifest.json").read_text())["stages"]["evaluate"]["results"].items():
        rows = pq.read_table(run / folder / "WordNetGloss.units.parquet").to_pylist()
        scores[side] = {row["id"]: row["value"] for row in rows}
    deltas = {one: scores["after"][one] - scores["before"][one] for one in scores["before"]}
    gains = sorted((one for one in deltas if deltas[one] > 0), key=lambda one: (-deltas[one], one))[:5]
    losses = sorted((one for one in deltas if deltas[one] < 0), key=lambda one: (deltas[one], one))[:5]
    queries = data_of(parsed)["queries"]
    assert [query["id"] for query in queries] == gains + losses
    texts = {item(f"query {i}").hex(): i for i in range(QUERIES)}
    for query in queries:
        number = texts[query["id"]]
        assert query["text"] == f"query {number}"
        assert query["after"] - query["before"] == pytest.approx(deltas[query["id"]])
        for results in query["results"].values():
            assert [result["rank"] for result in results] == list(range(1, 11))
            for result in results:
                numbers = {number, number + QUERIES}
                assert result["relevant"] == (
                    result["text"] in {f"a document that explains number {i}" for i in numbers}
                )
    higher, lower = sum(delta > 0 for delta in deltas.values()), sum(delta < 0 for delta in deltas.values())
    assert (
        f"of 40 queries, {higher} score higher after training, {lower} lower and {40 - higher - lower} the same"
        in words
    )
    assert words.count("✓") == 0  # the mark is the style sheet's; the word is in the page
    assert words.count("relevant ") >= len(queries)


@pytest.mark.parametrize(
    ("gone", "section", "reason"),
    [
        ("metrics.jsonl", "curves", "has not trained a step"),
        ("comparison.json", "comparison", "was not evaluated"),
        ("plan", "batches", "no batches were planned"),
        ("manifest.json", "manifest", "No manifest.json"),
        ("results", "queries", "no results before and after"),
        ("../.cache", "data", "not at hand"),
    ],
)
def test_a_missing_part_is_said_in_its_section(run: Path, gone: str, section: str, reason: str) -> None:
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, words, sections = page(run)
    assert reason in (sections[section] or "")
    assert sections[section] in words
    allowed = {section} | ({"queries", "data"} if gone == "manifest.json" else set())
    assert {name for name, missing in sections.items() if missing} == allowed


def test_without_the_recipe_the_rest_is_told(run: Path) -> None:
    (run / "recipe.yaml").unlink()
    _, words, sections = page(run)
    assert sections["trained"] is None
    assert "No recipe.yaml" in words and "for 120 steps" in words


def test_a_run_that_only_began(tmp_path: Path) -> None:
    """A folder with nothing but a recipe gives a page that says so six times."""
    run = tmp_path / "began"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: began\n")
    _, _, sections = page(run)
    assert [name for name, reason in sections.items() if reason is None] == ["trained"]


def test_queries_without_the_store_show_ids(run: Path) -> None:
    shutil.rmtree(run.parent / ".cache")
    parsed, words, sections = page(run)
    assert sections["queries"] is None
    query = data_of(parsed)["queries"][0]
    assert query["text"] is None and query["id"] in words
    assert {result["relevant"] for result in query["results"]["before"]} == {None}
    assert "others show ids" in words


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", b"[" * 3_000, b"{}"])
@pytest.mark.parametrize(
    "name", ["manifest.json", "comparison.json", "metrics.jsonl", "recipe.yaml", "plan/summary.json"]
)
def test_a_broken_file_breaks_no_other_section(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    _, _, sections = page(run)
    hit = {
        "manifest.json": {"manifest", "queries", "data"}, "comparison.json": {"comparison"}, "metrics.jsonl": {"curves"},
        "recipe.yaml": set(), "plan/summary.json": {"batches"},
    }[name]  # fmt: skip
    assert {section for section, reason in sections.items() if reason} <= hit


@pytest.mark.parametrize(
    "name", ["plan/epoch-000.parquet", "units", "top10", "items.arrow", "examples.arrow", "store.json"]
)
def test_a_torn_table_breaks_no_other_section(run: Path, name: str) -> None:
    files = {
        "units": "results/nearfield__example/def/WordNetGloss.units.parquet",
        "top10": "results/nearfield__example/def/WordNetGloss.top10.parquet",
    }
    path = run / files.get(name, name)
    if not path.exists():
        path = store_of(run) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, _, sections = page(run)
    assert {section for section, reason in sections.items() if reason} <= {"queries"}


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, child in children for leaf in _leaves(child, (*path, key)))]


@pytest.mark.parametrize(
    "name", ["manifest.json", "comparison.json", "plan/summary.json", "summary.json", "store.json"]
)
def test_values_of_a_wrong_type_are_survived(run: Path, name: str) -> None:
    """Any value of a JSON file may be of another type: the page is written, and only the file's own sections suffer."""
    path = run / name
    if not path.exists():
        path = store_of(run) / name
    original = path.read_text()
    draw = random.Random(name)
    places = [place for place in _leaves(json.loads(original)) if place]
    for place in draw.sample(places, min(12, len(places))):
        value = json.loads(original)
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = draw.choice(
            [None, True, -1, 1e308, 10**400, "text", [], {}, [{}], {"a": [1, {"b": None}]}, [None], ["\ud800"]]
        )
        path.write_text(json.dumps(value))
        _, _, sections = page(run)
        hit = {
            "manifest.json": {"manifest", "queries", "data", "batches"},
            "comparison.json": {"comparison"},
            "plan/summary.json": {"batches"},
        }
        assert {section for section, reason in sections.items() if reason} <= hit.get(name, {"data", "queries"}), place
        assert sections["curves"] is None


def test_metrics_of_a_resumed_run(run: Path) -> None:
    """A step that stands twice counts once, with its later record; a loss that is not finite is told."""
    lines = (run / "metrics.jsonl").read_text().splitlines()[:STEPS]
    lines += [json.dumps({"step": 100, "loss": 0.125, "rows": 64}), '{"step": 121, "loss": NaN}', "not json", "[1]", ""]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    parsed, words, _ = page(run)
    loss = data_of(parsed)["charts"]["loss"]
    assert loss["x"] == list(range(1, 122))
    assert loss["series"][0]["y"][-1] is None
    assert "1 steps stand twice" in words
    assert "2 lines of metrics.jsonl cannot be read" in words
    assert "The loss is not a finite number at 1 steps: 121." in words


def test_a_run_under_way(run: Path) -> None:
    """The recipe's own choice of sources is told, the steps that are planned, and no total that is not known yet."""
    lines = (run / "metrics.jsonl").read_text().splitlines()[:STEPS]
    (run / "metrics.jsonl").write_text("\n".join(lines[9:50:10]))
    recipe = (run / "recipe.yaml").read_text().replace("epochs: 2", "epochs: 2\n  max_steps: 80")
    (run / "recipe.yaml").write_text(f"sources: [gloss]\n{recipe}")
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["train"], manifest["stages"]["evaluate"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    parsed, words, _ = page(run)
    assert (
        "was trained on gloss with the objective infonce (temperature 0.05) for 50 of 80 steps of 64 examples" in words
    )
    assert "5 of 50 steps were recorded." in words
    assert "120, of which the training follows the first 80" in words
    for tile in ("training time", "all stages", " padding"):
        assert tile not in "".join(parsed.words).split("Before and after")[1].split("The whole recipe")[0]


def test_a_long_run_is_thinned(run: Path) -> None:
    """Curves of 20,000 steps have 400 points, and each is the mean of its stretch."""
    losses = np.random.Generator(np.random.PCG64(0)).normal(size=20_000)
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "learning_rate": {x:.6f}}}\n' for i, x in enumerate(losses))
    )
    parsed, words, _ = page(run)
    chart = data_of(parsed)["charts"]["learning-rate"]
    assert len(chart["x"]) == 400
    assert chart["series"][0]["y"] == pytest.approx(losses.reshape(400, 50).mean(1), abs=1e-4)
    assert "a point is the mean of about 50 steps" in words


def test_token_histogram_counts_every_row(run: Path) -> None:
    """The last bin takes what is longer: the bins sum to the rows of the plan."""
    from nearfield.reporting.batches import bin_edges

    table = pq.read_table(run / "plan" / "epoch-000.parquet")
    tokens = table["query_tokens"].to_numpy() + 0
    tokens[0] = 100_000
    pq.write_table(
        table.set_column(table.schema.get_field_index("query_tokens"), "query_tokens", pa.array(tokens)),
        run / "plan" / "epoch-000.parquet",
    )
    _, words, _ = page(run)
    assert "longest" in words and "100\u202f000" in words
    for high in (0.0, 1.0, 23.0, 24.0, 25.0, 511.0, 100_000.0):
        edges = bin_edges(high)
        assert edges[0] == 0 and edges[-1] >= high and 2 <= len(edges) <= 40
        assert np.allclose(np.diff(edges), edges[1]) and edges[1].is_integer()


def test_results_outside_the_run_are_not_read(run: Path, tmp_path: Path) -> None:
    """A manifest cannot point the report at other folders' results."""
    shutil.copytree(run / "results", tmp_path / "elsewhere")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["evaluate"]["results"] = {
        "before": "../../elsewhere/nearfield__example/def",
        "after": str(tmp_path / "elsewhere"),
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    _, _, sections = page(run)
    assert "no results before and after" in (sections["queries"] or "")


def test_bad_arguments(tmp_path: Path, run: Path) -> None:
    """Each is one message with the place and what to do."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases = [
        (tmp_path / "absent", None),
        (tmp_path / "empty", None),
        (tmp_path / "file", None),
        (run, tmp_path / "empty"),
    ]
    for folder, out in cases:
        with pytest.raises(BadInputError) as error:
            build_report(folder, out)
        assert error.value.where and error.value.hint
    with pytest.raises(BadInputError, match="cannot be written"):
        build_report(run, tmp_path / "file" / "report.html")
    assert list(tmp_path.glob("**/.*.tmp")) == []


def test_write_run_is_whole(tmp_path: Path) -> None:
    """The store of the fixture opens as the data part opens it, and knows its positives."""
    from nearfield.data import Store

    run = write_run(tmp_path)
    store = Store.open(store_of(run))
    assert store.known_positives()[3].tolist() == [QUERIES + 3, 2 * QUERIES + 3]
    assert store.texts([0]) == ["query 0"]
