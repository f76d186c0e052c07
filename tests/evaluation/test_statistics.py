"""Intervals and tests against plain loops, exact enumeration, and their own promises (coverage, uniform p)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from nearfield.evaluation import statistics as st


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
            p_values.append(st.swap_p(gold, first, second, np.arange(60), 300, rng))
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) < 0.09


def test_swap_p_equals_a_plain_loop_and_sees_a_real_difference() -> None:
    rng = np.random.default_rng(7)
    gold = rng.integers(0, 6, 40).astype(float)
    good, bad = gold + rng.normal(0, 0.5, 40), gold + rng.normal(0, 4, 40)
    clusters = np.repeat(np.arange(20), 2)
    got = st.swap_p(gold, bad, good, clusters, 500, np.random.default_rng(8))
    assert got < 0.05
    chosen = np.random.default_rng(8).integers(2, size=(500, 20), dtype=np.int8).astype(bool)
    ranks = [stats.rankdata(x) for x in (bad, good)]
    observed = abs(stats.spearmanr(gold, bad)[0] - stats.spearmanr(gold, good)[0])
    extreme = 0
    for row in chosen:
        swapped = row[clusters]
        a, b = np.where(swapped, ranks[0], ranks[1]), np.where(swapped, ranks[1], ranks[0])
        g = stats.rankdata(gold)
        extreme += abs(np.corrcoef(g, a)[0, 1] - np.corrcoef(g, b)[0, 1]) >= observed - 1e-12
    assert got == pytest.approx((extreme + 1) / 501)


def test_spearman_and_midranks_equal_scipy_with_ties() -> None:
    rng = np.random.default_rng(9)
    gold, predicted = rng.integers(0, 5, 50).astype(float), rng.integers(0, 9, 50).astype(float)
    np.testing.assert_allclose(st.midranks(gold), stats.rankdata(gold))
    assert st.spearman(gold, predicted) == pytest.approx(stats.spearmanr(gold, predicted)[0], abs=1e-12)


def test_bootstrap_spearman_ranks_each_resample_anew() -> None:
    rng = np.random.default_rng(10)
    gold = rng.integers(0, 5, 25).astype(float)
    predictions = np.stack([gold + rng.normal(size=25), rng.integers(0, 4, 25).astype(float)], axis=1)
    clusters = np.repeat(np.arange(5), 5)
    got = st.bootstrap_spearman(gold, predictions, clusters, 100, np.random.default_rng(11))
    draws = np.random.default_rng(11).integers(5, size=(100, 5))
    for row, drawn in zip(got, draws, strict=True):
        members = np.concatenate([np.flatnonzero(clusters == cluster) for cluster in drawn])
        for model in range(2):
            expected = stats.spearmanr(gold[members], predictions[members, model])[0]
            assert row[model] == pytest.approx(expected, abs=1e-10, nan_ok=True)


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


def test_disjoint_sets_equal_a_flood_fill() -> None:
    rng = np.random.default_rng(13)
    edges = rng.integers(0, 40, size=(25, 2))
    sets = st.DisjointSets(40)
    reach = np.eye(40, dtype=bool)
    for a, b in edges:
        sets.join(int(a), int(b))
        reach[a, b] = reach[b, a] = True
    for _ in range(6):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    for a in range(40):
        assert sets.find(a) == int(np.flatnonzero(reach[a])[0])
