"""Pools and chunks."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.batching.plan import Batch
from nearfield.objectives.config import Reading
from nearfield.training import chunks as chunks_module
from nearfield.training.chunks import (
    BUSY,
    chunk_tokens,
    cut_chunks,
    deal_chunks,
    level_turns,
    pool_batch,
    split_batch,
    split_rows,
)

TEXTS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2)), min_size=1, max_size=80)


@given(TEXTS, st.integers(16, 2000), st.integers(1, 9), st.booleans())
def test_chunks_partition_within_the_budget(
    texts: list[tuple[int, int]], budget: int, ranks: int, padded: bool
) -> None:
    lengths, groups = np.array([t[0] for t in texts]), np.array([t[1] for t in texts])
    chunks = cut_chunks(lengths, budget, groups, padded=padded, ranks=ranks)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(texts)))
    for chunk in chunks:
        assert len({int(groups[i]) for i in chunk}) == 1
        cost = chunk_tokens(lengths, chunk, padded=padded)
        assert cost == (max(lengths[i] for i in chunk) * len(chunk) if padded else sum(int(lengths[i]) for i in chunk))
        assert cost <= budget or len(chunk) == 1
        assert lengths[chunk].tolist() == sorted(lengths[chunk].tolist(), reverse=True)
    assert len(chunks) % ranks == 0 or len(chunks) == len(texts), "fewer only where the texts are fewer"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 12), st.booleans())
def test_chunks_of_one_group_are_as_equal_as_can_be(lengths: list[int], count: int, padded: bool) -> None:
    """Against all ways to cut texts, longest first, into so many chunks: none has a smaller largest one."""
    texts = np.array(sorted(lengths, reverse=True))
    count = min(count, len(texts))
    ways = combinations(range(1, len(texts)), count - 1)
    cuts = [np.split(np.arange(len(texts)), list(way)) for way in ways]
    best = min(max(chunk_tokens(texts, chunk, padded=padded) for chunk in cut) for cut in cuts)
    edges = chunks_module._Sorted(texts, padded).equal_edges(count)
    found = [np.arange(start, stop) for start, stop in pairwise(edges)]
    assert len(found) == count
    assert max(chunk_tokens(texts, chunk, padded=padded) for chunk in found) == best


def lognormal(count: int, mean: int, spread: float, seed: int) -> np.ndarray:
    """Lengths with that mean, as texts have them."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.maximum(2, drawn.round()).astype(np.int64)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize(("count", "mean", "ranks"), [(64, 30, 8), (256, 30, 8), (256, 128, 8), (1024, 64, 32)])
def test_ranks_are_busy_with_the_default_of_gpus(count: int, mean: int, ranks: int, padded: bool) -> None:
    """At 16,384 tokens a chunk such batches fit one chunk or a few, and most ranks had nothing to do."""
    ruled_out = 0
    for seed, spread in product(range(12), (0.3, 0.5, 0.7, 1.0)):
        lengths = lognormal(count, mean, spread, seed)
        chunks = cut_chunks(lengths, 16_384, padded=padded, ranks=ranks)
        assert len(chunks) % ranks == 0
        costs = [chunk_tokens(lengths, chunk, padded=padded) for chunk in chunks]
        loads = [sum(costs[number] for number in share) for share in deal_chunks(costs, ranks)]
        if BUSY * ranks * lengths.max() > lengths.sum():
            ruled_out += 1
        else:
            assert sum(loads) / (ranks * max(loads)) >= BUSY, (seed, spread)
    assert ruled_out <= 48 * 0.2, "one long text forbids it now and then only"


def test_one_long_text_gets_a_rank_of_its_own() -> None:
    chunks = cut_chunks(np.array([500, *[10] * 60]), 16_384, ranks=4)
    assert [len(chunk) for chunk in chunks] == [1, 20, 20, 20]


def test_the_smallest_multiple_that_the_budget_allows() -> None:
    lengths = np.full(64, 30)
    assert [len(cut_chunks(lengths, 16_384, ranks=ranks)) for ranks in (1, 2, 8, 64)] == [1, 2, 8, 64]
    assert len(cut_chunks(lengths, 300, ranks=4)) == 8, "at most ten texts a chunk, so at least seven chunks"
    assert len(cut_chunks(lengths, 300)) == 7
    assert len(cut_chunks(lengths, 16_384, ranks=100)) == 64, "one text each"
    assert len(cut_chunks(lengths[:10], 30, ranks=8)) == 10, "as many as there are texts, of which 16 would be wanted"


