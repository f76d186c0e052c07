"""Complexity of texts and rankability of embeddings, by their exact values and synthetic studies."""

from __future__ import annotations

import numpy as np
import pytest

from nearfield.methods.matched_suites import by_thirds, dependency_distance, entropy, fog, syllables
from nearfield.methods.rankability import extremes_axis, rankability, ridge_axis


def test_measures_of_text() -> None:
    assert fog("The cat sat.") == pytest.approx(1.2)
    assert fog("") == 0.0
    assert syllables("cat") == 1 and syllables("table") == 2 and syllables("beautiful") == 3 and syllables("home") == 1
    assert fog("A beautiful cat sat. It ran.") == pytest.approx(0.4 * (6 / 2 + 100 / 6))
    assert entropy([str(i % 8) for i in range(800)]) == pytest.approx(3)
    assert entropy([]) == 0.0
    assert dependency_distance([1, 2, None]) == 1.0


@pytest.mark.parametrize("cause", ["complexity", "domain"])
def test_thirds_tell_complexity_from_domain(cause: str) -> None:
    rng = np.random.default_rng(0)
    names = [f"d{i}" for i in range(600)]
    complexity = {name: float(i // 200) for i, name in enumerate(names)}
    domain = [name for name in names if rng.random() < 0.2 + 0.3 * complexity[name]]
    scores = {
        name: 0.7 - 0.1 * (complexity[name] if cause == "complexity" else name in set(domain)) + 0.01 * rng.normal()
        for name in names
    }
    general = [name for name in names if name not in set(domain)]
    plain = np.mean([scores[name] for name in domain]) - np.mean([scores[name] for name in general])
    thirds = by_thirds(complexity, scores, domain)
    assert plain < -0.04
    assert [third.gap for third in thirds] == pytest.approx([0.0 if cause == "complexity" else -0.1] * 3, abs=0.006)
    assert sum(third.general + third.domain for third in thirds) == 600


def test_a_third_without_one_side_has_no_gap() -> None:
    thirds = by_thirds({"a": 1, "b": 2, "c": 3}, {"a": 0.5, "b": 0.6, "c": 0.7}, ["a"])
    assert [third.gap for third in thirds] == [None] * 3 and thirds[0].domain_score == 0.5


@pytest.mark.parametrize("size", [16, 512])
def test_few_items_give_an_axis_that_orders_the_rest(size: int) -> None:
    rng = np.random.default_rng(size)
    direction = rng.normal(size=size)
    direction /= np.linalg.norm(direction)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        values = rng.normal(size=count)
        return values[:, None] * direction + 0.1 * rng.normal(size=(count, size)), values

    x, y = draw(20)
    held, truth = draw(2000)
    assert rankability(ridge_axis(x, y), held, truth) > 0.98
    many, values = draw(1000)
    axis = extremes_axis(many, values)
    assert rankability(axis, held, truth) > 0.98
    assert np.array_equal(axis, extremes_axis(many, np.exp(3 * values)))
    assert abs(rankability(ridge_axis(x, y), held, rng.permutation(truth))) < 3 / np.sqrt(2000) + 1e-9
