"""Benchmark text in training: planted text is found, disjoint text is not, whatever its form."""

from __future__ import annotations

import importlib.util
import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.data import Store, build_data
from nearfield.data.decontaminate import (
    KINDS,
    UNSEEN,
    BenchmarkTask,
    BenchmarkText,
    ContaminationReport,
    DecontaminationConfig,
    TrainingIndex,
    decontaminate,
    read_report,
)
from nearfield.data.near_duplicates import normal_form, words
from nearfield.errors import BadInputError
from tests.data.making import GRADED, build_rows, config, source, write_rows
from tests.data.test_near_duplicates import brute_near

ROOT = Path(__file__).parents[2]


def load_figures() -> ModuleType:
    """The script that prints the figures; its plants are the ones tested here."""
    spec = importlib.util.spec_from_file_location(
        "decontamination_figures", ROOT / "scripts/decontamination_figures.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = load_figures()


def task(name: str, *texts: tuple[str, str], problem: str | None = None) -> BenchmarkTask:
    """A task of (role, text)."""

    def read() -> Iterable[BenchmarkText]:
        if problem is not None:
            raise BadInputError(problem)
        return [BenchmarkText(f"test/{number}", role, text) for number, (role, text) in enumerate(texts)]

    return BenchmarkTask(name, read)


def row(query: str, positive: str, negatives: Sequence[str] = ()) -> dict[str, object]:
    return {"query": query, "positives": [positive], "negatives": list(negatives)}


def compare(store: Store, *tasks: BenchmarkTask, **changes: object) -> ContaminationReport:
    return decontaminate(store, tasks, DecontaminationConfig(**changes), suite="suite")  # type: ignore[arg-type]


# Plants in real text.


@pytest.mark.parametrize("name", ["exact", "case and punctuation", "5 % of words left out", "all three"])
def test_planted_glosses_are_found(name: str) -> None:
    """Copies always; light edits in at least 95 of 100, at the lower end of the interval."""
    _, benchmark = FIGURES.disjoint_glosses()
    sample = random.Random(1).sample(benchmark, 1500)
    found = FIGURES.recall(sample, FIGURES.EDITS[name], seed=1)
    if name in ("exact", "case and punctuation"):
        assert found["hits"] == found["n"]
    assert found["interval"][0] >= 0.95


def test_disjoint_glosses_raise_few_alarms() -> None:
    """At most 1 in 1,000, at the upper end of the interval."""
    training, benchmark = FIGURES.disjoint_glosses()
    alarms = FIGURES.false_alarms(training[::2], benchmark)
    assert alarms["without_contained"]["interval"][1] <= 0.001
    assert alarms["by_kind"]["exact"] == alarms["by_kind"]["normalised"] == 0
    # Glosses of one dictionary do stand in others word for word: "an officer of the law" is a gloss.
    assert alarms["by_kind"]["contained"] / alarms["n"] <= 0.001


@pytest.mark.parametrize(("name", "least"), [("in a question", 0.95), ("one word changed, in a question", 0.6)])
def test_short_glosses_inside_longer_texts_are_found(name: str, least: float) -> None:
    """Of 6 to 12 words, with one word changed of 8 to 12: among all other texts, at the lower end of the interval."""
    training, benchmark = FIGURES.disjoint_glosses()
    shortest = 8 if "changed" in name else 6
    sample = [text for text in benchmark if shortest <= len(words(text)) <= 12]
    found = FIGURES.plants_inside(training, random.Random(1).sample(sample, 600), FIGURES.PLANTS[name], seed=1)
    assert found["interval"][0] >= least


def test_intervals_are_those_of_wilson() -> None:
    assert FIGURES.wilson(0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert FIGURES.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


# The report.


def test_reports_state_what_was_measured() -> None:
    made = json.loads((ROOT / "results" / "decontamination" / "figures.json").read_text())
    plants = made["plants"]["tasks among debian and docstrings"]

    def rate(way: str, *lengths: str) -> float:
        of_lengths = [plants[way][length] for length in lengths]
        return 100 * sum(one["hits"] for one in of_lengths) / sum(one["n"] for one in of_lengths)

    inside = [rate(way, "6", "7", "8", "9-10", "11-12") for way in ("in a question", "amid another text")]
    changed = rate("one word changed, in a question", "8", "9-10", "11-12")
    otherwise = {name: 100 * of_name["share"] for name, of_name in made["said_otherwise"].items()}
    paraphrases = [share for name, share in otherwise.items() if name.startswith("paraphrases")]
    assert f"inside longer ones {min(inside):.0f} in 100" in UNSEEN
    assert f"with one word changed {changed:.0f}," in UNSEEN
    assert f"of paraphrases {min(paraphrases):.0f} to {max(paraphrases):.0f}, of translations none" in UNSEEN
    assert not any(share for name, share in otherwise.items() if name.startswith("translations"))
    assert all(alarms["by_kind"]["contained"] / alarms["n"] <= 0.001 for alarms in made["false_alarms"].values())


def test_sides_kinds_and_removals(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    rows = [
        row("What is a cat?", "A small tame animal that catches mice"),
        row("other query", "another document that no benchmark has at all", ["The Negative: known to the benchmark"]),
        row("what is a dog", f"before it {long} and after it"),
        row("a distractor's query", "Some document of the corpus that answers nothing there"),
    ]
    store = build_rows(tmp_path, rows)
    report = compare(
        store,
        task(
            "Search",
            ("query", "what is a CAT"),
            ("document", "a small tame animal that catches grey mice"),
            ("document", long),
            ("document", "The Negative: known to the benchmark"),
            ("distractor", "Some document of the corpus that answers nothing there"),
            ("document", "Nothing of this is known over there"),
        ),
        task("Clean", ("text", "Entirely different words are here")),
        task("Broken", problem="no network"),
    )
    search, clean, broken = report.tasks
    assert search.benchmark == {"query": 1, "document": 4, "distractor": 1}
    assert search.training == {"exact": 2, "normalised": 1, "ngram": 1, "minhash": 1}
    assert search.matched == {
        "query": {"normalised": 1},
        "document": {"exact": 1, "ngram": 1, "minhash": 1},
        "distractor": {"exact": 1},
    }
    assert search.sides == {
        "query/query": 1,
        "document/document": 2,
        "document/distractor": 1,
        "negative/document": 1,
    }
    assert (search.contaminated, search.texts) == (4, 5)
    assert [(e.kind, e.training_role, e.benchmark_role) for e in search.examples] == [
        ("exact", "negative", "document"),
        ("normalised", "query", "query"),
        ("ngram", "document", "document"),
        ("minhash", "document", "document"),
    ]
    assert (clean.contaminated, clean.matched) == (0, {})
    assert broken.problem == "no network"
    assert report.contaminated == len(report.removals) == 4
    ids = {identity.hex(): text for identity, text in zip(*store.items.to_pydict().values(), strict=True)}
    assert {ids[removal.id] for removal in report.removals} == {
        "What is a cat?",
        "A small tame animal that catches mice",
        "The Negative: known to the benchmark",
        f"before it {long} and after it",
    }
    line = report.line()
    assert "Search (4 of 5 texts)" in line and "4 training texts match" in line and "not read: Broken" in line
    assert any(part.startswith("| Search | 5 | 1 | 1 | 1 | 1 | 0 | 0 | 1 |") for part in report.lines())


def test_short_texts_inside_longer_ones_are_seen_on_both_sides(tmp_path: Path) -> None:
    short, other = "a small grey cat that catches mice", "the slow brown river under seven old bridges"
    training = f"before it stand quite some other words and then {short} as well as many more words behind"
    rows = [row(training, other), *(row(f"query{i} a b c", f"x{i} y{i} z{i}, and so on {i}") for i in range(2000))]
    texts = (("query", short.upper()), ("document", f"one two three, four five: {other}; six seven eight nine ten"))
    report = compare(build_rows(tmp_path, rows), task("T", *texts))
    assert report.tasks[0].matched == {"query": {"contained": 1}, "document": {"contained": 1}}
    assert {removal.text for removal in report.removals} == {training, other}
    assert any("paraphrases" in line and "translations" in line for line in report.lines())
    assert compare(Store.open(tmp_path / "store"), task("T", *texts), chance=1e-300).contaminated == 0


def test_the_report_comes_back_from_its_file(tmp_path: Path) -> None:
    report = compare(build_rows(tmp_path, [row("a query", "a document")]), task("T", ("query", "A query")))
    report.save(tmp_path / "report.json")
    report.save_removals(tmp_path / "removals.jsonl")
    back = read_report(tmp_path / "report.json")
    assert back.to_json() == report.to_json()
    assert back.lines() == report.lines()
    (line,) = (tmp_path / "removals.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "normalised"
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(BadInputError, match="not a contamination report"):
        read_report(tmp_path / "report.json")


def test_only_the_split_and_sources_that_train_count(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [row("held out", "kept away")])
    rows = write_rows(tmp_path / "rows.jsonl", [row("a query", "a document")])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"first": "graded one", "second": "graded two", "score": 1}])
    build_data(
        config(
            source(rows, name="a"),
            source(held, name="b", split={"kind": "all", "name": "test"}),
            source(pairs, name="c", examples=GRADED, task_type="STS"),
        ),
        tmp_path / "store",
    )
    store = Store.open(tmp_path / "store")
    texts = [("text", text) for text in ("a query", "held out", "graded two")]
    assert compare(store, task("T", *texts)).contaminated == 2
    assert decontaminate(store, [task("T", *texts)], sources=["a"]).contaminated == 1
    assert decontaminate(store, [task("T", *texts)], split="test").contaminated == 1
    with pytest.raises(BadInputError, match="is in the split 'dev'"):
        decontaminate(store, [], split="dev")


def test_word_sequences_count_by_their_share(tmp_path: Path) -> None:
    some = [f"w{i}" for i in range(100)]
    training = " ".join(some[:40])
    store = build_rows(tmp_path, [row("q", training)])
    # 28 sequences of 13 words in the training text; 20 words in common are 8 of them.
    benchmark = " ".join(["x"] * 30 + some[:20] + ["y"] * 30)
    assert compare(store, task("T", ("document", benchmark)), ngram_share=8 / 28).tasks[0].training == {"ngram": 1}
    found = compare(store, task("T", ("document", benchmark)), ngram_share=0.3).tasks[0]
    assert (found.training, found.any_ngram) == ({}, 1)
    inside = " ".join(some[5:19])
    assert compare(store, task("T", ("query", inside))).tasks[0].training == {"ngram": 1}
    assert compare(store, task("T", ("query", " ".join(some[5:17]))), chance=1e-300).tasks[0].training == {}


def test_boilerplate_is_no_match(tmp_path: Path) -> None:
    licence = " ".join(f"boilerplate{i}" for i in range(13))
    rows = [row(f"q{i}", f"{licence} " + " ".join(f"own{i}x{j}" for j in range(9))) for i in range(6)]
    store = build_rows(tmp_path, rows)
    text = ("document", f"{licence} and its own end")
    assert compare(store, task("T", text), ngram_share=0.05).tasks[0].training == {"ngram": 6}
    assert compare(store, task("T", text), ngram_share=0.05, common=5).tasks[0].any_ngram == 0


def test_vectors_find_what_words_do_not(tmp_path: Path) -> None:
    store = build_rows(tmp_path, [row("an automobile was seen there", "wholly unlike text of some length")])

    def encode(texts: Sequence[str]) -> np.ndarray:
        alike = {"an automobile was seen there": [3.0, 0.1], "somebody saw that one car": [2.0, 0.0], "car": [1.0, 0.0]}
        return np.array([alike.get(text, [0.0, 1.0]) for text in texts])

    texts = task("T", ("query", "somebody saw that one car"), ("query", "car"))
    report = decontaminate(store, [texts], encode=encode, encoder="model")
    assert report.tasks[0].training == {"embedding": 1}
    assert report.tasks[0].matched == {"query": {"embedding": 1}}  # one word is too short to be a near-duplicate
    assert "embeddings of model" in report.line()
    assert "not read: Images" in decontaminate(store, [task("Images")]).line()
    assert decontaminate(store, [texts]).contaminated == 0


# Against a plain double loop, and against what files can hold.

HOSTILE = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "!!!", "\ud800", "\x1b[31mred", "e\u0301", "é", "É!", "ﬁ", "fi", "[bold]x[/]", "<b>"]),
    st.lists(st.sampled_from("abcdefg"), min_size=0, max_size=20).map(" ".join),
)