def test_each_kind_is_cut_for_all_ranks() -> None:
    """Where all ranks must go through the same layers at once, chunks of pictures are a multiple of the ranks too."""
    kinds = np.arange(40) % 2
    chunks = cut_chunks(np.where(kinds, 16, 5), 10_000, ranks=4, kinds=kinds)
    assert [int(kinds[chunk[0]]) for chunk in chunks] == [0] * 4 + [1] * 4
    assert all(len({int(kinds[i]) for i in chunk}) == 1 for chunk in chunks)


def test_where_nothing_is_padded_more_fits() -> None:
    lengths = np.array([2, 9, 3, 4])
    assert [chunk.tolist() for chunk in cut_chunks(lengths, 18, padded=False)] == [[1, 3, 2, 0]]
    assert [chunk.tolist() for chunk in cut_chunks(lengths, 17, padded=False)] == [[1], [3, 2, 0]]
    assert [chunk.tolist() for chunk in cut_chunks(lengths, 18)] == [[1], [3, 2, 0]]


TOKENS = st.lists(st.integers(1, 200), max_size=40)


@given(TOKENS, st.integers(1, 6))
def test_every_chunk_is_dealt_once(tokens: list[int], ranks: int) -> None:
    shares = deal_chunks(tokens, ranks)
    assert len(shares) == ranks
    assert sorted(number for share in shares for number in share) == list(range(len(tokens)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(tokens[number] for number in share) for share in shares]
    if tokens:
        # Each rank was the lightest when it took its last chunk, hence no two are further apart than one chunk.
        assert max(loads) - min(loads) <= max(tokens)
        assert (min(map(len, shares)) > 0) == (len(tokens) >= ranks)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_deal_is_within_four_thirds_of_the_best(tokens: list[int], ranks: int) -> None:
    """Graham's bound for longest first (1969): 4/3 - 1/(3 ranks), against all deals there are."""
    best = min(
        max(sum(size for size, rank in zip(tokens, deal, strict=True) if rank == mine) for mine in range(ranks))
        for deal in product(range(ranks), repeat=len(tokens))
    )
    dealt = max(sum(tokens[number] for number in share) for share in deal_chunks(tokens, ranks))
    assert best <= dealt <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 2)), max_size=30), st.integers(1, 5))
def test_in_each_turn_all_ranks_go_through_a_chunk_of_one_kind(chunks: list[tuple[int, int]], ranks: int) -> None:
    tokens, kinds = [size for size, _ in chunks], [kind for _, kind in chunks]
    shares = deal_chunks(tokens, ranks, kinds)
    assert sorted(number for share in shares for number in share) == list(range(len(chunks)))
    turns = [level_turns(shares, rank, kinds) for rank in range(ranks)]
    assert len({len(each) for each in turns}) == 1
    for together in zip(*turns, strict=True):
        assert len({kinds[turn.chunk] for turn in together}) == 1 and any(turn.own for turn in together)
    for share, each in zip(shares, turns, strict=True):
        assert [turn.chunk for turn in each if turn.own] == share, "in the order of the share"
    for kind in set(kinds):
        alone = deal_chunks([size for size, other in chunks if other == kind], ranks)
        assert [sum(kinds[n] == kind for n in share) for share in shares] == [len(share) for share in alone]


def test_turns_by_hand() -> None:
    assert level_turns([[0, 2], [1]], 1) == [(1, True), (0, False)]
    assert level_turns([[], []], 0) == []
    kinds = [1, 1, 1, 0]
    shares = deal_chunks([5, 4, 3, 9], 2, kinds)
    assert shares == [[3, 0], [1, 2]]
    assert level_turns(shares, 0, kinds) == [(3, True), (0, True), (0, False)]
    assert level_turns(shares, 1, kinds) == [(3, False), (1, True), (2, True)]


def test_the_deal_by_hand() -> None:
    assert deal_chunks([5, 9, 5, 1], 2) == [[1, 3], [0, 2]]
    assert deal_chunks([4, 4, 4], 2) == [[0, 2], [1]]
    assert deal_chunks([3], 3) == [[0], [], []]
    assert deal_chunks([], 2) == [[], []]
    assert deal_chunks([7, 8, 9], 1) == [[0, 1, 2]]


