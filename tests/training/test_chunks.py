"""Pools and chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.batching.plan import Batch
from nearfield.training.chunks import cut_chunks, padded_tokens, pool_batch


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2)), min_size=1, max_size=80), st.integers(16, 2000))
def test_chunks_partition_within_the_budget(texts: list[tuple[int, int]], budget: int) -> None:
    lengths, groups = np.array([t[0] for t in texts]), np.array([t[1] for t in texts])
    chunks = cut_chunks(lengths, budget, groups)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(texts)))
    for chunk in chunks:
        assert len({int(groups[i]) for i in chunk}) == 1
        assert int(lengths[chunk].max()) * len(chunk) <= budget or len(chunk) == 1
        assert lengths[chunk].tolist() == sorted(lengths[chunk].tolist(), reverse=True)
    assert padded_tokens(lengths, chunks) >= lengths.sum()
    assert padded_tokens(lengths, chunks) == sum(max(lengths[i] for i in chunk) * len(chunk) for chunk in chunks)


def test_without_groups_texts_share_chunks() -> None:
    assert len(cut_chunks(np.full(10, 5), 50)) == 1
    assert len(cut_chunks(np.full(10, 5), 50, np.arange(10) % 2)) == 2


def test_pool_holds_each_text_once() -> None:
    """Item 1 is a query with prompt 0 and a document with prompt 1; item 7 is a document of two queries."""
    zeros, ones = np.zeros(2, np.int64), np.ones(2, np.int64)
    batch = Batch(
        example=np.array([10, 11]),
        query=np.array([1, 2]),
        positives=[np.array([7]), np.array([1, 8])],
        negatives=[np.array([9, 8]), np.array([7])],
        query_prompt=zeros,
        document_prompt=ones,
        source=0,
    )
    pool = pool_batch(batch)
    pairs = list(zip(pool.items.tolist(), pool.prompts.tolist(), strict=True))
    assert sorted(pairs) == [(1, 0), (1, 1), (2, 0), (7, 1), (8, 1), (9, 1)]
    assert [pairs[i] for i in pool.queries] == [(1, 0), (2, 0)]
    assert [pairs[i] for i in pool.documents] == [(7, 1), (9, 1), (8, 1), (1, 1), (8, 1), (7, 1)]
    assert pool.owner.tolist() == [0, 0, 0, 1, 1, 1]
    assert pool.is_positive.tolist() == [True, False, False, True, True, False]


def test_longest_first_and_ties_in_their_order() -> None:
    lengths = np.array([3, 9, 3, 9, 5, 3])
    chunks = cut_chunks(lengths, 18)
    assert [chunk.tolist() for chunk in chunks] == [[1, 3], [4, 0, 2], [5]]
    assert all(chunk.dtype == np.int64 for chunk in chunks)
    assert padded_tokens(lengths, chunks) == 18 + 15 + 3
    assert cut_chunks(np.zeros(0, np.int64), 18) == []
    grouped = cut_chunks(lengths, 18, np.array([1, 0, 0, 1, 0, 0]))
    assert [chunk.tolist() for chunk in grouped] == [[1, 4], [2, 5], [3, 0]]


def test_lists_of_different_lengths_are_a_fault() -> None:
    rows = np.arange(2)
    with pytest.raises(ValueError, match="shorter"):
        pool_batch(Batch(rows, rows, [rows, rows], [rows], rows, rows, 0))
