"""Weights of examples: a column of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.data import Store, build_data
from nearfield.data.build import data_fingerprint
from tests.data.making import build_rows, config, source, write_rows

ROWS: list[dict[str, Any]] = [
    {"query": "a", "positives": "p a", "negatives": [], "w": 0.5},
    {"query": "b b", "positives": "p b", "negatives": [], "w": 0},
    {"query": "c", "positives": "p c", "negatives": [], "w": "2"},
]


def test_a_column_says_what_examples_count(tmp_path: Path) -> None:
    store = build_rows(tmp_path, ROWS, weight="w")
    np.testing.assert_array_equal(store.weights(), [0.5, 0.0, 2.0])


def test_without_the_column_a_store_has_no_weights(tmp_path: Path) -> None:
    store = build_rows(tmp_path, ROWS)
    assert store.weights() is None and "weight" not in store.examples.column_names
    path = tmp_path / "rows.jsonl"
    assert data_fingerprint(config(source(path))) != data_fingerprint(config(source(path, weight="w")))


def test_examples_of_a_source_without_weights_count_one(tmp_path: Path) -> None:
    one, two = write_rows(tmp_path / "1.jsonl", ROWS), write_rows(tmp_path / "2.jsonl", ROWS)
    build_data(config(source(one, name="one"), source(two, name="two", weight="w")), tmp_path / "store")
    np.testing.assert_array_equal(Store.open(tmp_path / "store").weights(), [1, 1, 1, 0.5, 0, 2])


def test_weights_stay_with_their_examples_when_others_are_cleaned_away(tmp_path: Path) -> None:
    store = build_rows(tmp_path, ROWS, weight="w", steps=[{"kind": "length", "least": 2, "sides": ["query"]}])
    assert [store.texts([row])[0] for row in store.examples["query"].to_pylist()] == ["b b"]
    np.testing.assert_array_equal(store.weights(), [0.0])


@pytest.mark.parametrize(
    ("weight", "reason"), [(-1, "'w' is below 0"), ("x", "'w' is not a number"), (None, "'w' is not a number")]
)
def test_bad_weights_are_quarantined(tmp_path: Path, weight: object, reason: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], ROWS[2] | {"w": weight}])
    summary = build_data(config(source(path, weight="w"), max_bad_rows=0.5), tmp_path / "store")
    assert summary.sources[0].quarantined == {reason: 1}
