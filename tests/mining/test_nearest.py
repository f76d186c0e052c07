"""Nearest documents against a brute-force ranking in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.arrays import Ragged
from nearfield.errors import BadInputError
from nearfield.mining import approximate
from nearfield.mining.approximate import nearest, recall, top_columns

from .test_kmeans import planted, random_vectors

Vectors = npt.NDArray[np.float32]


def brute_force(queries: Vectors, documents: Vectors, k: int, hidden: list[set[int]] | None = None) -> npt.NDArray:
    rows = np.full((len(queries), k), -1)
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    for i in range(len(queries)):
        allowed = [j for j in range(len(documents)) if hidden is None or j not in hidden[i]]
        best = sorted(allowed, key=lambda j: (-np.float32(scores[i, j]), j))[:k]
        rows[i, : len(best)] = best
    return rows


def as_excluded(hidden: list[set[int]]) -> Ragged:
    return Ragged.from_lists([sorted(rows) for rows in hidden])


def random_hidden(queries: int, documents: int, most: int, seed: int = 0) -> list[set[int]]:
    random = np.random.default_rng(seed)
    return [set(random.integers(0, documents, random.integers(0, most + 1)).tolist()) for _ in range(queries)]


@pytest.mark.parametrize("k", [1, 7, 60, 80])
def test_exact_is_brute_force(k: int) -> None:
    queries, documents = random_vectors(50, 12), random_vectors(70, 12, seed=1)
    found = nearest(queries, documents, k, method="exact", seed=0)
    np.testing.assert_array_equal(found.rows, brute_force(queries, documents, k))
    assert found.rows.dtype == np.int32 and found.scores.dtype == np.float32
    assert found.recall is None
    real = found.rows >= 0
    expected = np.einsum("nkd,nd->nk", documents[found.rows].astype(np.float64), queries.astype(np.float64))
    np.testing.assert_allclose(found.scores[real], expected[real], atol=1e-6)
    assert (found.scores[~real] == -np.inf).all()


@settings(max_examples=40)
@given(
    queries=st.integers(1, 30),
    documents=st.integers(1, 40),
    k=st.integers(1, 45),
    most=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_all_cells_and_exact_are_brute_force_without_what_is_excluded(
    method: approximate.Method, queries: int, documents: int, k: int, most: int, seed: int
) -> None:
    """With so few cells as here all are searched: the inverted file must find the very same."""
    q, d = random_vectors(queries, 6, seed), random_vectors(documents, 6, seed + 1)
    hidden = random_hidden(queries, documents, most, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate, "_FEWEST_PROBES", 100)
        patch.setattr(approximate, "_MOST_OF_CELLS", 1)
        found = nearest(q, d, k, method=method, seed=seed, excluded=as_excluded(hidden))
    np.testing.assert_array_equal(found.rows, brute_force(q, d, k, hidden))
    assert found.recall == (None if method == "exact" else 1.0)


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_equal_scores_by_the_lowest_row(method: approximate.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_FEWEST_PROBES", 100)
    monkeypatch.setattr(approximate, "_MOST_OF_CELLS", 1)
    documents = np.repeat(random_vectors(6, 16), 10, axis=0)[np.random.default_rng(0).permutation(60)]
    queries = random_vectors(9, 16, seed=1)
    found = nearest(queries, documents, 15, method=method, seed=0)
    np.testing.assert_array_equal(found.rows, brute_force(queries, documents, 15))


def test_top_columns() -> None:
    scores = np.array([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]], dtype=np.float32)
    columns, values = top_columns(scores, 2)
    assert columns.tolist() == [[1, 2], [0, 1], [0, 1]]
    assert values.tolist() == [[3, 3], [0, 0], [5, 4]]
    assert top_columns(scores, 9)[0].tolist() == [[1, 2, 4, 3, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("memory", [1, 1 << 11, 1 << 14, 1 << 30])
def test_memory_does_not_change_the_cells_result(memory: int) -> None:
    queries, documents = random_vectors(300, 16), random_vectors(400, 16, seed=1)
    hidden = random_hidden(300, 400, 30)
    arguments = (np.arange(300), documents, np.arange(0, 400, 2), 10, as_excluded(hidden), memory)
    found = approximate._search(queries, *arguments)[0]
    halves = [{row // 2 for row in rows if row % 2 == 0} for rows in hidden]
    np.testing.assert_array_equal(found, 2 * brute_force(queries, documents[::2], 10, halves))


def test_the_recall_is_that_of_the_result() -> None:
    vectors, _ = planted(40, 50, 32, noise=1.0)
    queries, documents = vectors[::2], vectors[1::2]
    found = nearest(queries, documents, 60, method="ivf", seed=0, recall_sample=len(queries))
    truth = brute_force(queries, documents, 60)
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found.rows, truth, strict=True)]
    assert found.recall_all == pytest.approx(sum(hits) / truth.size)
    assert found.recall == pytest.approx(
        np.mean(
            [
                len(set(a) & set(b)) / 30
                for a, b in zip(found.rows[:, :30].tolist(), truth[:, :30].tolist(), strict=True)
            ]
        )
    )
    assert found.cells == 64
    assert found.recall is not None and found.recall >= 0.9


def test_probes_are_added_until_the_recall_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors without any structure are the hardest: a few cells hold few of the approximate."""
    monkeypatch.setattr(approximate, "_FEWEST_PROBES", 1)
    queries, documents = random_vectors(1000, 24), random_vectors(2000, 24, seed=1)
    monkeypatch.setattr(approximate, "_MOST_OF_CELLS", 0.2)
    everything = nearest(queries, documents, 30, method="ivf", seed=0, recall_sample=300)
    assert everything.probes == everything.cells and everything.recall == 1
    np.testing.assert_array_equal(everything.rows, nearest(queries, documents, 30, method="exact", seed=0).rows)
    monkeypatch.setattr(approximate, "_MOST_OF_CELLS", 1)
    hard = nearest(queries, documents, 30, method="ivf", seed=0, recall_sample=300)
    vectors, _ = planted(50, 60, 24, noise=0.2)
    easy = nearest(vectors[::3], vectors, 30, method="ivf", seed=0, recall_sample=300)
    assert hard.probes is not None and easy.probes is not None
    assert hard.recall is not None and hard.recall >= 0.9
    assert easy.recall is not None and easy.recall >= 0.9
    assert hard.probes > 4 * easy.probes
    monkeypatch.setattr(approximate, "WANTED_RECALL", 0.5)
    less = nearest(queries, documents, 30, method="ivf", seed=0, recall_sample=300)
    assert less.probes is not None and less.probes < hard.probes
    assert less.recall is not None and 0.45 < less.recall < 0.75


