"""Average precision, F1 of matches, crossed runs and items: against scikit-learn, plain loops and known errors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score

from nearfield.evaluation.scores import AVERAGE_PRECISION, CROSSED_MEAN, MATCH_F1, SPEARMAN, CrossedError
from nearfield.evaluation.statistics import midranks


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_and_its_pseudo_values_equal_sklearn(ties: bool) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(40) < 0.4).astype(float)
    scores = labels + rng.normal(size=40)
    scores = np.round(scores * 2) if ties else scores
    whole = average_precision_score(labels, scores)
    assert AVERAGE_PRECISION.value(labels, scores) == pytest.approx(whole, abs=1e-12)
    expected = [
        40 * whole - 39 * average_precision_score(np.delete(labels, i), np.delete(scores, i)) for i in range(40)
    ]
    np.testing.assert_allclose(AVERAGE_PRECISION.pseudo_values(labels, scores), expected, atol=1e-10)


def test_draws_of_average_precision_have_its_spread() -> None:
    rng = np.random.default_rng(1)
    found, spreads = [], []
    for _ in range(300):
        labels = (rng.random(150) < 0.4).astype(float)
        scores = 1.3 * labels + rng.normal(size=150)
        found.append(AVERAGE_PRECISION.value(labels, scores))
        spreads.append(AVERAGE_PRECISION.replicates(labels, scores[:, None], np.arange(150), 200, rng).std())
    assert np.mean(spreads) == pytest.approx(np.std(found), rel=0.12)


def test_a_perfect_ranking_stays_perfect() -> None:
    labels, scores = np.array([1.0, 1.0, 0.0, 0.0]), np.array([4.0, 3.0, 2.0, 1.0])
    draws = AVERAGE_PRECISION.replicates(labels, scores[:, None], np.arange(4), 100, np.random.default_rng(0))
    np.testing.assert_allclose(draws, 1.0, atol=1e-9)


def test_swapped_average_precision_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random(30) < 0.5).astype(float)
    first, second = labels + rng.normal(size=30), 2 * labels + rng.normal(size=30)
    clusters = np.repeat(np.arange(15), 2)
    got = AVERAGE_PRECISION.p(labels, first, second, clusters, 400, np.random.default_rng(3))
    chosen = np.random.default_rng(3).integers(2, size=(400, 15), dtype=np.int8).astype(bool)
    ranks = [np.argsort(np.argsort(x)) + 1.0 for x in (first, second)]
    observed = abs(average_precision_score(labels, ranks[0]) - average_precision_score(labels, ranks[1]))
    extreme = 0
    for row in chosen:
        swapped = row[clusters]
        a, b = np.where(swapped, ranks[1], ranks[0]), np.where(swapped, ranks[0], ranks[1])
        extreme += abs(average_precision_score(labels, a) - average_precision_score(labels, b)) >= observed - 1e-12
    assert got == pytest.approx((extreme + 1) / 401)


def test_f1_of_matches_and_its_pseudo_values_equal_sklearn() -> None:
    rng = np.random.default_rng(4)
    gold = rng.permutation(25)
    predicted = np.where(rng.random(25) < 0.5, gold, rng.integers(30, size=25))

    def f1(kept: np.ndarray) -> float:
        return float(f1_score(gold[kept], predicted[kept], average="weighted", zero_division=0))

    everything = np.arange(25)
    got = MATCH_F1.value(gold, predicted)
    assert got == pytest.approx(f1(everything), abs=1e-12)
    expected = [25 * f1(everything) - 24 * f1(np.delete(everything, i)) for i in range(25)]
    np.testing.assert_allclose(MATCH_F1.pseudo_values(gold, predicted), expected, atol=1e-9)
    draws = MATCH_F1.replicates(gold, predicted[:, None], everything, 4000, rng)
    assert draws.mean() == pytest.approx(got, abs=0.02)


def test_swapped_matches_see_a_real_difference_and_no_other() -> None:
    rng = np.random.default_rng(5)
    gold = np.arange(120)
    good = np.where(rng.random(120) < 0.8, gold, rng.integers(120, size=120))
    bad = np.where(rng.random(120) < 0.35, gold, rng.integers(120, size=120))
    assert MATCH_F1.p(gold, bad, good, gold, 999, rng) < 0.01
    assert MATCH_F1.p(gold, good, good, gold, 999, rng) == 1.0


def runs_of(rng: np.random.Generator, of_runs: float, of_items: float, of_both: float, items: int = 60) -> np.ndarray:
    return (
        of_runs * rng.normal(size=(10, 1))
        + of_items * rng.normal(size=(1, items))
        + of_both * rng.normal(size=(10, items))
    )


@pytest.mark.parametrize("parts", [(0.0, 1.0, 0.5), (0.3, 1.0, 1.0), (1.0, 0.2, 0.5), (0.0, 0.0, 1.0)])
def test_the_crossed_error_is_the_variance_of_the_mean(parts: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(6)
    means, variances, scaled, rejected = [], [], [], 0
    for _ in range(400):
        runs = runs_of(rng, *parts)
        error = CrossedError.of(runs, np.arange(60))
        means.append(runs.mean())
        variances.append(error.variance)
        rejected += error.p(float(runs.mean())) <= 0.05
    for _ in range(60):
        runs = runs_of(rng, *parts)
        draws = CROSSED_MEAN.replicates(np.empty(0), runs[:, :, None], np.arange(60), 400, rng)[:, 0]
        scaled.append((draws.std() * CrossedError.of(runs, np.arange(60)).scale) ** 2)
    truth = parts[0] ** 2 / 10 + parts[1] ** 2 / 60 + parts[2] ** 2 / 600
    assert np.var(means) == pytest.approx(truth, rel=0.25)
    assert 0.95 * truth < np.mean(variances) < 1.35 * truth
    assert np.mean(scaled) == pytest.approx(np.mean(variances), rel=0.3)
    assert rejected / 400 < 0.085


def test_one_classifier_and_clusters_are_the_plain_case() -> None:
    rng = np.random.default_rng(7)
    values = rng.random(50)
    error = CrossedError.of(np.tile(values, (10, 1)), np.arange(50))
    assert error.variance == pytest.approx(values.var(ddof=1) / 50)
    assert error.freedom == pytest.approx(49)
    clusters = np.repeat(np.arange(10), 5)
    grouped = CrossedError.of(np.tile(np.repeat(rng.random(10), 5), (10, 1)), clusters)
    assert grouped.freedom == pytest.approx(9)
    assert CrossedError.of(np.zeros((10, 50)), np.arange(50)).p(0.0) == 1.0


def test_swap_p_equals_a_plain_loop_and_sees_a_real_difference() -> None:
    rng = np.random.default_rng(7)
    gold = rng.integers(0, 6, 40).astype(float)
    good, bad = gold + rng.normal(0, 0.5, 40), gold + rng.normal(0, 4, 40)
    clusters = np.repeat(np.arange(20), 2)
    got = SPEARMAN.p(gold, bad, good, clusters, 500, np.random.default_rng(8))
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
    np.testing.assert_allclose(midranks(gold), stats.rankdata(gold))
    assert SPEARMAN.value(gold, predicted) == pytest.approx(stats.spearmanr(gold, predicted)[0], abs=1e-12)


def test_bootstrap_spearman_ranks_each_resample_anew() -> None:
    rng = np.random.default_rng(10)
    gold = rng.integers(0, 5, 25).astype(float)
    predictions = np.stack([gold + rng.normal(size=25), rng.integers(0, 4, 25).astype(float)], axis=1)
    clusters = np.repeat(np.arange(5), 5)
    got = SPEARMAN.replicates(gold, predictions, clusters, 100, np.random.default_rng(11))
    draws = np.random.default_rng(11).integers(5, size=(100, 5))
    for row, drawn in zip(got, draws, strict=True):
        members = np.concatenate([np.flatnonzero(clusters == cluster) for cluster in drawn])
        for model in range(2):
            expected = stats.spearmanr(gold[members], predictions[members, model])[0]
            assert row[model] == pytest.approx(expected, abs=1e-10, nan_ok=True)
