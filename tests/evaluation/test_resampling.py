"""Average precision, F1 of matches, crossed runs and items: against scikit-learn, plain loops and known errors."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from nearfield.evaluation import resampling as rs


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_and_its_pseudo_values_equal_sklearn(ties: bool) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(40) < 0.4).astype(float)
    scores = labels + rng.normal(size=40)
    scores = np.round(scores * 2) if ties else scores
    whole = average_precision_score(labels, scores)
    assert rs.average_precision(labels, scores) == pytest.approx(whole, abs=1e-12)
    expected = [
        40 * whole - 39 * average_precision_score(np.delete(labels, i), np.delete(scores, i)) for i in range(40)
    ]
    np.testing.assert_allclose(rs.precision_pseudo_values(labels, scores), expected, atol=1e-10)


def test_draws_of_average_precision_have_its_spread() -> None:
    rng = np.random.default_rng(1)
    found, spreads = [], []
    for _ in range(300):
        labels = (rng.random(150) < 0.4).astype(float)
        scores = 1.3 * labels + rng.normal(size=150)
        found.append(rs.average_precision(labels, scores))
        spreads.append(rs.draws_precision(labels, scores[:, None], np.arange(150), 200, rng).std())
    assert np.mean(spreads) == pytest.approx(np.std(found), rel=0.12)


def test_a_perfect_ranking_stays_perfect() -> None:
    labels, scores = np.array([1.0, 1.0, 0.0, 0.0]), np.array([4.0, 3.0, 2.0, 1.0])
    draws = rs.draws_precision(labels, scores[:, None], np.arange(4), 100, np.random.default_rng(0))
    np.testing.assert_allclose(draws, 1.0, atol=1e-9)


def test_swapped_average_precision_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random(30) < 0.5).astype(float)
    first, second = labels + rng.normal(size=30), 2 * labels + rng.normal(size=30)
    clusters = np.repeat(np.arange(15), 2)
    got = rs.swap_precision_p(labels, first, second, clusters, 400, np.random.default_rng(3))
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
    got = rs.weighted_f1(np.ones((1, 25)), gold, predicted[None])[0]
    assert got == pytest.approx(f1(everything), abs=1e-12)
    expected = [25 * f1(everything) - 24 * f1(np.delete(everything, i)) for i in range(25)]
    np.testing.assert_allclose(rs.f1_pseudo_values(gold, predicted), expected, atol=1e-9)
    draws = rs.draws_f1(gold, predicted[:, None], everything, 4000, rng)
    assert draws.mean() == pytest.approx(got, abs=0.02)


def test_swapped_matches_see_a_real_difference_and_no_other() -> None:
    rng = np.random.default_rng(5)
    gold = np.arange(120)
    good = np.where(rng.random(120) < 0.8, gold, rng.integers(120, size=120))
    bad = np.where(rng.random(120) < 0.35, gold, rng.integers(120, size=120))
    assert rs.swap_f1_p(gold, bad, good, gold, 999, rng) < 0.01
    assert rs.swap_f1_p(gold, good, good, gold, 999, rng) == 1.0


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
        error = rs.crossed_error(runs, np.arange(60))
        means.append(runs.mean())
        variances.append(error.variance)
        rejected += error.p(float(runs.mean())) <= 0.05
    for _ in range(60):
        runs = runs_of(rng, *parts)
        draws = rs.crossed_draws(runs[:, :, None], np.arange(60), 400, rng)[:, 0]
        scaled.append((draws.std() * rs.crossed_error(runs, np.arange(60)).scale) ** 2)
    truth = parts[0] ** 2 / 10 + parts[1] ** 2 / 60 + parts[2] ** 2 / 600
    assert np.var(means) == pytest.approx(truth, rel=0.25)
    assert 0.95 * truth < np.mean(variances) < 1.35 * truth
    assert np.mean(scaled) == pytest.approx(np.mean(variances), rel=0.3)
    assert rejected / 400 < 0.085


def test_one_classifier_and_clusters_are_the_plain_case() -> None:
    rng = np.random.default_rng(7)
    values = rng.random(50)
    error = rs.crossed_error(np.tile(values, (10, 1)), np.arange(50))
    assert error.variance == pytest.approx(values.var(ddof=1) / 50)
    assert error.freedom == pytest.approx(49)
    clusters = np.repeat(np.arange(10), 5)
    grouped = rs.crossed_error(np.tile(np.repeat(rng.random(10), 5), (10, 1)), clusters)
    assert grouped.freedom == pytest.approx(9)
    assert rs.crossed_error(np.zeros((10, 50)), np.arange(50)).p(0.0) == 1.0
