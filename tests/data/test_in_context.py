"""In-context examples: from the training split, never a row's own, a function of the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.batching.streams import PromptDraw, draw_numbers
from nearfield.data import Store, build_data
from nearfield.data.config import InContextConfig
from nearfield.data.in_context import ExampleSet, check_room, draw_example_sets, fill, forbidden_queries
from nearfield.errors import BadInputError
from tests.data.making import LABELLED, build_rows, config, source, write_rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Forty training pairs, two of which share a document, and held-out ones."""
    folder = tmp_path_factory.mktemp("store")
    rows = [
        {
            "query": f"train query {i}",
            "positives": [f"train document {i // 2 * 2 if i < 4 else i}"],
            "negatives": [],
            "s": "train",
        }
        for i in range(40)
    ]
    rows += [{"query": f"held query {i}", "positives": [f"held {i}"], "negatives": [], "s": "test"} for i in range(40)]
    return build_rows(folder, rows, split={"kind": "column", "column": "s"})


def test_sets_come_from_the_training_split_alone(store: Store) -> None:
    settings = InContextConfig(draws=50, most=4)
    sets = draw_example_sets(store, "pairs", "train", settings, seed=0)
    assert len(sets) == 50
    sizes = set()
    for one in sets:
        assert "held" not in one.text
        assert one.text.startswith("Examples:\nquery: train query ")
        texts = store.texts(one.items)
        assert all(
            f"query: {query}\ndocument: {document}\n" in one.text
            for query, document in zip(texts[::2], texts[1::2], strict=True)
        )
        sizes.add(len(texts) // 2)
    assert sizes == {1, 2, 3, 4}
    assert sets == draw_example_sets(store, "pairs", "train", settings, seed=0)
    assert sets != draw_example_sets(store, "pairs", "train", settings, seed=1)


def test_a_row_never_sees_its_query_or_positives(store: Store) -> None:
    known = store.known_positives()
    sets = draw_example_sets(store, "pairs", "train", InContextConfig(draws=12, most=4), seed=3)
    rows = store.select("pairs", "train")
    queries = store.examples["query"].take(rows).to_numpy()
    grid = [[phrasing * 100 + number for number in range(13)] for phrasing in range(2)]
    draw = PromptDraw("pairs", grid, [7, 8], [forbidden_queries(one, known) for one in sets], none=0.2)
    seen: dict[int, int] = {}
    for epoch in range(60):
        numbers, documents = draw.draw(rows, queries, seed=0, epoch=epoch)
        assert set(documents.tolist()) == {7, 8}
        for query, number in zip(queries.tolist(), numbers.tolist(), strict=True):
            chosen = number % 100
            seen[chosen] = seen.get(chosen, 0) + 1
            if chosen:
                own = {query, *known[query].tolist()}
                assert not own & set(sets[chosen - 1].items)
    share = seen[0] / sum(seen.values())
    assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / sum(seen.values()))
    assert set(seen) == set(range(13))


def test_a_row_whose_sets_are_all_its_own_gets_none() -> None:
    draw = PromptDraw("s", [[0, 1, 2]], [5], [np.array([9]), np.array([9, 10])], none=0.0)
    query, document = draw.draw(np.array([0, 1, 2]), np.array([9, 10, 11]), 0, 0)
    assert query[0] == 0 and query[1] == 1 and query[2] in (1, 2)
    assert document.tolist() == [5, 5, 5]


@given(st.permutations(range(30)), st.integers(0, 3))
def test_draws_depend_on_the_row_and_not_on_its_place(order: list[int], epoch: int) -> None:
    rows = np.arange(30)
    draw = PromptDraw("s", [[0, 1], [2, 3], [4, 5]], [6, 7], [np.array([3, 4])], none=0.3)
    whole = np.stack(draw.draw(rows, rows, 1, epoch))
    places = np.asarray(order)
    assert np.array_equal(np.stack(draw.draw(rows[places], rows[places], 1, epoch)), whole[:, places])
    assert np.array_equal(np.stack(draw.draw(rows[:7], rows[:7], 1, epoch)), whole[:, :7])


def test_phrasings_are_drawn_evenly_and_anew_each_epoch() -> None:
    rows = np.arange(30_000)
    numbers = draw_numbers(3, rows, 0, "prompts", "s", 0, "query")
    counts = np.bincount(numbers)
    assert (abs(counts - 10_000) < 5 * np.sqrt(30_000 * (1 / 3) * (2 / 3))).all()
    assert (draw_numbers(3, rows, 0, "prompts", "s", 1, "query") != numbers).mean() > 0.6
    assert not draw_numbers(1, rows, 0, "x").any()
    one = PromptDraw("s", [[4]], [2])
    assert [set(side.tolist()) for side in one.draw(rows, rows, 0, 0)] == [{4}, {2}]


def test_labels_are_documents_and_long_texts_are_cut(tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"item  {i}\n" + "word " * 99, "label": f"l{i}"} for i in range(3)]
    )
    build_data(config(source(rows, examples=LABELLED, task_type="Classification")), tmp_path / "store")
    settings = InContextConfig(draws=1, most=1, max_words=4, head="", example="{query} -> {document}; ")
    (one,) = draw_example_sets(Store.open(tmp_path / "store"), "pairs", "train", settings, 0)
    number = one.text.split()[1]
    assert one.text == f"item {number} word word -> l{number}; "
    assert len(one.items) == 1


def test_braces_in_texts_are_braces() -> None:
    assert fill("{query}|{document}", "{document}", "{query}{x}") == "{document}|{query}{x}"
    for bad in ("{query}", "{query} {document} {x}", "none"):
        with pytest.raises(ValueError, match="template"):
            InContextConfig(example=bad)


def test_bad_input(tmp_path: Path) -> None:
    store = build_rows(tmp_path, [{"query": "q", "positives": ["d"], "negatives": []}])
    with pytest.raises(BadInputError, match="need two"):
        draw_example_sets(store, "pairs", "train", InContextConfig(), 0)
    check_room(["abc"], len, 10, 7, "s")
    with pytest.raises(BadInputError, match="up to 3 tokens"):
        check_room(["a", "abc"], len, 10, 8, "s")
    assert forbidden_queries(ExampleSet("", (0,)), store.known_positives()).tolist() == [0]
    assert forbidden_queries(ExampleSet("", (1,)), store.known_positives()).tolist() == [0, 1]
