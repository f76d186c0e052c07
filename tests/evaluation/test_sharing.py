"""Units that share content: the variance against sums over all pairs, draws, coverage, and the neutral case."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from nearfield.evaluation.scores import AVERAGE_PRECISION, SPEARMAN
from nearfield.evaluation.sharing import FEWEST, Sharing, numbered
from nearfield.evaluation.statistics import FISHER_Z, LOGIT


def all_pairs(documents: int, queries: int, seed: int = 0) -> Sharing:
    """Queries of two documents each, as in LIMIT: all pairs of few documents."""
    pairs = list(combinations(range(documents), 2))
    chosen = np.random.default_rng(seed).choice(len(pairs), queries, replace=False)
    return Sharing(tuple(pairs[i] for i in chosen))


def brute_force(contents: list[tuple[int, ...]], r: np.ndarray, s: np.ndarray) -> tuple[float, float]:
    """Sums of products of residuals over units, and over ordered pairs of different units that share something."""
    pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if i != j and set(contents[i]) & set(contents[j])]
    return float(r @ s), float(sum(r[i] * s[j] for i, j in pairs))


def test_the_covariance_is_the_sum_over_all_pairs_that_share_something() -> None:
    rng = np.random.default_rng(0)
    contents = [tuple(sorted(rng.choice(14, rng.integers(1, 4), replace=False).tolist())) for _ in range(60)]
    sharing = Sharing(tuple(contents))
    effects = rng.normal(size=(14, 2))
    psi = np.stack([effects[list(c)].sum(axis=0) for c in contents]) + 0.1 * rng.normal(size=(60, 2))
    got = sharing.covariance(psi)
    residuals = psi - psi.mean(axis=0)
    own, other = sharing._coefficients or (0.0, 0.0)
    expected = np.empty((2, 2))
    for a in range(2):
        for b in range(2):
            within, between = brute_force(contents, residuals[:, a], residuals[:, b])
            expected[a, b] = own * within + other * between
    plain = np.cov(psi.T) / 60
    assert np.linalg.eigvalsh(expected - plain).min() > 0, "nothing is floored here"
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_the_variance_is_unbiased_for_effects_of_contents() -> None:
    sharing = all_pairs(12, 50)
    rng = np.random.default_rng(1)
    columns = np.array(sharing.contents)
    means, found = [], []
    for _ in range(3000):
        values = rng.normal(size=12)[columns].sum(axis=1) / np.sqrt(2) + 0.5 * rng.normal(size=50)
        means.append(values.mean())
        found.append(sharing.variance(values))
    assert np.mean(found) == pytest.approx(np.var(means), rel=0.09)


def test_without_effects_it_is_at_least_that_of_independent_units() -> None:
    sharing = all_pairs(20, 150)
    rng = np.random.default_rng(2)
    for _ in range(20):
        values = rng.normal(size=150)
        assert sharing.variance(values) >= values.var(ddof=1) / 150 * (1 - 1e-12)
    both = sharing.covariance(rng.normal(size=(150, 5)))
    assert np.linalg.eigvalsh(both).min() > 0


def test_disjoint_clusters_of_one_size_are_the_classical_case() -> None:
    numbers = np.repeat(np.arange(12), 5)
    sharing = Sharing(tuple((int(n),) for n in numbers))
    assert sharing.effective == pytest.approx(11)
    values = np.repeat(np.random.default_rng(3).normal(size=12), 5)
    assert sharing.variance(values) == pytest.approx(values[::5].var(ddof=1) / 12)


def test_effective_contents_tell_where_no_interval_holds() -> None:
    assert all_pairs(46, 1000).effective == pytest.approx(45, abs=1)
    one = Sharing(tuple((0,) if i < 60 else () for i in range(200)))
    assert one.effective < 3 and "below 15" in str(one.reason)
    whole = Sharing(((0,),) * 50)
    assert whole.effective == 0 and whole.reason is not None
    assert all_pairs(46, 1000).reason is None and FEWEST == 15


def test_many_contents_are_probed_as_well_as_few_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = all_pairs(60, 600).effective
    monkeypatch.setattr("nearfield.evaluation.sharing._COUNTED", 50)
    assert all_pairs(60, 600).effective == pytest.approx(exact, rel=0.2)


def test_replicates_have_the_covariance_and_lie_symmetrically() -> None:
    sharing = all_pairs(46, 1000)
    rng = np.random.default_rng(4)
    effects = rng.normal(size=(46, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    psi = effects[np.array(sharing.contents)].sum(axis=1) * 0.05 + 0.5
    drawn = sharing.replicates(psi.mean(axis=0), psi, 40_000, rng)
    scale = (sharing.effective - 2) / sharing.effective
    np.testing.assert_allclose(np.cov(drawn.T) * scale, sharing.covariance(psi), rtol=0.06)
    np.testing.assert_allclose(drawn.mean(axis=0), psi.mean(axis=0), atol=1e-12)
    interval = sharing.interval(float(psi[:, 0].mean()), psi[:, 0], 0.95)
    assert np.quantile(drawn[:, 0], 0.025) == pytest.approx(interval.low, abs=0.002)
    bounded = sharing.replicates(np.array([0.02, 0.97]), psi, 1000, rng, LOGIT)
    assert bounded.min() > 0 and bounded.max() < 1


def test_intervals_cover_and_tests_hold_where_single_units_do_not() -> None:
    sharing = all_pairs(21, 200)
    columns, rng = np.array(sharing.contents), np.random.default_rng(5)
    inside = alone = rejected = equivalent = 0
    for _ in range(400):
        values = 0.5 + (rng.normal(size=21)[columns].sum(axis=1) + rng.normal(size=200)) * 0.05
        interval = sharing.interval(float(values.mean()), values, 0.95)
        inside += interval.low <= 0.5 <= interval.high
        alone += abs(values.mean() - 0.5) <= 1.97 * values.std(ddof=1) / np.sqrt(200)
        rejected += sharing.p(float(values.mean() - 0.5), values) <= 0.05
        equivalent += sharing.equivalence_p(float(values.mean() - 0.5), values, 0.001) <= 0.05
    assert 0.91 < inside / 400 < 0.98 and alone / 400 < 0.65
    assert rejected == 400 - inside and equivalent == 0


@pytest.mark.parametrize("ties", [False, True])
def test_the_influence_of_pairs_on_spearman_is_that_of_leaving_them_out(ties: bool) -> None:
    rng = np.random.default_rng(6)
    gold = rng.normal(size=400)
    predicted = gold + rng.normal(size=400)
    if ties:
        gold, predicted = np.round(gold * 2), np.round(predicted * 2)
    got = SPEARMAN.influence(gold, predicted)
    whole = stats.spearmanr(gold, predicted)[0]
    left_out = [400 * whole - 399 * stats.spearmanr(np.delete(gold, i), np.delete(predicted, i))[0] for i in range(400)]
    assert np.corrcoef(got, left_out)[0, 1] > 0.999
    assert got.std() == pytest.approx(np.std(left_out), rel=0.02)
    assert SPEARMAN.scale(predicted) == FISHER_Z and AVERAGE_PRECISION.scale(predicted) == LOGIT
    assert not SPEARMAN.influence(np.zeros(5), np.arange(5.0)).any()


def test_contents_are_numbered_and_connected() -> None:
    assert numbered([["b", "a"], [], ["a"]]) == ((0, 1), (), (1,))
    assert Sharing(((1,), (2,), (1, 3), (), (3,))).components.tolist() == [0, 1, 0, 2, 0]
    assert all_pairs(5, 10).in_words("queries", "documents").startswith("10 queries that share 5 documents")
