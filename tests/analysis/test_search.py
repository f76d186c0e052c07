"""Thresholds, accuracies, versions, duplicates, length and the plane: plain references and known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nearfield.analysis.geometry import length_bias, near_duplicates, plane
from nearfield.analysis.search import (
    Questions,
    best_f1_cut,
    bootstrap_share,
    f1_threshold,
    overlap,
    precision_cut,
    precision_threshold,
    recall_threshold,
    searched,
    similarities,
)
from nearfield.methods.likeness import versions


def _questions(seed: int, noise: float, count: int = 200, d: int = 16) -> Questions:
    rng = np.random.default_rng(seed)
    documents = rng.normal(size=(2 * count, d))
    return Questions(
        documents[:count] + noise * rng.normal(size=(count, d)), documents, tuple((i,) for i in range(count))
    )


def test_a_bootstrapped_share_is_as_wide_as_theory_says_and_covers() -> None:
    rng = np.random.default_rng(0)
    outcomes = (np.arange(1000) < 700).astype(float)
    low, high = bootstrap_share(outcomes, 2_000, rng)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 1000), abs=0.006)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_share((rng.random(1000) < 0.7).astype(float), 2_000, rng)
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 200 <= 0.98


def test_similarities_equal_a_plain_loop() -> None:
    of = _questions(1, 1.5, count=30)
    right, near, random, ranks = similarities(of, np.random.default_rng(0))
    for i, rows in enumerate(of.right):
        cosines = [
            float(of.questions[i] @ v / np.linalg.norm(of.questions[i]) / np.linalg.norm(v)) for v in of.documents
        ]
        assert right[i] == pytest.approx(cosines[rows[0]])
        assert near[i] == pytest.approx(sorted(cosines, reverse=True)[:10])
        assert ranks[i] == 1 + sum(c > cosines[rows[0]] for c in cosines)
        assert min(abs(random[i] - c) for c in cosines) < 1e-12 and abs(random[i] - cosines[rows[0]]) > 1e-12


def test_better_vectors_have_less_overlap_and_equal_documents_are_no_hit() -> None:
    good, poor = searched(_questions(2, 0.3)), searched(_questions(2, 3.0))
    assert good.accuracy[0].value == 1.0 and poor.accuracy[0].value < 0.5
    assert good.overlaps["right, random"] < 0.1 < poor.overlaps["right, random"]
    assert good.recall.recall == pytest.approx(0.95, abs=0.01) and good.precision is not None
    assert good.precision.precision >= 0.95 and sum(good.counts["right"]) == pytest.approx(1)
    assert [one.k for one in poor.accuracy] == [1, 5, 10]
    flat = Questions(np.ones((20, 4)), np.ones((30, 4)), tuple((i,) for i in range(20)))
    assert searched(flat, samples=20).accuracy[2].value == 0.0


def test_alignment_is_over_all_pairs_of_a_question_and_a_right_document() -> None:
    of = Questions(np.eye(20), np.vstack([np.eye(20), -np.eye(20)]), ((0, 20), *((i,) for i in range(1, 20))))
    assert searched(of, samples=20).alignment == pytest.approx(4 / 21)


def test_precision_cuts() -> None:
    assert precision_cut(np.array([3.0, 2.0, 0.5]), np.array([1.0, 0.0]), 1.0) == 2.0
    assert precision_cut(np.array([3.0, 2.0, 0.5]), np.array([1.0, 0.0]), 0.75) == 0.5
    assert precision_cut(np.array([0.0]), np.array([1.0]), 0.9) is None
    rng = np.random.default_rng(3)
    right, wrong = rng.normal(2, 1, 500), rng.normal(0, 1, 500)
    found = precision_threshold(right, wrong, 0.95, 200, rng)
    assert found is not None and found.low <= found.cut <= found.high and found.precision >= 0.95
    lower = found.cut - 1e-9
    below = max(value for value in np.concatenate([right, wrong]) if value < lower)
    assert (right >= below).sum() / ((right >= below).sum() + (wrong >= below).sum()) < 0.95
    assert precision_threshold(np.zeros(3), np.ones(3), 0.9) is None


def test_versions_that_are_one_model_are_compatible_and_a_turned_one_is_not() -> None:
    old = _questions(4, 0.3)
    turn = np.asarray(stats.ortho_group.rvs(16, random_state=0))
    new = Questions(old.questions @ turn, old.documents @ turn, old.right)
    same = versions({"a": old, "b": old})
    assert same.kept == 1 and same.matrix[1][0] == 1.0
    made = versions({"old": old, "new": new, "wide": Questions(np.ones((200, 3)), np.ones((400, 3)), old.right)})
    assert made.matrix[1][0] is not None and made.matrix[1][0] < 0.2 and made.matrix[1][1] == 1.0
    assert made.matrix[2][0] is None and made.kept is None
    found = dict(made.audits["old -> new"])
    assert found[32] == 1.0 and found[4] < found[32]


def test_near_duplicates_in_vectors_but_not_in_words() -> None:
    vectors = np.eye(6)[[0, 0, 1, 1, 2, 3]]
    texts = ["a red fox", "a red fox runs", "one two", "three four", "alone", "apart"]
    found = near_duplicates(vectors, texts)
    assert found.texts == 4 and found.unlike == 2 and set(found.example or ()) == {"one two", "three four"}


def test_length_bias_is_found_where_it_is_put() -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, 60, 300)
    plain = rng.normal(size=(300, 12))
    biased = plain.copy()
    biased[:, 0] += lengths
    assert length_bias(plain, lengths.tolist(), permutations=99).p > 0.05
    found = length_bias(biased, lengths.tolist(), permutations=99)
    assert found.p == 0.01 and found.neighbours > 0.8 and found.cosine > 0.5
    assert length_bias(plain, [7] * 300, permutations=9).neighbours == 0.0


def test_the_plane_keeps_what_lies_in_a_plane() -> None:
    rng = np.random.default_rng(6)
    flat = rng.normal(size=(100, 2)) * [5, 2]
    turned = flat @ np.asarray(stats.ortho_group.rvs(9, random_state=1))[:2]
    made = plane(turned)
    assert sum(made.shares) == pytest.approx(1) and made.shares[0] > made.shares[1]
    far = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    assert np.linalg.norm(made.points[:, None] - made.points[None], axis=2) == pytest.approx(far)
    assert plane(rng.normal(size=(5, 1))).points.shape == (5, 2)


def test_overlap_of_samples() -> None:
    rng = np.random.default_rng(4)
    a = rng.normal(size=100_000)
    assert overlap(a, a) == pytest.approx(1)
    assert overlap(a, a + 100) == 0
    assert overlap(a, rng.normal(2, 1, size=100_000)) == pytest.approx(0.317, abs=0.01)


def test_thresholds_with_their_intervals() -> None:
    rng = np.random.default_rng(5)
    right, wrong = rng.normal(2, 1, 2000), rng.normal(0, 1, 4000)
    found = recall_threshold(right, wrong, 0.95, 500)
    assert found.cut == pytest.approx(2 - 1.645, abs=0.15) and found.low < found.cut < found.high
    assert found.recall == pytest.approx(0.95, abs=1e-3)
    best = f1_threshold(right, wrong, 100)
    cuts = np.concatenate([right, wrong])[::20]

    def f1(cut: float) -> float:
        hits, alarms = (right >= cut).sum(), (wrong >= cut).sum()
        return float(2 * hits / (hits + alarms + len(right)))

    assert f1(best.cut) >= max(map(f1, cuts)) - 1e-12 and best.low <= best.cut <= best.high
    assert best_f1_cut(np.array([3.0, 2.0]), np.array([1.0])) == 2.0
