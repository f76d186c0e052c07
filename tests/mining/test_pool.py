"""From a store to the artifact: what may never be a negative, what is written, who is left with too few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.arrays import Ragged
from nearfield.data import Store
from nearfield.errors import BadInputError
from nearfield.mining import config as kinds
from nearfield.mining.negatives import (
    SHORT_FILE,
    Negatives,
    Pool,
    document_items,
    make_pool,
    mine_pool,
    write_negatives,
)
from nearfield.mining.teachers import encoded
from tests.data.making import build_rows

ROWS = [
    {"query": "q one", "positives": ["alpha", "beta"], "negatives": ["n1"], "part": "train"},
    {"query": "q two", "positives": ["gamma"], "negatives": ["ALPHA", "Q  Two"], "part": "train"},
    {"query": "q one", "positives": ["gamma "], "negatives": [], "part": "test"},
    {"query": "q three", "positives": ["delta"], "negatives": ["q three", "n2"], "part": "train"},
]


@pytest.fixture()
def store(tmp_path: Path) -> Store:
    return build_rows(tmp_path, ROWS, split={"kind": "column", "column": "part"})


def encode(texts: Any, role: str) -> Any:
    return [[sum(map(ord, text)) % 17 + 1, len(text), 3.0] for text in texts]


def texts(store: Store, pool: Pool, lists: Ragged) -> list[set[str]]:
    return [set(store.texts(pool.documents[lists[i]])) for i in range(len(lists))]


def test_known_positives_the_query_and_their_variants_are_never_negatives(store: Store) -> None:
    pool = make_pool(store, "pairs", "train", ["pairs"])
    assert set(store.texts(pool.documents)) == {"alpha", "beta", "gamma", "delta", "n1", "n2", "ALPHA", "Q  Two", "q three"}  # fmt: skip
    assert texts(store, pool, pool.positives) == [{"alpha", "beta"}, {"gamma"}, {"delta"}]
    # 'gamma ' is a positive of 'q one' in the test split, so 'gamma' is none of its negatives.
    assert texts(store, pool, pool.excluded) == [
        {"alpha", "beta", "ALPHA", "gamma"},
        {"gamma", "Q  Two"},
        {"delta", "q three"},
    ]
    items = np.concatenate([store.examples["positives"][int(row)].values.to_numpy() for row in pool.examples])
    np.testing.assert_array_equal(pool.documents[pool.positives.values[pool.positive_order]], items)
    assert pool.items("query", np.array([1])).tolist() == [pool.queries[1]]


def test_documents_of_another_split_are_left_out(store: Store) -> None:
    assert store.texts(document_items(store, ["pairs"], "test")) == ["gamma "]


def mined(store: Store, out: Path, **changes: Any) -> tuple[Pool, Any, Negatives]:
    pool = make_pool(store, "pairs", "train", ["pairs"])
    scorer = encoded(encode, store.texts(pool.queries), store.texts(pool.documents))
    settings = {"rules": (kinds.NaiveRule(),), "negatives": 6, **changes}
    result = mine_pool(pool, scorer, kinds.MiningConfig(**settings))
    write_negatives(out, store, [(pool, result)], {"fingerprint": "f", "generation": 3})
    return pool, result, Negatives(out)


def test_the_artifact_says_what_was_mined(store: Store, tmp_path: Path) -> None:
    pool, result, negatives = mined(store, tmp_path / "out")
    assert (negatives.fingerprint, negatives.generation) == ("f", 3)
    for number, rows in enumerate(negatives.of(pool.examples)):
        np.testing.assert_array_equal(rows, pool.documents[result.lists[number]])
        forbidden = {*store.texts(pool.documents[pool.excluded[number]])}
        assert not forbidden & set(store.texts(rows)) and len(rows)
    np.testing.assert_array_equal(negatives.scores, result.scores)
    np.testing.assert_array_equal(negatives.ranks, result.ranks)
    np.testing.assert_array_equal(negatives.positive_scores, result.positive_scores[pool.positive_order])
    assert negatives.kept(pool.examples[::-1]).all()
    with pytest.raises(KeyError):
        negatives.of(np.array([2]))


def test_queries_with_too_few_negatives_are_listed(store: Store, tmp_path: Path) -> None:
    _, result, negatives = mined(store, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / SHORT_FILE).read_text().splitlines()]
    # 9 documents, of which 4, 2 and 2 may not be negatives.
    assert [(line["query"], line["negatives"], line["wanted"]) for line in lines] == [("q one", 5, 6)]
    assert negatives.summary["short"] == 1 and negatives.summary["sources"]["pairs"]["short"] == 1
    assert negatives.summary["sources"]["pairs"]["rules"][0]["kind"] == "naive"
    assert result.short.tolist() == [0]


def test_examples_that_a_rule_drops_have_no_negatives(store: Store, tmp_path: Path) -> None:
    pool, result, negatives = mined(store, tmp_path / "out", rules=(kinds.ConsistencyRule(top=1),))
    kept = negatives.kept(pool.examples)
    np.testing.assert_array_equal(kept, result.kept)
    assert not kept.all()
    assert [len(rows) == 0 for rows in negatives.of(pool.examples)] == (~kept).tolist()


def test_a_folder_that_holds_no_negatives(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        Negatives(tmp_path)
    mined(store, tmp_path / "out")
    (tmp_path / "out" / "negatives.parquet").write_bytes(b"x")
    with pytest.raises(BadInputError, match="it is damaged"):
        Negatives(tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text('{"version": 0}')
    with pytest.raises(BadInputError, match="it is damaged"):
        Negatives(tmp_path / "out")
    (tmp_path / "out" / "checksums.json").unlink()  # as earlier versions left it
    with pytest.raises(BadInputError, match="not of version"):
        Negatives(tmp_path / "out")
