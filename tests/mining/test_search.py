"""The exact search against a full sort, whatever the blocks; its bound; streams; the approximate searches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.arrays import Ragged
from nearfield.errors import BadInputError
from nearfield.mining import search as search_module
from nearfield.mining.search import ArrayDocuments, SearchPlan, StreamedDocuments, pair_scores, plan_search, search
from tests.mining import reference


def plan_of(queries: int, query_block: int, document_block: int, depth: int, slack: int, spare: int) -> SearchPlan:
    kept = depth + slack
    return SearchPlan(queries, query_block, document_block, kept, kept + spare, 1, 0)


def unit(random: np.random.Generator, rows: int, dimension: int) -> Any:
    vectors = random.standard_normal((rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@st.composite
def problems(draw: st.DrawFn) -> Any:
    seed = draw(st.integers(0, 2**20))
    random = np.random.default_rng(seed)
    n, m, d = draw(st.integers(1, 9)), draw(st.integers(1, 300)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        queries, documents = unit(random, n, d), unit(random, m, d)
    else:
        # Few values: most scores are tied, and whole blocks are.
        queries, documents = (random.integers(-1, 2, (rows, d)).astype(np.float32) for rows in (n, m))
    excluded = [set(random.integers(0, m, random.integers(0, min(m, 6) + 1)).tolist()) for _ in range(n)]
    depth = draw(st.integers(1, 70))
    plan = plan_of(
        draw(st.integers(1, n)), draw(st.integers(1, n)), draw(st.integers(8, 200)), depth,
        draw(st.integers(0, 3)), draw(st.integers(1, 80)),
    )  # fmt: skip
    return queries, documents, depth, excluded, plan, draw(st.booleans())


@settings(max_examples=50)
@given(problems())
def test_search_equals_a_full_sort_whatever_the_blocks(problem: Any) -> None:
    queries, documents, depth, excluded, plan, streamed = problem
    source = StreamedDocuments(lambda: np.array_split(documents, 3)) if streamed else documents
    found = search(queries, source, depth, excluded=Ragged.from_lists(map(sorted, excluded)), plan=plan)
    rows, scores = reference.best(queries, documents, depth, excluded)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, scores)
    left = [min(depth, len(documents) - len(hidden)) for hidden in excluded]
    np.testing.assert_array_equal(found.counts(), left)


def test_equal_documents_are_found_in_the_order_of_their_rows() -> None:
    random = np.random.default_rng(0)
    queries = unit(random, 5, 384)
    documents = np.repeat(unit(random, 40, 384), 100, axis=0)
    for blocks in ((5, 64), (2, 1000), (1, 4000)):
        found = search(queries, documents, 250, plan=plan_of(5, *blocks, 250, 16, 64))
        rows, scores = reference.best(queries, documents, 250)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_array_equal(found.scores, scores)


def test_nearly_equal_scores_are_told_apart_as_float64_would() -> None:
    """Documents whose scores differ by less than a product in float32 errs."""
    random = np.random.default_rng(1)
    base = unit(random, 1, 384)
    documents = (base + random.standard_normal((3000, 384)) * 1e-6).astype(np.float32)
    found = search(base, documents, 50, plan=plan_of(1, 1, 128, 50, 2, 30))
    np.testing.assert_array_equal(found.rows, reference.best(base, documents, 50)[0])


def test_long_and_short_vectors_together() -> None:
    random = np.random.default_rng(2)
    documents = (unit(random, 2000, 48) * np.exp(random.normal(0, 4, (2000, 1)))).astype(np.float32)
    queries = (unit(random, 20, 48) * np.exp(random.normal(0, 4, (20, 1)))).astype(np.float32)
    found = search(queries, documents, 10)
    np.testing.assert_array_equal(found.rows, reference.best(queries, documents, 10)[0])


def test_memory_threads_and_maps_change_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    queries, documents = unit(random, 2100, 64), unit(random, 3000, 64)
    once = search(queries, documents, 30)
    np.save(tmp_path / "documents.npy", documents)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for source, memory in ((mapped, 6 << 20), (ArrayDocuments(mapped), 1 << 30)):
            again = search(queries, source, 30, memory=memory)
            np.testing.assert_array_equal(again.rows, once.rows)
            np.testing.assert_array_equal(again.scores, once.scores)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("count", "depth", "streamed"), [(100_000, 13, False), (100_000, 100, False), (5_000, 50, True)]
)
def test_the_bound_is_kept_by_the_plan(count: int, depth: int, streamed: bool) -> None:
    plan = plan_search(count, 384, depth, 1 << 30, "cpu", streamed)
    assert plan.bytes <= 1 << 30
    small = plan_search(count, 384, depth, count * depth * 12 + (40 << 20), "cpu", streamed)
    assert small.bytes <= count * depth * 12 + (40 << 20)
    assert small.passes * small.queries >= count
    assert small.passes > 1


def test_the_bound_is_said_first(caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.eye(4, dtype=np.float32)
    with caplog.at_level(logging.INFO, "nearfield.mining"):
        search(vectors, vectors, 2)
    assert "at most" in caplog.messages[0] and "MiB beside the vectors" in caplog.messages[0]


def test_less_precise_products_are_put_back_afterwards() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        random = np.random.default_rng(4)
        queries, documents = unit(random, 10, 256), unit(random, 500, 256)
        found = search(queries, documents, 20)
        np.testing.assert_array_equal(found.rows, reference.best(queries, documents, 20)[0])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_queries_and_no_documents() -> None:
    vectors = np.eye(3, dtype=np.float32)
    assert search(vectors[:0], vectors, 2).rows.shape == (0, 2)
    found = search(vectors, vectors[:0], 2)
    assert (found.rows == -1).all() and np.isneginf(found.scores).all()


@pytest.mark.parametrize(
    ("queries", "documents", "depth", "memory", "words"),
    [
        (np.ones((2, 3)), np.ones((2, 3), np.float32), 1, 1 << 30, "float32"),
        (np.ones((2, 3), np.float32), np.ones((2, 4), np.float32), 1, 1 << 30, "4 dimensions"),
        (np.full((2, 3), np.nan, np.float32), np.ones((2, 3), np.float32), 1, 1 << 30, "row 0 of the queries"),
        (np.ones((2, 3), np.float32), np.array([[1, 1, 1], [1, np.inf, 1]], np.float32), 1, 1 << 30, "row 1 of the doc"),
        (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), 0, 1 << 30, "at least 1"),
        (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), 5, 100, "needs at least"),
    ],
)  # fmt: skip
def test_bad_input(queries: Any, documents: Any, depth: int, memory: int, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        search(queries, documents, depth, memory=memory)


def test_pair_scores_do_not_depend_on_their_order() -> None:
    random = np.random.default_rng(5)
    queries, documents = unit(random, 30, 384), unit(random, 700, 384)
    q, d = random.integers(0, 30, 2000), random.integers(0, 700, 2000)
    order = random.permutation(2000)
    scores = pair_scores(queries, documents, q, d)
    np.testing.assert_array_equal(pair_scores(queries, documents, q[order], d[order]), scores[order])
    np.testing.assert_array_equal(scores, reference.all_scores(queries, documents)[q, d])
    streamed = StreamedDocuments(lambda: np.array_split(documents, 7)).pairs(queries, q, d)
    np.testing.assert_array_equal(streamed, scores)


def test_buffers_are_cut_and_ties_go_to_exact_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three ways into a buffer are all taken in the tests above: counted here, so that none becomes dead."""
    taken = {"block": 0, "insert": 0, "exact": 0}
    walk = search_module._Walk

    def counting(name: str, key: str) -> None:
        original = getattr(walk, name)

        def called(self: Any, *args: Any) -> Any:
            taken[key] += 1
            return original(self, *args)

        monkeypatch.setattr(walk, name, called)

    counting("_take_block", "block")
    counting("_insert", "insert")
    pairs = ArrayDocuments.pairs

    def counted(self: ArrayDocuments, *args: Any) -> Any:
        taken["exact"] += 1
        return pairs(self, *args)

    monkeypatch.setattr(ArrayDocuments, "pairs", counted)
    random = np.random.default_rng(6)
    documents = np.concatenate([unit(random, 500, 32), np.repeat(unit(random, 1, 32), 300, axis=0)])
    queries = np.concatenate([unit(random, 3, 32), documents[-1:]])
    found = search(queries, documents, 10, plan=plan_of(4, 4, 64, 10, 2, 8))
    np.testing.assert_array_equal(found.rows, reference.best(queries, documents, 10)[0])
    assert taken["block"] and taken["insert"] and taken["exact"] > 1
