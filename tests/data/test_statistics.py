"""Statistics and samples of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.data.statistics import sample_examples, store_stats, summarise_lengths
from nearfield.errors import BadInputError
from tests.data.making import GRADED, LABELLED, build_rows

ROWS: list[dict[str, object]] = [
    {"query": "red fish", "positives": ["the Red boat", "x"], "negatives": ["n"]},
    {"query": "blue", "positives": "one two three four five", "negatives": None},
    {"query": "blue", "positives": "one two three four five", "negatives": None},
]


def test_counts(tmp_path: Path) -> None:
    stats = store_stats(build_rows(tmp_path, ROWS)).sources[0]
    assert stats.splits == {"train": 2}
    assert (stats.positives, stats.negatives, stats.labels) == (1.5, 0.5, 0)
    assert stats.duplicate_share == pytest.approx(1 / 3)
    assert stats.overlap == pytest.approx((0.5 + 0) / 2)
    query, document = stats.lengths
    assert (query.role, query.items, query.mean, query.longest) == ("query", 2, 1.5, 2)
    assert (document.role, document.items, document.longest) == ("document", 4, 5)
    assert document.histogram == ((1, 2), (2, 0), (4, 1), (8, 1))


def test_lengths_are_counted_by_what_is_handed_in(tmp_path: Path) -> None:
    stats = store_stats(build_rows(tmp_path, ROWS), lambda texts: [len(text) for text in texts], "characters")
    assert stats.unit == "characters"
    assert stats.sources[0].lengths[0].longest == len("red fish")


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=50))
def test_histograms_hold_every_item(lengths: list[int]) -> None:
    result = summarise_lengths("query", np.asarray(lengths, dtype=np.int64))
    bounds = [0, *(bound for bound, _ in result.histogram)]
    for low, (high, count) in zip(bounds, result.histogram, strict=False):
        assert count == sum(low < length <= high or (length == 0 and low == 0) for length in lengths)
    assert sum(count for _, count in result.histogram) == len(lengths)


def test_samples_are_the_same_for_a_seed(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "positives": f"p{n}", "negatives": [f"n{n}"]} for n in range(30)]
    store = build_rows(tmp_path, rows)
    first = sample_examples(store, 4, seed=1)
    assert first == sample_examples(store, 4, seed=1)
    assert first != sample_examples(store, 4, seed=2)
    assert len({example.row for example in first}) == 4
    assert all(example.positives == (f"p{example.query[1:]}",) for example in first)
    assert len(sample_examples(store, 99)) == 30
    with pytest.raises(BadInputError, match="no such example") as error:
        sample_examples(store, 1, split="test")
    assert error.value.hint == "Splits: train."


@pytest.mark.parametrize(
    ("examples", "row", "overlap"),
    [(GRADED, {"first": "a b", "second": "b", "score": 1}, 0.5), (LABELLED, {"text": "a", "label": "l"}, None)],
)
def test_other_kinds(tmp_path: Path, examples: dict[str, str], row: dict[str, object], overlap: float | None) -> None:
    store = build_rows(tmp_path, [row], examples=examples)
    stats = store_stats(store).sources[0]
    assert stats.overlap == overlap
    assert stats.labels == (1 if "label" in row else 0)
    (shown,) = sample_examples(store)
    assert (shown.score, shown.label) == (row.get("score"), row.get("label"))


def test_a_part_can_be_measured(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "positives": f"p{n}", "negatives": None} for n in range(30)]
    stats = store_stats(build_rows(tmp_path, rows), sample=10).sources[0]
    assert stats.lengths[0].items == 10
    assert stats.splits == {"train": 30}
