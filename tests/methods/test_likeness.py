"""Likeness of models, thresholds and associations: exact values of the definitions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nearfield.methods import likeness as lk
from nearfield.methods.association import weat


def test_cka_sees_through_rotation_shift_and_scale_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 16)) * np.arange(1, 17)
    turned = 3 * x @ np.asarray(stats.ortho_group.rvs(16, random_state=0)) + 5
    assert lk.cka(x, turned) == pytest.approx(1)
    assert lk.cka(rng.normal(size=(2000, 16)), rng.normal(size=(2000, 16))) == pytest.approx(0.008, abs=0.004)


def test_cka_of_few_texts_is_too_large_and_warns() -> None:
    rng = np.random.default_rng(1)
    with pytest.warns(UserWarning, match="too large for so few texts"):
        assert lk.cka(rng.normal(size=(20, 200)), rng.normal(size=(20, 200))) > 0.7


def test_jaccard_and_rank_similarity() -> None:
    assert lk.jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert lk.rank_similarity([1, 2, 3], [1, 2, 3]) == pytest.approx(1)
    assert lk.rank_similarity([1, 2, 3], [2, 1, 3]) == pytest.approx(6 / 11)
    assert lk.rank_similarity([1, 2, 3], [4, 5, 6]) == 0
    points = np.random.default_rng(2).normal(size=(50, 8))
    assert lk.neighbour_likeness(points, 2 * points, 5) == (1.0, pytest.approx(1.0))


def test_procrustes_finds_a_rotation_and_no_relation_where_there_is_none() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 16))
    y = x @ np.asarray(stats.ortho_group.rvs(16, random_state=1))
    assert lk.paired_audit(x, y, 16) == 1.0
    assert lk.paired_audit(x, rng.normal(size=(400, 16)), 16) < 0.02


def test_compatibility_of_versions() -> None:
    assert lk.compatibility(np.array([[0.8, 0.0], [0.7, 0.9]])) == (0.0, pytest.approx(0.8))
    assert lk.compatibility(np.full((3, 3), 0.6)) == (1.0, pytest.approx(0.6))


def test_weat_of_orthogonal_one_hots_is_exact() -> None:
    x, y = np.eye(8)[:4], np.eye(8)[4:]
    found = weat(x, y, x, y)
    assert found.exact and found.p == pytest.approx(1 / 70) and 0 < found.effect <= 2


def test_weat_turns_with_its_sides_and_guards_nothing() -> None:
    rng = np.random.default_rng(6)
    x, y, a, b = (rng.normal(size=(n, 10)) for n in (5, 5, 6, 7))
    base = weat(x, y, a, b)
    assert weat(y, x, a, b).effect == pytest.approx(-base.effect)
    assert weat(x, y, b, a).effect == pytest.approx(-base.effect)
    nothing = weat(x, y, a, a)
    assert nothing.degenerate and nothing.effect == 0 and nothing.p == 1
    assert weat(np.concatenate([x, x]), y, a, b).dropped == 5
    sampled = weat(x, y, a, b, partitions=200)
    assert not sampled.exact and sampled.p == pytest.approx(base.p, abs=0.12)
