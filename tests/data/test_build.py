"""The build: conflicts, duplicates, quarantine, and a store that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.data import DataConfig, Store, build_data, ensure_store, prepare_store
from nearfield.data import build as build_module
from nearfield.data.build import data_fingerprint, ensure_store_at
from nearfield.data.items import text_id
from nearfield.data.store import read_summary
from nearfield.errors import BadInputError
from tests.data.making import GRADED, LABELLED, build_rows, config, examples_of, source, write_rows

Example = tuple[str, tuple[str, ...], tuple[str, ...]]
words = st.sampled_from(["a", "b", "c", "d", "caf\u00e9", "cafe\u0301"])
lists = st.lists(words, max_size=4)
rows_strategy = st.lists(
    st.fixed_dictionaries({"query": words, "positives": st.lists(words, min_size=1, max_size=3), "negatives": lists}),
    min_size=1,
    max_size=12,
)


def reference(rows: list[dict[str, list[str]]]) -> tuple[list[Example], set[tuple[str, str]], int]:
    """Examples, conflicting (query, text) pairs and the number of duplicates, slowly."""

    def nfc(texts: list[str]) -> list[str]:
        return list(dict.fromkeys(unicodedata.normalize("NFC", text) for text in texts))

    clean = [(nfc([row["query"]])[0], nfc(row["positives"]), nfc(row["negatives"])) for row in rows]  # type: ignore[list-item]
    known = {(query, text) for query, positives, _ in clean for text in positives}
    clashes = {(query, text) for query, _, negatives in clean for text in negatives if (query, text) in known}
    examples: list[Example] = []
    seen = []
    for query, positives, negatives in clean:
        kept = [text for text in negatives if (query, text) not in known]
        if (query, set(positives), set(kept)) not in seen:
            seen.append((query, set(positives), set(kept)))
            examples.append((query, tuple(positives), tuple(kept)))
    return examples, clashes, len(clean) - len(examples)


@settings(max_examples=30, deadline=None)
@given(rows_strategy)
def test_conflicts_and_duplicates_as_by_hand(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, list[str]]]
) -> None:
    store = build_rows(tmp_path_factory.mktemp("build"), rows)  # type: ignore[arg-type]
    examples, clashes, duplicates = reference(rows)
    assert examples_of(store) == examples
    summary = read_summary(store.path)
    assert summary.conflicts.positive_and_negative == len(clashes)
    assert summary.sources[0].duplicates == duplicates
    known = store.known_positives()
    texts = store.items.column("text").to_pylist()
    for row, text in enumerate(texts):
        expected = sorted({texts.index(p) for query, positives, _ in examples if query == text for p in positives})
        assert known[row].tolist() == expected
    assert len(set(texts)) == len(texts)
    assert store.items.column("id").to_pylist() == [text_id(text) for text in texts]


def test_a_conflict_between_sources_is_resolved_in_favour_of_positive(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "1.jsonl", [{"query": "q", "positives": "p", "negatives": ["n", "x"]}])
    second = write_rows(tmp_path / "2.jsonl", [{"query": "q", "positives": "n", "negatives": None}])
    summary = build_data(config(source(first), source(second, name="more")), tmp_path / "store")
    assert examples_of(Store.open(tmp_path / "store")) == [("q", ("p",), ("x",)), ("q", ("n",), ())]
    assert summary.conflicts.positive_and_negative == 1
    assert summary.conflicts.examples_changed == 1
    assert summary.conflicts.first == ({"what": "positive and negative", "query": "q", "text": "n"},)
    assert read_summary(tmp_path / "store").conflicts == summary.conflicts


def test_graded_pairs(tmp_path: Path) -> None:
    rows = [
        {"first": "a", "second": "b", "score": 5},
        {"first": "b", "second": "a", "score": "2.5"},
        {"first": "a", "second": "c", "score": 0},
        {"first": "a", "second": "c", "score": 0.0},
    ]
    store = build_rows(tmp_path, rows, examples=GRADED | {"scale": [0, 5]}, task_type="STS")
    assert store.examples.column("score").to_pylist() == [1.0, 0.5, 0.0]
    assert store.examples.column("label").null_count == 3
    summary = read_summary(store.path)
    assert summary.conflicts.scores == 1
    assert summary.sources[0].duplicates == 1
    assert len(store.known_positives().values) == 0


def test_labelled_items(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": 1},
        {"text": "a", "label": 2},
        {"text": "b", "label": True},
        {"text": "b", "label": "true"},
    ]
    store = build_rows(tmp_path, rows, examples=LABELLED, task_type="Classification")
    assert store.examples.column("label").to_pylist() == ["1", "2", "true"]
    assert store.examples.column("positives").to_pylist() == [[], [], []]
    assert read_summary(store.path).conflicts.labels == 1


def test_plain_texts(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": "a"}]
    examples = {"kind": "text", "text": "text"}
    store = build_rows(tmp_path, rows, examples=examples, task_type="Clustering")
    assert store.texts(store.examples.column("query").to_pylist()) == ["a", "b"]
    assert store.examples.column("positives").to_pylist() == [[], []]
    assert store.examples.column("label").null_count == 2
    summary = read_summary(store.path).sources[0]
    assert (store.sources[0].kind, summary.duplicates) == ("text", 1)


def test_several_labels_are_no_conflict_where_they_are_meant(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "a", "label": 2}]
    store = build_rows(tmp_path, rows, examples=LABELLED, task_type="MultilabelClassification")
    assert read_summary(store.path).conflicts.labels == 0


BAD_ROWS: list[tuple[bytes, str]] = [
    (b"{not json}", "not valid JSON"),
    (b'{"query": "\xff\xfe", "positives": "p"}', "not UTF-8"),
    (b"[1, 2]", "not a JSON object"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"query": ' + b"9" * 5000 + b', "positives": "p"}', "not valid JSON"),
    (b'{"positives": "p", "negatives": null}', "no column 'query'"),
    (b'{"query": "  ", "positives": "p", "negatives": null}', "'query' is empty"),
    (b'{"query": "q", "positives": "", "negatives": null}', "'positives' is empty"),
    (b'{"query": "q", "positives": [], "negatives": null}', "no positive"),
    (b'{"query": "q", "positives": null, "negatives": null}', "no positive"),
    (b'{"query": null, "positives": "p", "negatives": null}', "'query' is null"),
    (b'{"query": ["q"], "positives": "p", "negatives": null}', "'query' is not a text (list)"),
    (b'{"query": "q", "positives": [3], "negatives": null}', "'positives' is not a text (int)"),
    (b'{"query": "q", "positives": [["p"]], "negatives": null}', "'positives' is not a text (list)"),
    (b'{"query": "q\\u0000", "positives": "p", "negatives": null}', "'query' has a NUL byte"),
    (b'{"query": "\\ud800", "positives": "p", "negatives": null}', "'query' is not valid Unicode (a lone surrogate)"),
    (
        b'{"query": "q", "positives": "' + b"x" * 51 + b'", "negatives": null}',
        "'positives' is longer than 50 characters",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS)
def test_bad_rows_are_quarantined(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"query": "good", "positives": "p", "negatives": null, "query": "q"}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + line + b"\n")
    summary = build_data(
        config(source(tmp_path / "rows.jsonl"), max_bad_rows=0.5, max_characters=50), tmp_path / "store"
    )
    assert summary.sources[0].quarantined == {reason: 1}
    assert (summary.sources[0].rows, summary.sources[0].examples) == (2, 1)
    entry = json.loads((tmp_path / "store/quarantine.jsonl").read_text(encoding="ascii"))
    assert (entry["source"], entry["file"], entry["line"], entry["reason"]) == ("pairs", "rows.jsonl", 2, reason)
    assert len(entry["excerpt"]) <= 200


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("NaN", "'score' is not finite"),
        ("1e999", "'score' is not finite"),
        ('"high"', "'score' is not a number"),
        ("true", "'score' is not a number"),
        ("[1]", "'score' is not a number"),
        ("1" + "0" * 400, "'score' is not a number"),
        ("7", "'score' is outside its scale"),
    ],
)
def test_bad_scores_are_quarantined(tmp_path: Path, score: str, reason: str) -> None:
    row = '{"first": "a", "second": "b", "score": %s}\n'
    (tmp_path / "rows.jsonl").write_text(row % "1" + row % score)
    graded = source(tmp_path / "rows.jsonl", examples=GRADED | {"scale": [0, 5]}, task_type="STS")
    summary = build_data(config(graded, max_bad_rows=0.5), tmp_path / "store")
    assert summary.sources[0].quarantined == {reason: 1}


def test_too_many_bad_rows_stop_the_build_and_keep_the_quarantine(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"query": f"q{n}", "positives": "p", "negatives": None} for n in range(97)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {}, {"query": ""}, {}])
    with pytest.raises(BadInputError, match=r"3 of 100 rows cannot be used \(3.0%, allowed are 1.0%\)") as error:
        build_data(config(source(path)), tmp_path / "store")
    assert "the first is rows.jsonl:98: no column 'query'" in error.value.what
    assert error.value.where == str(tmp_path / "store.quarantine.jsonl")
    assert error.value.hint is not None
    assert "max_bad_rows" in error.value.hint
    kept = (tmp_path / "store.quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in kept] == [98, 99, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "store.quarantine.jsonl"]
    build_data(config(source(path), max_bad_rows=0.03), tmp_path / "store")
    assert not (tmp_path / "store.quarantine.jsonl").exists()


def test_the_share_of_bad_rows_may_reach_the_limit(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"query": f"q{n}", "positives": "p", "negatives": None} for n in range(99)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {}])
    assert build_data(config(source(path)), tmp_path / "store").examples == 99


def test_a_build_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "positives": "p", "negatives": None}])

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "resolve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_data(config(source(path)), tmp_path / "out" / "store")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_build_left_is_swept(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "positives": "p", "negatives": None}])
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead, alive = tmp_path / f".store.{child}.0.tmp", tmp_path / f".store.{os.getpid()}.0.tmp"
    dead.mkdir()
    alive.mkdir()
    build_data(config(source(path)), tmp_path / "store")
    assert not dead.exists()
    assert alive.exists()


def test_a_folder_that_is_no_store_is_not_replaced(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "positives": "p", "negatives": None}])
    with pytest.raises(BadInputError, match="is not a store"):
        build_data(config(source(path)), tmp_path)
    assert path.exists()


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"query": f"q{n % 7}", "positives": f"p{n}", "negatives": [f"p{n + 1}"]} for n in range(50)]
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        store = build_rows(tmp_path / name, rows)
        digests.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(store.path.iterdir())])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 6


def test_a_store_is_built_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "positives": "p", "negatives": None}])
    first = ensure_store(config(source(path)), tmp_path / "cache")
    again = ensure_store(config(source(path)), tmp_path / "cache")
    assert (first.reused, again.reused) == (False, True)
    assert first.path == again.path == tmp_path / "cache" / "data" / first.fingerprint
    moved = path.rename(
        tmp_path / "elsewhere" if (tmp_path / "elsewhere").mkdir() else tmp_path / "elsewhere" / path.name
    )
    assert data_fingerprint(config(source(moved))) == first.fingerprint
    write_rows(moved, [{"query": "q2", "positives": "p", "negatives": None}])
    assert data_fingerprint(config(source(moved))) != first.fingerprint
    assert data_fingerprint(config(source(moved), max_characters=9)) != data_fingerprint(config(source(moved)))


def test_a_store_elsewhere_is_kept_or_replaced(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "positives": "p", "negatives": None}])
    assert not ensure_store_at(config(source(path)), tmp_path / "store").reused
    assert ensure_store_at(config(source(path)), tmp_path / "store").reused
    assert not ensure_store_at(config(source(path), name="other"), tmp_path / "store").reused
    assert Store.open(tmp_path / "store").name == "other"


def test_prepare_store_reads_a_recipe_with_overrides(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"query": "q", "positives": "p", "negatives": None}])
    recipe = tmp_path / "test.yaml"
    relative = source(Path("rows.jsonl")) | {"prompts": {"query": "query: ", "document": None}}
    recipe.write_text(json.dumps({"name": "test", "sources": [relative]}))
    store = prepare_store(recipe, tmp_path / "cache", ["name=changed"])
    assert store.name == "changed"
    info = store.sources[0]
    assert (info.name, info.kind, info.task_type) == ("pairs", "retrieval", "Retrieval")
    assert (info.prompts.query, info.prompts.document) == ("query: ", None)
    assert prepare_store(DataConfig.load(recipe, ["name=changed"]), tmp_path / "cache").path == store.path


def test_texts_come_in_the_order_asked_for_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearfield.data.build._BATCH_ROWS", 7)
    rows = [{"query": f"q{n}", "positives": [f"p{n}", f"r{n}"], "negatives": None} for n in range(40)]
    store = build_rows(tmp_path, rows)
    texts = store.items.column("text").to_pylist()
    assert store.items.column("text").num_chunks == 18
    wanted = np.random.default_rng(0).integers(0, len(texts), 100)
    assert store.texts(wanted) == [texts[row] for row in wanted]
    assert store.texts([]) == []
    assert len(examples_of(store)) == 40
    with pytest.raises(IndexError):
        store.texts([len(texts)])
    with pytest.raises(IndexError):
        store.texts([-1])


def test_texts_in_two_splits_are_counted(tmp_path: Path) -> None:
    rows = [
        {"query": "q1", "positives": "p", "negatives": "x", "part": "train"},
        {"query": "q2", "positives": ["p", "q1"], "negatives": "x", "part": "test"},
    ]
    store = build_rows(tmp_path, rows, split={"kind": "column", "column": "part"})
    assert read_summary(store.path).shared_between_splits == {"test+train": 2}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "version", "items"])
def test_a_damaged_store_is_bad_input(tmp_path: Path, damage: str) -> None:
    store = build_rows(tmp_path, [{"query": "q", "positives": "p", "negatives": None}])
    meta = store.path / "store.json"
    if damage == "missing":
        meta.unlink()
    elif damage == "empty":
        meta.write_text("")
    elif damage == "cut":
        (store.path / "examples.arrow").write_bytes((store.path / "examples.arrow").read_bytes()[:100])
    elif damage == "version":
        meta.write_text(meta.read_text().replace('"format_version": 2', '"format_version": 99'))
    else:
        (store.path / "items.arrow").unlink()
    with pytest.raises(BadInputError):
        opened = Store.open(store.path)
        opened.known_positives()


def test_an_unknown_source_is_named(tmp_path: Path) -> None:
    store = build_rows(tmp_path, [{"query": "q", "positives": "p", "negatives": None}])
    with pytest.raises(BadInputError, match="no source 'pair'") as error:
        store.select("pair", "train")
    assert error.value.hint == "Sources: pairs."
