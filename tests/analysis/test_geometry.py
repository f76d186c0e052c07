"""Geometry against its exact values: Gaussians on some axes, cubes in many dimensions, brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from nearfield.analysis import geometry as g


def rotation(size: int, seed: int = 0) -> np.ndarray:
    return np.asarray(stats.ortho_group.rvs(size, random_state=seed))


def test_iso_score_of_points_on_some_axes() -> None:
    rng = np.random.default_rng(0)
    points = np.zeros((20_000, 32))
    points[:, :8] = rng.normal(size=(20_000, 8))
    assert g.iso_score(points) == pytest.approx(7 / 31, abs=2e-3)
    assert g.iso_score(points[:, :8]) == pytest.approx(1, abs=5e-3)
    line = np.zeros((100, 5))
    line[:, 0] = rng.normal(size=100)
    assert g.iso_score(line) == pytest.approx(0, abs=1e-9)
    turned = points @ rotation(32)
    assert g.iso_score(turned) == pytest.approx(g.iso_score(points), abs=1e-9)
    assert g.iso_score(7 * points + 3) == pytest.approx(g.iso_score(points), abs=1e-9)


def test_intrinsic_dimension_of_a_cube_in_many_dimensions() -> None:
    rng = np.random.default_rng(1)
    cube = np.zeros((4000, 100))
    cube[:, :5] = rng.random((4000, 5))
    cube = cube @ rotation(100)
    found = g.two_nn(cube)
    assert 4.2 < found < 5.3
    part = cube[:1200]
    turned = 3 * part @ rotation(100, 1)
    assert g.two_nn(turned) == pytest.approx(g.two_nn(part), rel=1e-6)
    assert g.two_nn(np.concatenate([part, part])) == pytest.approx(g.two_nn(part), rel=1e-9)
    angles = g.abid(part, 50)
    assert 4.0 < angles < 4.9
    assert g.abid(turned, 50) == pytest.approx(angles, rel=1e-6)


def test_abid_equals_a_plain_loop() -> None:
    points = np.random.default_rng(2).normal(size=(60, 6))
    found = []
    for i, point in enumerate(points):
        order = [j for j in np.argsort(np.linalg.norm(points - point, axis=1)) if j != i][:10]
        directions = [(points[j] - point) / np.linalg.norm(points[j] - point) for j in order]
        found.append(1 / np.mean([(u @ v) ** 2 for u in directions for v in directions]))
    assert g.abid(points, 10) == pytest.approx(np.mean(found))


def test_nearest_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "_BLOCK", 7)
    points = np.random.default_rng(3).normal(size=(40, 5))
    distance, near = g.nearest(points, points, 6, itself=True)
    full = cdist(points, points)
    np.fill_diagonal(full, np.inf)
    assert near.tolist() == np.argsort(full, axis=1)[:, :6].tolist()
    np.testing.assert_allclose(distance, np.sort(full, axis=1)[:, :6])


def test_effective_rank_and_spectrum() -> None:
    rng = np.random.default_rng(4)
    points = np.zeros((5000, 10))
    points[:, :4] = rng.normal(size=(5000, 4))
    assert g.effective_rank(points) == pytest.approx(4, abs=0.01)
    assert g.spectrum(points) == pytest.approx(np.sort(np.linalg.eigvalsh(np.cov(points.T)))[::-1], abs=1e-9)
    assert g.effective_rank(np.outer(rng.normal(size=50), np.ones(3))) == pytest.approx(1, abs=1e-6)


def test_average_cosine_and_partition_ratio() -> None:
    points = np.random.default_rng(5).normal(size=(30, 4)) + 1
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert g.average_cosine(points) == pytest.approx(cosines[~np.eye(30, dtype=bool)].mean())
    assert g.average_cosine(np.ones((9, 3))) == pytest.approx(1)
    even = np.concatenate([np.eye(4), -np.eye(4)])
    assert g.partition_ratio(even) == pytest.approx(1)
    assert g.partition_ratio(even * [3, 1, 1, 1]) < 0.5


def test_hubness_counts_neighbours() -> None:
    points = np.random.default_rng(6).normal(size=(80, 20))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    counts = np.bincount(np.argsort(-cosines, axis=1)[:, :5].ravel(), minlength=80)
    found = g.hubness(points, 5)
    assert found.skewness == pytest.approx(stats.skew(counts)) and found.largest == counts.max()
    assert found.orphans == pytest.approx((counts == 0).mean())


def test_alignment_and_uniformity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "_BLOCK", 11)
    points = g.normalised(np.random.default_rng(7).normal(size=(40, 6)))
    assert g.alignment(points, 2 * points) == pytest.approx(0)
    assert g.alignment(points, -points) == pytest.approx(4)
    squares = cdist(points, points, "sqeuclidean")[~np.eye(40, dtype=bool)]
    assert g.uniformity(points) == pytest.approx(np.log(np.exp(-2 * squares).mean()))
    assert g.uniformity(np.ones((5, 3))) == pytest.approx(0)