@settings(max_examples=60)
@given(st.lists(HOSTILE, max_size=12, unique=True), st.lists(HOSTILE, max_size=12))
def test_matches_are_those_of_a_double_loop(training: list[str], benchmark: list[str]) -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        split = words(text)
        return {tuple(split[i : i + 5]) for i in range(len(split) - 4)}

    def share(a: str, b: str) -> float:
        smaller = min(len(grams(a)), len(grams(b)))
        return len(grams(a) & grams(b)) / smaller if smaller else 0.0

    nfc: Callable[[str], str] = lambda text: unicodedata.normalize("NFC", text)  # noqa: E731
    rules: dict[str, Callable[[str, str], bool]] = {
        "exact": lambda a, b: nfc(a) == nfc(b),
        "normalised": lambda a, b: normal_form(a) == normal_form(b) != "",
        "ngram": lambda a, b: share(a, b) >= 0.5,
        "minhash": lambda a, b: brute_near(a, b) > 0,
    }
    found, _ = TrainingIndex([training], DecontaminationConfig(ngram=5)).matches(benchmark)
    for kind, rule in rules.items():
        wanted = {(i, j) for i, a in enumerate(training) for j, b in enumerate(benchmark) if rule(a, b)}
        assert {tuple(pair) for pair in found[kind].pairs.tolist()} == wanted, kind


