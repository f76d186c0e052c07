"""The audit: Wilson's interval, false negatives that are planted, the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from nearfield.mining import config as kinds
from nearfield.mining.negatives import Negatives, audit, make_pool, mine_pool, wilson, write_negatives
from nearfield.mining.teachers import encoded
from nearfield.reporting.batches import edges, write_audit
from tests.data.making import build_rows


@pytest.mark.parametrize(("hits", "n"), [(15, 50), (0, 20), (20, 20), (1, 1000)])
def test_wilsons_interval_is_scipys(hits: int, n: int) -> None:
    found, other = wilson(hits, n), binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert (found.value, found.low, found.high) == pytest.approx((hits / n, other.low, other.high), abs=1e-6)


def test_wilsons_interval_of_nothing() -> None:
    empty = wilson(0, 0)
    assert math.isnan(empty.value) and (empty.low, empty.high) == (0.0, 1.0)


def test_wilsons_interval_covers_what_it_says() -> None:
    random = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        inside = 0
        for hits in random.binomial(60, share, 2000).tolist():
            found = wilson(hits, 60)
            inside += found.low <= share <= found.high
        assert inside / 2000 > 0.92


@pytest.fixture()
def mined(tmp_path: Path) -> Any:
    """120 queries; a third of the corpus is another wording of a positive, which the data does not know."""
    rows = [{"query": f"q{i}", "positives": [f"topic{i} text"], "negatives": [f"topic{(i * 7 + 3) % 120} twin"]} for i in range(120)]  # fmt: skip
    store = build_rows(tmp_path, rows)
    random = np.random.default_rng(0)
    topics = random.standard_normal((120, 24))

    def encode(texts: Any, role: str) -> Any:
        numbers = [int(text.split()[0].lstrip("topicq")) for text in texts]
        return topics[numbers] + np.random.default_rng(len(texts)).standard_normal((len(texts), 24)) * 0.1

    pool = make_pool(store, "pairs", "train", ["pairs"])
    scorer = encoded(encode, store.texts(pool.queries), store.texts(pool.documents))
    config = kinds.MiningConfig(rules=(kinds.NaiveRule(),), negatives=2, depth=10)
    result = mine_pool(pool, scorer, config)
    write_negatives(tmp_path / "out", store, [(pool, result)], {"fingerprint": "f" * 32, "generation": 0, "recall": {}})
    return store, Negatives(tmp_path / "out")


def test_a_judge_that_knows_finds_the_planted_twins(mined: Any) -> None:
    store, negatives = mined

    def judge(source: int, queries: Any, items: Any) -> Any:
        asked, found = store.texts(queries), store.texts(items)
        return np.array(
            [
                (1 + d.endswith("twin")) * float(d.split()[0] == f"topic{q[1:]}")
                for q, d in zip(asked, found, strict=True)
            ],
            np.float32,
        )

    found = audit(store, negatives, judge, "an oracle", shown=4, judged=120)
    rate = found.false_negatives["pairs"]
    twins = [
        {f"topic{store.texts([query])[0][1:]} twin"} & set(store.texts(rows))
        for query, rows in zip(negatives.table["query"].to_pylist(), negatives.of(negatives.examples), strict=True)
    ]
    # Each query has two negatives, of which one is judged: about half of the twins.
    expected = sum(map(bool, twins)) / 2
    assert rate.n == 120 and abs(rate.hits - expected) < 4 * math.sqrt(expected / 2)
    assert rate.low < rate.value < rate.high and found.shared == rate
    again = audit(store, negatives, judge, "an oracle", shown=4, judged=120)
    assert again.false_negatives == found.false_negatives and again.sample == found.sample


def test_gaps_and_sample_are_those_of_the_artifact(mined: Any, tmp_path: Path) -> None:
    store, negatives = mined
    found = audit(store, negatives, lambda s, q, d: np.arange(len(d), dtype=np.float32), "counting", shown=3, judged=7)
    row = 0
    for place, (rows, positive) in enumerate(
        zip(negatives.table["scores"].to_pylist(), negatives.table["positive_scores"].to_pylist(), strict=True)
    ):
        assert found.positive_scores[place] == min(positive)
        for score in rows:
            assert found.gaps[row] == pytest.approx(min(positive) - score, abs=1e-12)
            row += 1
    assert row == len(found.gaps) == len(found.negative_scores)
    assert found.false_negatives["pairs"].n == 7 and len(found.sample) == 3
    for example in found.sample:
        assert example.query.startswith("q") and len(example.negatives) == 2
        assert example.negatives[0].score >= example.negatives[1].score
    assert [one.judged for example in found.sample for one in example.negatives] == list(range(6))
    page = write_audit(found, "toy <b>", tmp_path / "mining.html").read_text()
    assert page.count("<svg") == 2 and "toy &lt;b&gt;" in page and "<b>" not in page
    assert "counting" in page and "naive" in page and found.sample[0].query in page


def test_edges_of_one_value() -> None:
    assert edges(np.array([2.0, 2.0]))[0] == 1.5