@given(st.integers(0, 60), st.integers(1, 8))
def test_rows_are_split_evenly_and_in_order(count: int, ranks: int) -> None:
    parts = [split_rows(count, ranks, rank) for rank in range(ranks)]
    assert np.concatenate(parts).tolist() == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part.dtype == np.int64 for part in parts)


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
    assert [chunk_tokens(lengths, chunk) for chunk in chunks] == [18, 15, 3]
    assert cut_chunks(np.zeros(0, np.int64), 18) == []
    grouped = cut_chunks(lengths, 18, np.array([1, 0, 0, 1, 0, 0]))
    assert [chunk.tolist() for chunk in grouped] == [[1], [4, 2, 5], [3, 0]]


def test_lists_of_different_lengths_are_a_fault() -> None:
    rows = np.arange(2)
    with pytest.raises(ValueError, match="shorter"):
        pool_batch(Batch(rows, rows, [rows, rows], [rows], rows, rows, 0))


@given(st.integers(1, 9), st.integers(1, 12))
def test_parts_of_a_batch_are_the_batch(size: int, parts: int) -> None:
    rows = np.arange(size)
    singles = [rows[i : i + 1] + 20 for i in range(size)]
    batch = Batch(rows + 100, rows, singles, [s + 20 for s in singles], rows * 2, rows * 3, 7)
    found = split_batch(batch, parts)
    assert len(found) == min(parts, size)
    sizes = [len(part.query) for part in found]
    assert max(sizes) - min(sizes) <= 1
    for name in ("example", "query", "query_prompt", "document_prompt"):
        assert np.concatenate([getattr(part, name) for part in found]).tolist() == getattr(batch, name).tolist()
    for name in ("positives", "negatives"):
        lists = [row.tolist() for part in found for row in getattr(part, name)]
        assert lists == [row.tolist() for row in getattr(batch, name)]
    assert {part.source for part in found} == {7}


def repeated() -> Batch:
    """Three examples, of which the first and the last have the same query with other prompts."""
    nothing = np.zeros(0, dtype=np.int64)
    return Batch(
        np.arange(3),
        np.array([7, 5, 7]),
        [np.array([8])] * 3,
        [np.array([9]), nothing, nothing],
        np.array([1, 1, 2]),
        np.zeros(3, dtype=np.int64),
        4,
    )


def test_two_views_of_a_batch() -> None:
    """Each distinct query twice, the second as the document of its own; what else the batch has is left out."""
    pool = pool_batch(repeated(), [Reading(views=2)] * 3)
    assert pool.items.tolist() == [5, 7, 7, 5, 7, 7]
    assert pool.prompts.tolist() == [1, 1, 2, 1, 1, 2]
    assert pool.queries.tolist() == [1, 0, 2]
    assert pool.documents.tolist() == [4, 3, 5]
    assert pool.owner.tolist() == [0, 1, 2]
    assert pool.is_positive.all()
    assert pool.source == 4
    assert pool.deleted is None


def test_one_view_of_a_batch() -> None:
    pool = pool_batch(repeated(), [Reading(views=1)] * 3)
    assert list(zip(pool.items.tolist(), pool.prompts.tolist(), strict=True)) == [(5, 1), (7, 1), (7, 2)]
    assert pool.documents.tolist() == pool.queries.tolist() == [1, 0, 2]


def test_examples_that_are_read_in_ways_of_their_own() -> None:
    """The first by two views, the second with its document, the third with tokens deleted, apart from whole texts."""
    pool = pool_batch(repeated(), [Reading(views=2), Reading(), Reading(deleted=0.5)])
    assert pool.deleted is not None
    encoded = list(zip(pool.items.tolist(), pool.prompts.tolist(), pool.deleted.tolist(), strict=True))
    assert [encoded[i] for i in pool.queries] == [(7, 1, 0.0), (5, 1, 0.0), (7, 2, 0.5)]
    assert [encoded[i] for i in pool.documents] == [(7, 1, 0.0), (8, 0, 0.0), (8, 0, 0.5)]
    assert pool.documents[0] != pool.queries[0]
    assert (pool.owner.tolist(), pool.is_positive.tolist()) == ([0, 1, 2], [True] * 3)
    assert len(encoded) == 6
