"""Cleaning steps: what goes, what stays, what is counted and written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.data import DataSummary, Store, build_data
from nearfield.data.build import data_fingerprint
from nearfield.data.cleaning import NearDuplicateConfig
from nearfield.data.cleaning.steps import control, letters, printable, urls
from nearfield.data.near_duplicates import normal_form
from nearfield.data.store import read_summary
from nearfield.errors import BadInputError
from tests.data.making import GRADED, LABELLED, config, examples_of, source, write_rows
from tests.data.test_near_duplicates import brute_near, similar_texts

NEUTRAL: list[dict[str, Any]] = [
    {"kind": "length"},
    {"kind": "characters"},
    {"kind": "language"},
    {"kind": "near_duplicates", "words": False, "normalised": False},
    {"kind": "near_vectors", "model": "no-such-model", "cosine": None},
]
Steps = Sequence[Mapping[str, Any]]


def row(query: str, positives: Sequence[str] = ("a document",), negatives: Sequence[str] = ()) -> dict[str, object]:
    return {"query": query, "positives": list(positives), "negatives": list(negatives)}


def built(
    folder: Path, rows: Sequence[Mapping[str, object]], steps: Steps, **changes: Any
) -> tuple[Store, DataSummary]:
    """The store of one source with steps."""
    path = write_rows(folder / "rows.jsonl", rows)
    out = folder / "store"
    build_data(config(source(path, **changes), steps=steps), out)
    return Store.open(out), read_summary(out)


def removed(store: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store.path / "removed.jsonl").read_text().splitlines()]


# Neutral steps and fingerprints.


def test_neutral_steps_change_no_byte(tmp_path: Path) -> None:
    rows = [row(f"query {i} \u200b http://x.y", [f"document {i}"], [f"negative {i}", "shared"]) for i in range(50)]
    plain = build_data(config(source(write_rows(tmp_path / "rows.jsonl", rows))), tmp_path / "plain")
    neutral = build_data(config(source(tmp_path / "rows.jsonl", steps=NEUTRAL), steps=NEUTRAL), tmp_path / "neutral")
    for name in ("items.arrow", "examples.arrow"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "neutral" / name).read_bytes()
    assert (tmp_path / "neutral" / "removed.jsonl").read_text() == ""
    assert not (tmp_path / "plain" / "removed.jsonl").exists()
    assert [step.kind for step in neutral.steps] == [step["kind"] for step in NEUTRAL] * 2
    assert all(step.before == step.after == {"pairs": 50} for step in neutral.steps)
    assert plain.steps == () and "steps" not in plain.to_json()
    assert read_summary(tmp_path / "neutral").steps == neutral.steps


def test_fingerprints_follow_steps_and_their_files(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row("a query")])
    plain = data_fingerprint(config(source(path)))
    assert plain == data_fingerprint(config(source(path, steps=[]), steps=[]))
    step = {"kind": "length", "least": 2}
    marks = {
        plain,
        data_fingerprint(config(source(path, steps=[step]))),
        data_fingerprint(config(source(path), steps=[step])),
    }
    listed = tmp_path / "list.jsonl"
    for content in ("", '{"id": "' + "0" * 32 + '"}\n'):
        listed.write_text(content)
        marks.add(data_fingerprint(config(source(path), steps=[{"kind": "removal_list", "path": str(listed)}])))
    assert len(marks) == 5
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text(listed.read_text())
    assert data_fingerprint(config(source(path), steps=[{"kind": "removal_list", "path": str(moved)}])) in marks


# Filters of texts.


def test_an_example_goes_with_its_query_or_its_last_positive(tmp_path: Path) -> None:
    rows = [
        row("two words", ["good document", "bad"], ["poor", "some negative"]),
        row("bad", ["good document"]),
        row("other query", ["bad", "worse"]),
        row("third query", ["good document"], ["some negative"]),
    ]
    store, summary = built(tmp_path, rows, [{"kind": "length", "least": 2}])
    assert examples_of(store) == [
        ("two words", ("good document",), ("some negative",)),
        ("third query", ("good document",), ("some negative",)),
    ]
    assert sorted(store.texts(range(store.items.num_rows))) == [
        "good document",
        "some negative",
        "third query",
        "two words",
    ]
    (step,) = summary.steps
    assert (step.before, step.after) == ({"pairs": 4}, {"pairs": 2})
    assert step.reasons == {"query: fewer than 2 words": 1, "positive: fewer than 2 words": 1}
    assert (step.positives, step.negatives) == (1, 1)
    lines = removed(store)
    assert [(line["what"], line["text"], line["query"]) for line in lines] == [
        ("example", "bad", "bad"),
        ("example", "bad", "other query"),
        ("positive", "bad", "two words"),
        ("negative", "poor", "two words"),
    ]
    assert all(line["reason"].endswith("fewer than 2 words") and line["source"] == "pairs" for line in lines)


def test_known_positives_and_splits_are_those_of_what_stays(tmp_path: Path) -> None:
    rows = [{**row(f"query number {i}", [f"document number {i}"]), "s": "train" if i % 3 else "test"} for i in range(9)]
    rows.append({**row("short", ["document number 0"]), "s": "train"})
    split = {"kind": "column", "column": "s"}
    store, summary = built(tmp_path, rows, [{"kind": "length", "least": 3}], split=split)
    assert summary.sources[0].splits == {"test": 3, "train": 6}
    assert summary.shared_between_splits == {}
    known = store.known_positives()
    texts = store.texts(range(store.items.num_rows))
    for query, positives in ((q, p) for q, p, _ in examples_of(store)):
        assert store.texts(known[texts.index(query)]) == list(positives)


@given(st.lists(st.text(alphabet="ab \t", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=20))
@settings(max_examples=12)
def test_length_bounds_are_those_of_a_loop(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        rows = [{"text": text, "label": str(i)} for i, text in enumerate(texts)] + [{"text": "a b", "label": "keep"}]
        for unit, count in (("words", lambda t: len(t.split())), ("characters", len)):
            step = {"kind": "length", "unit": unit, "least": 2, "most": 5}
            store, summary = built(Path(name), rows, [step], examples=LABELLED, task_type="Classification")
            wanted = [r["text"] for r in rows if 2 <= count(r["text"]) <= 5]
            assert [query for query, _, _ in examples_of(store)] == wanted
            assert sum(summary.steps[0].reasons.values()) == len(rows) - len(wanted)


def test_shares_of_characters() -> None:
    assert letters("ab1 !") == 3 / 4
    assert letters("हिन्दी") == 1.0
    assert letters(" ") == 0.0
    assert printable("a\x07b\n") == 3 / 4
    assert urls("see https://x.org/a now") == len("https://x.org/a") / 23
    assert urls("www.a.b") == 1.0
    assert control("a\u200bb\ufffd\t") == 2 / 5
    for share in (letters, printable, urls, control):
        assert share("") == 0.0


@pytest.mark.parametrize(
    ("setting", "bad", "reason"),
    [
        ({"min_letters": 0.5}, "!!! ??? a", "letters"),
        ({"min_printable": 0.9}, "a\x01\x02\x03 b", "printable"),
        ({"max_urls": 0.5}, "https://a.b/c/d/e/f x", "URLs"),
        ({"max_control": 0.1}, "ab\u200b\u200b\u200b", "control"),
    ],
)
def test_character_filters(tmp_path: Path, setting: dict[str, float], bad: str, reason: str) -> None:
    store, summary = built(tmp_path, [row(bad), row("a plain query of words")], [{"kind": "characters", **setting}])
    assert [query for query, _, _ in examples_of(store)] == ["a plain query of words"]
    ((why, count),) = summary.steps[0].reasons.items()
    assert reason in why and count == 1


def test_language_filter_takes_out_what_is_surely_foreign(tmp_path: Path) -> None:
    english = "The cat sat on the mat and looked at the garden"
    german = "Die Katze saß auf der Matte und schaute in den Garten hinaus"
    rows = [
        row(english),
        row(german),
        row("kurz"),
        row("猫はマットの上に座って庭を眺めていました。とても良い天気でした。"),
    ]
    store, summary = built(tmp_path, rows, [{"kind": "language", "languages": ["en"]}])
    assert [query for query, _, _ in examples_of(store)] == [english, "kurz"]
    assert summary.steps[0].reasons == {"query: language de": 1, "query: language ja": 1}
    with pytest.raises(BadInputError, match="does not know xx"):
        built(tmp_path, rows, [{"kind": "language", "languages": ["xx"]}])


def test_a_step_that_leaves_nothing_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"step 2 \(length\) leaves nothing of the source 'pairs'"):
        built(tmp_path, [row("a b")], [{"kind": "length"}, {"kind": "length", "least": 9}])
    assert not (tmp_path / "store").exists()


# Removal lists.


def test_removal_lists_are_obeyed(tmp_path: Path) -> None:
    rows = [row("first query", ["doc one"], ["known text", "doc two"]), row("second query", ["doc two"])]
    plain, _ = built(tmp_path, rows, [])
    ids = dict(zip(plain.items["text"].to_pylist(), plain.items["id"].to_pylist(), strict=True))
    lines = [
        {"id": ids["known text"].hex(), "kind": "exact", "task": "STS12"},
        {"id": ids["second query"].hex()},
        {"id": "f" * 32},
    ]
    write_rows(tmp_path / "list.jsonl", lines)
    store, summary = built(tmp_path, rows, [{"kind": "removal_list", "path": str(tmp_path / "list.jsonl")}])
    assert examples_of(store) == [("first query", ("doc one",), ("doc two",))]
    assert summary.steps[0].reasons == {"query: in the list": 1}
    assert "exact match with STS12" in {line["reason"] for line in removed(store)}
    for text, words in (("nonsense", "no item id"), ('{"id": "ff"}', "32 hex digits"), ('{"id": 3}', "no item id")):
        (tmp_path / "list.jsonl").write_text(text)
        with pytest.raises(BadInputError, match=words):
            built(tmp_path, rows, [{"kind": "removal_list", "path": str(tmp_path / "list.jsonl")}])
    with pytest.raises(BadInputError):
        built(tmp_path, rows, [{"kind": "removal_list", "path": str(tmp_path / "none.jsonl")}])


# Near-duplicates.


def brute_kept(rows: list[tuple[str, str]], compare: str) -> list[int]:
    """The examples that stay, by loops over all pairs of texts."""
    leaders: list[str] = []
    of: dict[str, str] = {}
    sides = {"example": (0, 1), "query": (0,), "positives": (1,)}[compare]
    by_form: dict[str, str] = {}
    for pair in rows:
        for side in sides:
            text = pair[side]
            if text in of:
                continue
            form = normal_form(text)
            if form in by_form:
                of[text] = of[by_form[form]]
                continue
            by_form[form] = text
            of[text] = next((leader for leader in leaders if brute_near(leader, text, NearDuplicateConfig())), text)
            if of[text] == text:
                leaders.append(text)
    seen: set[tuple[str, ...]] = set()
    kept = []
    for place, pair in enumerate(rows):
        key = tuple(of[pair[side]] for side in sides)
        if key not in seen:
            kept.append(place)
            seen.add(key)
    return kept


@pytest.mark.parametrize("compare", ["example", "query", "positives"])
def test_near_duplicates_are_those_of_a_double_loop(tmp_path: Path, compare: str) -> None:
    queries, documents = similar_texts(120, 8, 5), similar_texts(120, 16, 6)
    pairs = list(dict.fromkeys(zip(queries, documents, strict=True)))
    step = {"kind": "near_duplicates", "compare": compare}
    store, summary = built(tmp_path, [row(query, [document]) for query, document in pairs], [step])
    kept = brute_kept(pairs, compare)
    assert [(query, documents[0]) for query, documents, _ in examples_of(store)] == [pairs[i] for i in kept]
    assert summary.steps[0].reasons == {"near-duplicate by words": len(pairs) - len(kept)}
    assert len(removed(store)) == len(pairs) - len(kept) > 0
    assert all(line["like"] for line in removed(store))


def test_within_a_source_or_across(tmp_path: Path) -> None:
    texts = ["a query of some words here", "A query of some words, here!", "quite another text of words"]
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [row(t, [f"the one document of {t}"]) for t in texts]) for name in "ab"
    ]
    step = {"kind": "near_duplicates"}

    def counts(**where: Any) -> list[int]:
        sources = [source(path, name=name, **where.get("own", {})) for path, name in zip(paths, "ab", strict=True)]
        summary = build_data(config(*sources, steps=where.get("common", [])), tmp_path / "store")
        return [s.examples for s in summary.sources]

    assert counts() == [3, 3]
    assert counts(own={"steps": [step]}) == [2, 2]
    with pytest.raises(BadInputError, match="leaves nothing of the source 'b'"):
        counts(common=[step])
    write_rows(
        paths[1],
        [
            row("only in b, this one is", ["its own document, it is"]),
            row(texts[0], [f"the one document of {texts[0]}"]),
        ],
    )
    assert counts(common=[step]) == [2, 1]


def test_kept_splits_come_first(tmp_path: Path) -> None:
    rows = [
        {**row("one query of many words"), "s": "train"},
        {**row("One query of many words."), "s": "test"},
        {**row("another query that is alone"), "s": "train"},
    ]
    split = {"kind": "column", "column": "s"}
    step = {"kind": "near_duplicates"}
    first, _ = built(tmp_path, rows, [step], split=split)
    assert first.examples["split"].to_pylist() == ["train", "train"]
    held, _ = built(tmp_path, rows, [{**step, "keep": ["test"]}], split=split)
    assert examples_of(held)[0][0] == "One query of many words."
    assert held.examples["split"].to_pylist() == ["test", "train"]


def test_labels_and_scores_tell_examples_apart(tmp_path: Path) -> None:
    texts = ["this text has five words", "This text has five words!"]
    rows = [{"text": text, "label": label} for text in texts for label in ("x", "y")]
    changes = {"examples": LABELLED, "task_type": "Classification"}
    store, _ = built(tmp_path, rows, [{"kind": "near_duplicates"}], **changes)
    assert store.examples["label"].to_pylist() == ["x", "y"]
    store, _ = built(tmp_path, rows, [{"kind": "near_duplicates", "compare": "query"}], **changes)
    assert store.examples["label"].to_pylist() == ["x"]
    pairs = [{"first": texts[i % 2], "second": "a second text of words", "score": i // 2} for i in range(4)]
    store, _ = built(tmp_path, pairs, [{"kind": "near_duplicates"}], examples=GRADED, task_type="STS")
    assert store.examples["score"].to_pylist() == [0.0, 1.0]


def test_vectors_need_an_encoder_and_keep_the_first(tmp_path: Path) -> None:
    rows = [row(f"text number {i} of many", [f"document number {i} of many"]) for i in range(6)] + [
        row("short", ["one"])
    ]
    step = {"kind": "near_vectors", "model": "model", "cosine": 0.9}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadInputError, match="no encoder"):
        build_data(config(source(path), steps=[step]), tmp_path / "store")
    asked: list[str] = []

    def encoders(model: str) -> Any:
        asked.append(model)

        def encode(texts: Sequence[str]) -> np.ndarray:
            assert all(len(text.split()) >= 4 for text in texts)
            return np.array([[int(text.split()[2]) // 2 * 3.0 + 1, 5.0 * ("doc" in text), 1.0] for text in texts])

        return encode

    build_data(config(source(path), steps=[step]), tmp_path / "store", encoders=encoders)
    kept = [query for query, _, _ in examples_of(Store.open(tmp_path / "store"))]
    assert asked == ["model"]
    assert kept[0] == "text number 0 of many" and "text number 1 of many" not in kept and kept[-1] == "short"


def test_the_command_shows_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nearfield.cli import main

    write_rows(tmp_path / "rows.jsonl", [row("[bold]bad"), row("two words"), row("three more words")])
    recipe = tmp_path / "data.yaml"
    recipe.write_text(
        "name: test\nsources:\n- name: pairs\n  task_type: Retrieval\n  reader: {kind: jsonl, path: rows.jsonl}\n"
        "  examples: {kind: retrieval, query: query, positives: positives}\n  split: {kind: all}\n"
        "  steps: [{kind: length, least: 2}]\n"
    )
    with pytest.raises(SystemExit):
        main(["data", "build", str(recipe), "--out", str(tmp_path / "store")])
    shown = capsys.readouterr().out
    assert "1 length" in shown and "fewer than 2 words 1" in shown and "removed.jsonl" in shown
    with pytest.raises(SystemExit):
        main(["data", "stats", str(tmp_path / "store")])
    assert "fewer than 2 words 1" in capsys.readouterr().out
    recipe.write_text(recipe.read_text().replace("least", "lest"))
    with pytest.raises(SystemExit) as stopped:
        main(["data", "build", str(recipe)])
    assert stopped.value.code == 2
    assert "Did you mean 'least'" in capsys.readouterr().err
