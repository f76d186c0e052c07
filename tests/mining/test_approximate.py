"""IVF, HNSW and searches from outside: what they find is scored and ordered as the exact search does; the recall is the true one."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from nearfield.arrays import Ragged
from nearfield.errors import BadInputError
from nearfield.mining.approximate import approximate_search, measure_recall
from nearfield.mining.config import ApproximateSearch, HNSWSearch, IVFSearch, MiningConfig
from nearfield.mining.search import ArrayDocuments, Neighbours, search
from nearfield.mining.teachers import DenseScorer, Searching
from tests.mining import reference


def vectors(seed: int, rows: int, dimension: int = 16) -> Any:
    random = np.random.default_rng(seed)
    found = random.standard_normal((rows, dimension)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("config", [IVFSearch(lists=8, probes=8), HNSWSearch(width=2_000)], ids=lambda c: c.kind)
def test_a_search_that_looks_everywhere_is_the_exact_one(config: Any) -> None:
    queries, documents = vectors(0, 20), vectors(1, 400)
    excluded = Ragged.from_lists([[i, i + 1] for i in range(20)])
    found, recall = approximate_search(queries, documents, 30, config, excluded=excluded)
    exact = search(queries, documents, 30, excluded=excluded)
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_array_equal(found.scores, exact.scores)
    assert (recall.value, recall.queries, recall.depth) == (1.0, 20, 30)


@pytest.mark.parametrize("config", [IVFSearch(lists=40, probes=2), HNSWSearch(links=2, build_width=8, width=8)])
def test_the_recall_is_that_of_the_sample(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    queries, documents = vectors(2, 50), vectors(3, 2_000)
    with caplog.at_level(logging.INFO, "nearfield.mining"):
        found, recall = approximate_search(queries, documents, 10, config)
    rows, _ = reference.best(queries, documents, 10)
    true = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), found.rows.tolist(), strict=True)])
    assert recall.value == pytest.approx(true) and 0 < true < 1
    assert f"{100 * recall.value:.1f}% of the true best 10" in caplog.text
    owner, place = np.nonzero(found.rows >= 0)
    scores = reference.all_scores(queries, documents)[owner, found.rows[owner, place]]
    np.testing.assert_array_equal(found.scores[owner, place], scores)
    again, _ = approximate_search(queries, documents, 10, config)
    np.testing.assert_array_equal(again.rows, found.rows)


class FirstHalf(ApproximateSearch):
    """A search of another package: the first half of the documents is compared, the others are never found."""

    def build(self, documents: Any, seed: int) -> Any:
        return Half(documents[: len(documents) // 2])


class Half:
    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        order = np.argsort(-(queries @ self.documents.T), axis=1)[:, :k]
        return None, np.pad(order, ((0, 0), (0, k - order.shape[1])), constant_values=-1)


def test_a_search_of_another_package() -> None:
    """It finds documents of its own; their scores, their order and the recall are ours."""
    queries, documents = vectors(6, 30), vectors(7, 200)
    settings = MiningConfig.model_validate({"search": FirstHalf(sample=30)})
    assert settings.search.kind == f"{__name__}:FirstHalf" and not settings.search.exact
    scorer = DenseScorer(queries, ArrayDocuments(documents), Searching(settings.search))
    nearest = scorer.search(10, Ragged.empty(30))
    expected = search(queries, documents[:100], 10)
    np.testing.assert_array_equal(nearest.rows, expected.rows)
    np.testing.assert_array_equal(nearest.scores, expected.scores)
    true = search(queries, documents, 10)
    assert scorer.recall is not None and scorer.recall.value == pytest.approx((true.rows < 100).mean())


def test_recall_counts_only_what_there_is() -> None:
    queries, documents = vectors(4, 3), vectors(5, 4)
    found = Neighbours(np.array([[0, 1, 2, 3, -1]] * 3), np.zeros((3, 5), np.float32))
    assert measure_recall(found, queries, documents, 3).value == 1.0


def test_bad_input() -> None:
    with pytest.raises(BadInputError, match="dimensions"):
        approximate_search(vectors(0, 2, 4), vectors(0, 2, 5), 1, IVFSearch())
