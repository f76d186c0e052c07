"""Borda as mteb counts it, and sets of ranks that hold for all models at once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nearfield.evaluation import ranking


def test_borda_of_three_models_and_two_tasks() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.8], [0.7, 0.9]])
    assert ranking.borda(scores).tolist() == [2, 2, 2]
    assert ranking.places(ranking.borda(scores)).tolist() == [1, 1, 1]
    assert ranking.borda(scores[:2]).tolist() == [1, 1]
    assert ranking.borda(np.array([[0.5], [0.5]])).tolist() == [0.5, 0.5]


def test_a_missing_score_earns_no_points() -> None:
    scores = np.array([[0.9, np.nan], [0.8, 0.8], [0.7, 0.9]])
    assert ranking.borda(scores).tolist() == [2, 2, 2]
    assert np.isnan(ranking.task_ranks(scores)[0, 1])


def test_ranks_equal_scipy_also_in_stacks() -> None:
    scores = np.random.default_rng(0).integers(0, 4, size=(5, 6, 3)).astype(float)
    expected = np.stack([np.stack([stats.rankdata(-s[:, t]) for t in range(3)], axis=1) for s in scores])
    np.testing.assert_allclose(ranking.task_ranks(scores), expected)
    assert ranking.borda(scores).shape == (5, 6)


def test_rank_sets_separate_what_is_far_apart_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    estimates = np.array([0.9, 0.52, 0.5, 0.1])
    draws = estimates + 0.02 * rng.normal(size=(2000, 4))
    sets = ranking.rank_sets(estimates, draws)
    assert sets.low.tolist() == [1, 2, 2, 4] and sets.high.tolist() == [1, 3, 3, 4]
    assert sets.above[0].tolist() == [False, True, True, True]


def test_not_separable_is_not_transitive() -> None:
    estimates = np.array([0.60, 0.55, 0.50])
    draws = estimates + 0.025 * np.random.default_rng(2).normal(size=(4000, 3))
    sets = ranking.rank_sets(estimates, draws)
    assert sets.above.tolist() == [[False, False, True], [False, False, False], [False, False, False]]
    assert sets.low.tolist() == [1, 1, 2] and sets.high.tolist() == [2, 3, 3]


def test_pairs_without_spread_are_not_separated_and_one_model_has_rank_one() -> None:
    sets = ranking.rank_sets(np.array([0.6, 0.5]), np.tile([0.6, 0.5], (100, 1)))
    assert sets.low.tolist() == [1, 1] and sets.high.tolist() == [2, 2]
    alone = ranking.rank_sets(np.array([0.6]), np.zeros((100, 1)))
    assert alone.low.tolist() == alone.high.tolist() == [1]


def test_all_true_ranks_are_inside_as_often_as_promised() -> None:
    rng = np.random.default_rng(3)
    true = np.array([0.6, 0.55, 0.55, 0.5])
    best, worst = np.array([1, 2, 2, 4]), np.array([1, 3, 3, 4])
    held = 0
    for _ in range(300):
        estimates = true + 0.02 * rng.normal(size=4)
        sets = ranking.rank_sets(estimates, estimates + 0.02 * rng.normal(size=(500, 4)))
        held += bool(((sets.low <= best) & (sets.high >= worst)).all())
    assert held / 300 > 0.92


@pytest.mark.parametrize("level", [0.8, 0.99])
def test_a_higher_level_gives_wider_sets(level: float) -> None:
    rng = np.random.default_rng(4)
    estimates = np.linspace(0.5, 0.6, 6)
    draws = estimates + 0.02 * rng.normal(size=(2000, 6))
    plain, other = ranking.rank_sets(estimates, draws, 0.95), ranking.rank_sets(estimates, draws, level)
    wider, narrower = (other, plain) if level > 0.95 else (plain, other)
    assert ((wider.high - wider.low) >= (narrower.high - narrower.low)).all()