def test_blocks_do_not_change_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pick = random.Random(0)
    texts = [" ".join(pick.choices("abcdefghij", k=pick.randint(3, 18))) for _ in range(150)]
    store = build_rows(tmp_path, [row(a, b) for a, b in zip(texts[:70], texts[70:140], strict=True)])
    tasks = task("T", *[(pick.choice(("query", "document", "distractor")), text) for text in texts[60:]])
    whole = compare(store, tasks, ngram=5)
    monkeypatch.setattr("nearfield.data.decontaminate.BLOCK", 7)
    monkeypatch.setattr("nearfield.data.decontaminate.BLOCK", 7)
    monkeypatch.setattr("nearfield.data.near_duplicates._PIECE", 50)
    parts = compare(store, tasks, ngram=5)
    strip = [{**report.to_json(), "tasks": None} for report in (whole, parts)]
    assert strip[0] == strip[1]
    assert whole.removals == parts.removals
    for one, other in zip(whole.tasks, parts.tasks, strict=True):
        assert (one.training, one.matched, one.sides, one.any_ngram) == (
            other.training,
            other.matched,
            other.sides,
            other.any_ngram,
        )


def test_a_text_of_several_forms_counts_once(tmp_path: Path) -> None:
    store = build_rows(tmp_path, [row("a query", "the body of the text")])
    forms = [BenchmarkText("1", "document", text) for text in ("Title the body of the text", "the body of the text")]
    found = decontaminate(store, [BenchmarkTask("T", lambda: forms)]).tasks[0]
    assert found.benchmark == {"document": 1}
    assert found.matched == {"document": {"exact": 1}}


def test_settings_are_checked() -> None:
    assert list(KINDS) == ["exact", "normalised", "ngram", "minhash", "contained", "embedding"]
    for bad in (
        {"jaccard": 0.1},
        {"ngram": 1},
        {"ngram_share": 0},
        {"cosine": 1.1},
        {"inside": 0},
        {"chance": 0},
        {"word": 1},
    ):
        with pytest.raises(ValueError):
            DecontaminationConfig.model_validate(bad)
