"""Shares of data sets by optimal transport: against plans that are known, and data sets that are alike or not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nearfield.methods.sail import sinkhorn, specialised_shares, transport_similarity


def test_the_plan_has_its_margins_and_goes_to_the_cheapest_assignment() -> None:
    random = np.random.default_rng(0)
    cost = random.random((5, 5))
    even = np.full(5, 0.2)
    plan = sinkhorn(cost, even, even, 1e-3)
    np.testing.assert_allclose(plan.sum(axis=0), even, atol=2e-5)
    np.testing.assert_allclose(plan.sum(axis=1), even, atol=1e-12)
    best = min(sum(cost[i, j] for i, j in enumerate(order)) / 5 for order in itertools.permutations(range(5)))
    assert float((plan * cost).sum()) == pytest.approx(best, abs=1e-3)
    free = sinkhorn(cost, even, even, 1e6)
    np.testing.assert_allclose(free, np.outer(even, even), atol=1e-6)


def test_of_two_clusters_by_hand() -> None:
    """Masses 3/4 and 1/4 onto 1/2 and 1/2, at right angles: half stays, a quarter stays, a quarter must turn."""
    first = np.repeat(np.eye(2, dtype=np.float32), [6, 2], axis=0)
    second = np.repeat(np.eye(2, dtype=np.float32), [4, 4], axis=0)
    found = transport_similarity(first, second, clusters=2, regularisation=1e-3)
    assert found == pytest.approx(0.75, abs=1e-6)


def unit(
    around: np.ndarray[tuple[int, int], np.dtype[np.float64]], seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    made = around[np.random.default_rng(seed).integers(0, len(around), 300)]
    made = made + 0.3 * np.random.default_rng(seed + 1).normal(size=made.shape)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def test_what_is_alike_is_drawn_more_often() -> None:
    topics = np.random.default_rng(9).normal(size=(12, 16))
    goal = unit(topics[:6], 0)
    scores = {
        name: {"goal": transport_similarity(vectors, goal, clusters=8)}
        for name, vectors in {
            "same": unit(topics[:6], 2),
            "half": unit(topics[3:9], 4),
            "other": unit(topics[6:], 6),
        }.items()
    }
    assert scores["same"]["goal"] > scores["half"]["goal"] > scores["other"]["goal"]
    shares = specialised_shares(scores, 0.1)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["same"] > shares["half"] > shares["other"] > 0
    assert max(specialised_shares(scores, 1e6).values()) == pytest.approx(1 / 3, abs=1e-5)
    assert specialised_shares(scores, 1e-6)["same"] == pytest.approx(1)
