"""``nearfield.statistics``: intervals and tests of plain arrays, the same numbers as a comparison's, and its sentences."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nearfield.errors import BadInputError
from nearfield.evaluation import statistics as plain
from nearfield.provenance import generator
from nearfield.statistics import compare, interval
from tests.test_imports import HEAVY, loaded_by

KEY = ("statistics", "default", "test")


def test_independent_units_have_the_interval_and_the_test_of_a_comparison() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(300), rng.random(300)
    numbers = np.arange(300)
    got = interval(first, samples=500)
    drawn = plain.bootstrap_means(first[:, None], numbers, 500, generator(0, "bootstrap", *KEY))[:, 0]
    expected = plain.percentile_interval(drawn, 0.95, 299)
    assert (got.low, got.high, got.mean) == (expected.low, expected.high, first.mean())
    assert "300 units are resampled" in got.sentence and got.reason is None
    both = compare(first, second, samples=500, margin=0.2)
    p = plain.sign_flip_p(second - first, numbers, 500, generator(0, "permutation", *KEY))
    assert both.p == p and both.verdict == "not separable" and "not separable from" in both.sentence
    assert both.p_equivalent is not None and both.p_equivalent < 0.05


def test_clusters_are_resampled_whole_and_shared_contents_are_counted() -> None:
    rng = np.random.default_rng(1)
    values = np.repeat(rng.random(50), 4)
    clusters = [f"c{i // 4}" for i in range(200)]
    whole, single = interval(values, clusters, samples=500), interval(values, samples=500)
    assert whole.resampled == "200 units in 50 clusters, which are resampled whole"
    assert whole.high - whole.low > 1.5 * (single.high - single.low)  # type: ignore[operator]
    pairs = list(combinations(range(21), 2))[:200]
    effects = rng.random(21) / 2
    scores = np.array([effects[list(pair)].sum() for pair in pairs])
    crossed = interval(scores, pairs, unit="query")
    assert "200 queries that share" in crossed.sentence and "independent documents" in crossed.sentence
    better = compare(scores, scores + 0.25 + 0.01 * rng.normal(size=200), pairs)
    assert better.verdict == "better" and better.sentence.startswith("The second is better than the first: +0.2")
    assert compare(scores, scores - 0.2 - 0.01 * rng.random(200), pairs, margin=0.01).verdict == "worse"


def test_too_few_independent_contents_give_no_interval_and_say_so() -> None:
    scores = np.random.default_rng(2).random(100)
    shared = ["all" if i < 60 else None for i in range(100)]
    got, both = interval(scores, shared), compare(scores, scores + 0.1, shared)
    assert got.low is None and "60 of 100" in got.sentence and "independent contents" in got.sentence
    assert both.verdict == "not tested" and both.p is None and both.difference == pytest.approx(0.1)
    assert "not tested" in both.sentence


def test_rare_ones_and_skewed_differences_have_intervals_that_can_hold() -> None:
    none = interval(np.zeros(50))
    assert none.low == 0 and none.high is not None and 0.05 < none.high < 0.1
    one = interval(np.array([1.0] + [0.0] * 99))
    assert one.low is not None and one.high is not None and 0 < one.low < 0.01 < 0.05 < one.high < 0.06
    steady, binary = np.full(50, 0.97), np.ones(50)
    assert compare(steady, binary, samples=999).verdict == "better"
    binary[0] = 0.0
    assert compare(steady, binary, samples=999).verdict == "not separable"


@pytest.mark.parametrize(
    ("first", "second", "shared", "words"),
    [
        ([0.1], [0.2], None, "two numbers"),
        ([0.1, np.nan], [0.2, 0.3], None, "finite"),
        ([0.1, 0.2], [0.2, 0.3, 0.4], None, "different numbers"),
        ([0.1, 0.2], [0.2, 0.3], ["a"], "2 scores but 1"),
    ],
)
def test_what_is_no_pair_of_scores_is_refused(
    first: list[float], second: list[float], shared: object, words: str
) -> None:
    with pytest.raises(BadInputError, match=words):
        compare(first, second, shared)  # type: ignore[arg-type]


def test_it_imports_nothing_heavy() -> None:
    assert not loaded_by("import nearfield.statistics") & HEAVY
