"""Spherical k-means against Lloyd's iterations in float64, and what must hold for any vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.errors import BadInputError
from nearfield.mining import approximate
from nearfield.mining.approximate import assign, cluster_sums, spherical_kmeans

Vectors = npt.NDArray[np.float32]


def unit(vectors: npt.NDArray[np.floating]) -> Vectors:
    scaled: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def random_vectors(count: int, dimensions: int, seed: int = 0) -> Vectors:
    return unit(np.random.default_rng(seed).standard_normal((count, dimensions)))


def planted(groups: int, members: int, dimensions: int, noise: float, seed: int = 0) -> tuple[Vectors, npt.NDArray]:
    random = np.random.default_rng(seed)
    centres = unit(random.standard_normal((groups, dimensions)))
    labels = random.permutation(np.repeat(np.arange(groups), members))
    vectors = centres[labels] + noise * random.standard_normal((len(labels), dimensions)) / np.sqrt(dimensions)
    return unit(vectors), labels


def same_grouping(first: npt.NDArray, second: npt.NDArray) -> bool:
    """Whether two labellings differ in the names of the labels alone."""
    pairs = {(int(a), int(b)) for a, b in zip(first, second, strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed: int) -> None:
    vectors, labels = planted(12, 40, 32, noise=0.3, seed=seed)
    assert same_grouping(spherical_kmeans(vectors, 12, seed=seed).labels, labels)


def test_planted_clusters_are_found_from_a_sample_of_a_file(tmp_path: Path) -> None:
    vectors, labels = planted(12, 100, 32, noise=0.3)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    result = spherical_kmeans(mapped, 12, seed=0, sample=240)
    assert same_grouping(result.labels, labels)
    assert result.sizes.tolist() == [100] * 12


@pytest.mark.parametrize("block", [1 << 10, 1 << 14, 64 << 20])
def test_assignment_is_that_of_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_BLOCK_BYTES", block)
    vectors, centroids = random_vectors(3000, 16), random_vectors(37, 16, seed=1)
    labels, similarities = assign(vectors, centroids)
    scores = vectors.astype(np.float64) @ centroids.astype(np.float64).T
    np.testing.assert_array_equal(labels, scores.argmax(axis=1))
    np.testing.assert_allclose(similarities, scores.max(axis=1), atol=1e-12)


def test_equal_centroids_are_told_apart_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_PAIRS", 100)
    centroids = np.repeat(random_vectors(5, 24), 3, axis=0)
    labels, _ = assign(random_vectors(500, 24, seed=2), centroids)
    assert set((labels % 3).tolist()) == {0}


def test_what_float32_cannot_tell_apart_float64_decides() -> None:
    vector = random_vectors(1, 64)
    nearer = vector.copy()
    nearer[0, 0] = np.nextafter(nearer[0, 0], np.float32(np.sign(nearer[0, 0]) * 2))
    assert assign(vector, np.concatenate([vector, nearer]))[0].tolist() == [1]


def test_iterations_are_lloyds() -> None:
    """One more iteration is one more step of the plain algorithm in float64."""
    vectors = random_vectors(400, 8)
    before = spherical_kmeans(vectors, 7, seed=3, iterations=4)
    after = spherical_kmeans(vectors, 7, seed=3, iterations=5)
    means = np.stack([vectors[before.labels == c].astype(np.float64).sum(axis=0) for c in range(7)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(after.centroids, means, atol=1e-6)
    np.testing.assert_array_equal(after.labels, (vectors @ means.T).argmax(axis=1))
    assert after.objective[-1] == pytest.approx((vectors @ means.T).max(axis=1).mean(), abs=1e-6)
    assert len(after.objective) == 6


def test_it_ends_where_nothing_moves() -> None:
    vectors, _ = planted(4, 30, 16, noise=0.2)
    result = spherical_kmeans(vectors, 4, seed=0, iterations=100)
    assert len(result.objective) < 20
    again = spherical_kmeans(vectors, 4, seed=0, iterations=1000)
    np.testing.assert_array_equal(again.centroids, result.centroids)


@settings(max_examples=40)
@given(
    count=st.integers(1, 120),
    clusters=st.integers(1, 12),
    distinct=st.integers(1, 40),
    dimensions=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_what_holds_for_any_vectors(count: int, clusters: int, distinct: int, dimensions: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = unit(random.standard_normal((distinct, dimensions)) + 1e-3)[random.integers(distinct, size=count)]
    clusters = min(clusters, count)
    result = spherical_kmeans(vectors, clusters, seed=seed)
    # The tolerance is the rounding of centroids to float32.
    assert (np.diff(result.objective) > -1e-7).all()
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(np.bincount(result.labels, minlength=clusters), result.sizes)
    assert result.labels.dtype == np.int32 and result.sizes.dtype == np.int64 and result.centroids.dtype == np.float32
    np.testing.assert_array_equal(assign(vectors, result.centroids)[0], result.labels)


def test_the_objective_never_falls_on_hard_data() -> None:
    for seed in range(5):
        result = spherical_kmeans(random_vectors(2000, 24, seed), 50, seed=seed, iterations=30)
        assert (np.diff(result.objective) > -1e-7).all()
        assert result.objective[-1] > result.objective[0] + 0.05


def test_no_cluster_is_empty_where_vectors_differ() -> None:
    """A crowd and a few far away: a start inside the crowd would leave clusters without members."""
    random = np.random.default_rng(0)
    crowd = unit(np.array([1.0, 0, 0, 0]) + 1e-4 * random.standard_normal((500, 4)))
    vectors = np.concatenate([crowd, random_vectors(30, 4)])
    for seed in range(5):
        assert spherical_kmeans(vectors, 25, seed=seed).sizes.min() >= 1


def test_an_empty_cluster_takes_the_worst_fitting_vector() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2], dtype=np.int32)
    similarities = np.array([0.9, 0.2, 0.5, 0.1, 0.3, 0.8])
    approximate._fill_empty(labels, similarities, 5)
    # Row 3 fits worst, but is the last of its cluster.
    assert labels.tolist() == [0, 3, 0, 1, 4, 2]


def test_fewer_distinct_vectors_than_clusters() -> None:
    vectors = np.repeat(random_vectors(3, 8), 20, axis=0)
    result = spherical_kmeans(vectors, 6, seed=0)
    assert np.count_nonzero(result.sizes) == 3
    assert result.objective[-1] == pytest.approx(1, abs=1e-6)


def test_members_that_cancel_out_keep_their_centroid() -> None:
    vectors = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    result = spherical_kmeans(vectors, 1, seed=0)
    assert np.linalg.norm(result.centroids) == pytest.approx(1)


def test_one_cluster_is_the_mean_direction() -> None:
    vectors = random_vectors(200, 5)
    mean = vectors.astype(np.float64).sum(axis=0)
    result = spherical_kmeans(vectors, 1, seed=0)
    np.testing.assert_allclose(result.centroids[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_function_of_the_seed() -> None:
    vectors = random_vectors(500, 12)
    first, second = (spherical_kmeans(vectors, 20, seed=5, sample=300) for _ in range(2))
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert not same_grouping(first.labels, spherical_kmeans(vectors, 20, seed=6, sample=300).labels)


def test_the_number_of_threads_does_not_matter() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    vectors = random_vectors(3000, 48)
    results = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads):
            results.append(spherical_kmeans(vectors, 60, seed=0))
    np.testing.assert_array_equal(results[0].labels, results[1].labels)
    np.testing.assert_array_equal(results[0].centroids, results[1].centroids)


def test_sums_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = random_vectors(1000, 8), np.random.default_rng(0).integers(0, 5, 1000).astype(np.int32)
    monkeypatch.setattr(approximate, "_BLOCK_BYTES", 1)
    expected = np.stack([vectors[labels == c].astype(np.float64).sum(axis=0) for c in range(6)])
    np.testing.assert_allclose(cluster_sums(vectors, labels, 6), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("vectors", "clusters", "words"),
    [
        (random_vectors(3, 4), 4, "cannot make 4 clusters"),
        (random_vectors(3, 4), 0, "cannot make 0 clusters"),
        (2 * random_vectors(3, 4), 2, "row 0 of the vectors has length 2"),
        (np.full((3, 4), np.nan, np.float32), 2, "row 0 of the vectors has length nan"),
        (np.zeros((3, 4)), 2, "float64"),
    ],
)
def test_bad_input(vectors: Vectors, clusters: int, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        spherical_kmeans(vectors, clusters, seed=0)


def test_no_iterations_are_bad_input() -> None:
    with pytest.raises(BadInputError, match="at least one iteration"):
        spherical_kmeans(random_vectors(3, 4), 2, seed=0, iterations=0)
