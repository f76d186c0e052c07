"""Intervals and tests against plain loops, exact enumeration, and their own promises (coverage, uniform p)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from nearfield.evaluation import statistics as st
from nearfield.evaluation.scores import SPEARMAN


def test_bootstrap_means_equal_a_plain_loop_over_resampled_clusters() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((11, 2))
    clusters = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4])
    got = st.bootstrap_means(values, clusters, 200, np.random.default_rng(5))
    draws = np.random.default_rng(5).integers(5, size=(200, 5))
    for row, drawn in zip(got, draws, strict=True):
        members = [i for cluster in drawn for i in range(11) if clusters[i] == cluster]
        np.testing.assert_allclose(row, values[members].mean(axis=0), atol=1e-12)


def test_bootstrap_is_the_same_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = np.random.default_rng(0).random((30, 1)), np.arange(30)
    whole = st.bootstrap_means(values, clusters, 100, np.random.default_rng(1))
    monkeypatch.setattr(st, "_CHUNK_CELLS", 30 * 7)
    np.testing.assert_allclose(st.bootstrap_means(values, clusters, 100, np.random.default_rng(1)), whole, atol=1e-12)


def test_whole_clusters_widen_the_interval_of_dependent_units() -> None:
    rng = np.random.default_rng(2)
    per_cluster = rng.normal(size=60)
    values = np.repeat(per_cluster, 8)[:, None]
    units = st.percentile_interval(st.bootstrap_means(values, np.arange(480), 4000, rng)[:, 0], 0.95)
    clusters = st.percentile_interval(st.bootstrap_means(values, np.repeat(np.arange(60), 8), 4000, rng)[:, 0], 0.95)
    ratio = (clusters.high - clusters.low) / (units.high - units.low)
    assert ratio == pytest.approx(np.sqrt(8), rel=0.15)


def test_percentile_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        values = rng.exponential(size=(80, 1))
        interval = st.percentile_interval(st.bootstrap_means(values, np.arange(80), 400, rng)[:, 0], 0.95)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.89 <= covered / 400 <= 0.98


def test_sign_flip_p_approaches_the_exact_enumeration() -> None:
    rng = np.random.default_rng(4)
    clusters = np.array([0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8])
    differences = rng.normal(0.5, 1, size=12)
    sums = np.bincount(clusters, weights=differences)
    observed = abs(sums.sum())
    flips = np.array(list(itertools.product([-1, 1], repeat=9)))
    exact = np.mean(np.abs(flips @ sums) >= observed - 1e-12)
    assert st.sign_flip_p(differences, clusters, 40_000, rng) == pytest.approx(exact, abs=0.01)


def test_sign_flip_p_has_the_add_one_form_and_is_one_without_a_difference() -> None:
    rng = np.random.default_rng(5)
    assert st.sign_flip_p(np.full(60, 0.1), np.arange(60), 999, rng) == pytest.approx(1 / 1000)
    assert st.sign_flip_p(np.zeros(60), np.arange(60), 999, rng) == 1.0


@pytest.mark.parametrize("kind", ["means", "spearman"])
def test_p_values_are_uniform_under_the_null(kind: str) -> None:
    rng = np.random.default_rng(6)
    p_values = []
    for _ in range(300):
        clusters = np.repeat(np.arange(30), 2)
        if kind == "means":
            # within a cluster the differences are equal: a test that flips single units would be far too bold
            differences = np.repeat(rng.standard_t(3, size=30), 2)
            p_values.append(st.sign_flip_p(differences, clusters, 300, rng))
        else:
            gold = rng.integers(0, 6, 60).astype(float)
            first, second = (gold + rng.normal(0, 2, 60) for _ in range(2))
            p_values.append(SPEARMAN.p(gold, first, second, np.arange(60), 300, rng))
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) < 0.09


def test_holm_against_its_definition() -> None:
    assert st.holm([]) == []
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    rng = np.random.default_rng(12)
    p = rng.random(7).tolist()
    ordered = sorted(p)
    expected = {value: max(min(1.0, (7 - k) * ordered[k]) for k in range(i + 1)) for i, value in enumerate(ordered)}
    assert st.holm(p) == pytest.approx([expected[value] for value in p])


def test_cluster_numbers_keep_a_unit_without_a_cluster_apart() -> None:
    numbers = st.cluster_numbers(["x", None, "x", None, "b"], ["a", "x", "c", "d", "e"])
    assert numbers.tolist() == [0, 1, 0, 2, 3]


def test_borda_of_three_models_and_two_tasks() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.8], [0.7, 0.9]])
    assert st.borda(scores).tolist() == [2, 2, 2]
    assert st.places(st.borda(scores)).tolist() == [1, 1, 1]
    assert st.borda(scores[:2]).tolist() == [1, 1]
    assert st.borda(np.array([[0.5], [0.5]])).tolist() == [0.5, 0.5]


def test_a_missing_score_earns_no_points() -> None:
    scores = np.array([[0.9, np.nan], [0.8, 0.8], [0.7, 0.9]])
    assert st.borda(scores).tolist() == [2, 2, 2]
    assert np.isnan(st.task_ranks(scores)[0, 1])


def test_ranks_equal_scipy_also_in_stacks() -> None:
    scores = np.random.default_rng(0).integers(0, 4, size=(5, 6, 3)).astype(float)
    expected = np.stack([np.stack([stats.rankdata(-s[:, t]) for t in range(3)], axis=1) for s in scores])
    np.testing.assert_allclose(st.task_ranks(scores), expected)
    assert st.borda(scores).shape == (5, 6)


def test_rank_sets_separate_what_is_far_apart_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    estimates = np.array([0.9, 0.52, 0.5, 0.1])
    draws = estimates + 0.02 * rng.normal(size=(2000, 4))
    sets = st.rank_sets(estimates, draws)
    assert sets.low.tolist() == [1, 2, 2, 4] and sets.high.tolist() == [1, 3, 3, 4]
    assert sets.above[0].tolist() == [False, True, True, True]


def test_not_separable_is_not_transitive() -> None:
    estimates = np.array([0.60, 0.55, 0.50])
    draws = estimates + 0.025 * np.random.default_rng(2).normal(size=(4000, 3))
    sets = st.rank_sets(estimates, draws)
    assert sets.above.tolist() == [[False, False, True], [False, False, False], [False, False, False]]
    assert sets.low.tolist() == [1, 1, 2] and sets.high.tolist() == [2, 3, 3]


def test_pairs_without_spread_are_not_separated_and_one_model_has_rank_one() -> None:
    sets = st.rank_sets(np.array([0.6, 0.5]), np.tile([0.6, 0.5], (100, 1)))
    assert sets.low.tolist() == [1, 1] and sets.high.tolist() == [2, 2]
    alone = st.rank_sets(np.array([0.6]), np.zeros((100, 1)))
    assert alone.low.tolist() == alone.high.tolist() == [1]


def test_all_true_ranks_are_inside_as_often_as_promised() -> None:
    rng = np.random.default_rng(3)
    true = np.array([0.6, 0.55, 0.55, 0.5])
    best, worst = np.array([1, 2, 2, 4]), np.array([1, 3, 3, 4])
    held = 0
    for _ in range(300):
        estimates = true + 0.02 * rng.normal(size=4)
        sets = st.rank_sets(estimates, estimates + 0.02 * rng.normal(size=(500, 4)))
        held += bool(((sets.low <= best) & (sets.high >= worst)).all())
    assert held / 300 > 0.92


@pytest.mark.parametrize("level", [0.8, 0.99])
def test_a_higher_level_gives_wider_sets(level: float) -> None:
    rng = np.random.default_rng(4)
    estimates = np.linspace(0.5, 0.6, 6)
    draws = estimates + 0.02 * rng.normal(size=(2000, 6))
    plain, other = st.rank_sets(estimates, draws, 0.95), st.rank_sets(estimates, draws, level)
    wider, narrower = (other, plain) if level > 0.95 else (plain, other)
    assert ((wider.high - wider.low) >= (narrower.high - narrower.low)).all()