def test_the_number_of_probes_is_the_fewest_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_FEWEST_PROBES", 1)
    truth = np.array([[0, 1, -1], [2, 3, -1]], dtype=np.int32)
    document_cells = np.array([0, 1, 1, 0], dtype=np.int32)
    # Query 0 finds its documents in its 1st and 2nd cell, query 1 in its 2nd and 3rd.
    order = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.int32)
    assert approximate._choose_probes(truth, document_cells, order) == 3
    monkeypatch.setattr(approximate, "WANTED_RECALL", 0.7)
    assert approximate._choose_probes(truth, document_cells, order) == 2


def test_recall_counts_only_what_is_there() -> None:
    truth = np.array([[3, 4, -1], [1, -1, -1]], dtype=np.int32)
    assert recall(np.array([[4, 9, -1], [-1, -1, -1]], dtype=np.int32), truth) == pytest.approx(1 / 3)
    assert recall(truth[:, ::-1], truth) == 1
    assert recall(truth[:0], truth[:0]) == 1


def test_a_file_of_vectors_and_the_same_seed_give_the_same(tmp_path: Path) -> None:
    vectors, _ = planted(20, 50, 16, noise=0.8)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    first = nearest(vectors, vectors, 20, method="ivf", seed=4)
    second = nearest(mapped, mapped, 20, method="ivf", seed=4)
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert (first.recall, first.probes) == (second.recall, second.probes)


def test_nothing_to_search() -> None:
    some, none = random_vectors(3, 4), np.empty((0, 4), dtype=np.float32)
    for method in ("exact", "ivf"):
        assert (nearest(some, none, 2, method=method, seed=0).rows == -1).all()
        assert nearest(none, some, 2, method=method, seed=0).rows.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "documents", "k", "excluded", "words"),
    [
        (random_vectors(3, 4), random_vectors(3, 5), 1, None, "4 dimensions, documents 5"),
        (random_vectors(3, 4), random_vectors(3, 4), 0, None, "at least 1"),
        (random_vectors(3, 4), 3 * random_vectors(3, 4), 1, None, "row 0 of the documents has length 3"),
        (
            random_vectors(3, 4),
            random_vectors(3, 4),
            1,
            as_excluded([set()]),
            "1 lists of excluded documents for 3 queries",
        ),
    ],
)
def test_bad_input(queries: Vectors, documents: Vectors, k: int, excluded: Ragged | None, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        nearest(queries, documents, k, method="exact", seed=0, excluded=excluded)
