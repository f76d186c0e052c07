"""The planner's promises, for any data."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.batching import SingleSourceConfig
from nearfield.batching.planner import SourceExamples
from nearfield.batching.single_source import choose


def make_source(number: int, count: int, items: int, seed: int) -> SourceExamples:
    random = np.random.default_rng(seed)
    positives = [random.integers(0, items, size=random.integers(1, 4)) for _ in range(count)]
    negatives = [random.integers(0, items, size=random.integers(0, 4)) for _ in range(count)]
    queries = random.integers(0, items, size=count)
    return SourceExamples(number, f"source{number}", np.arange(count) + 1000 * number, queries, positives, negatives)


sources = st.lists(
    st.tuples(st.integers(1, 60), st.integers(5, 400), st.integers(0, 10**6)), min_size=1, max_size=3
).map(lambda shapes: [make_source(number, *shape) for number, shape in enumerate(shapes)])


@given(
    sources=sources, size=st.integers(2, 9), drop_last=st.booleans(), seed=st.integers(0, 100), epoch=st.integers(0, 3)
)
@settings(max_examples=80, deadline=None)
def test_promises(sources: list[SourceExamples], size: int, drop_last: bool, seed: int, epoch: int) -> None:
    config = SingleSourceConfig(batch_size=size, drop_last=drop_last, positives=2, negatives=1)
    plan = config.build().plan(sources, seed, epoch)
    placed: Counter[int] = Counter()
    for batch in plan.batches:
        assert len({row.source for row in batch}) == 1
        items = [item for row in batch for item in row.items()]
        assert len(items) == len(set(items)), "an item stands twice in a batch"
        assert len(batch) == size if drop_last else 2 <= len(batch) <= size
        for row in batch:
            source = sources[row.source]
            index = row.example - 1000 * row.source
            placed[row.example] += 1
            assert row.query == source.queries[index]
            assert set(row.positives.tolist()) <= set(source.positives[index].tolist())
            assert set(row.negatives.tolist()) <= set(source.negatives[index].tolist())
            assert len(row.positives) == min(2, len(source.positives[index]))
            assert len(row.negatives) == min(1, len(source.negatives[index]))
    assert all(count == 1 for count in placed.values())
    assert len(placed) + sum(plan.dropped.values()) == sum(len(source.examples) for source in sources)
    again = config.build().plan(sources, seed, epoch)
    assert [[row.items() for row in batch] for batch in again.batches] == [
        [row.items() for row in batch] for batch in plan.batches
    ]


def test_epochs_and_seeds_differ() -> None:
    source = make_source(0, 64, 10_000, 3)
    planner = SingleSourceConfig(batch_size=8).build()
    orders = {
        tuple(row.example for batch in planner.plan([source], seed, epoch).batches for row in batch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_duplicates_can_be_allowed() -> None:
    same = np.zeros(1, dtype=np.int64)
    source = SourceExamples(0, "same", np.arange(8), np.full(8, 5), [same] * 8, [same[:0]] * 8)
    assert not SingleSourceConfig(batch_size=4).build().plan([source], 0, 0).batches
    allowed = SingleSourceConfig(batch_size=4, duplicates="allow").build().plan([source], 0, 0)
    assert [len(batch) for batch in allowed.batches] == [4, 4]
    forbidden = SingleSourceConfig(batch_size=4).build().plan([source], 0, 0)
    assert forbidden.dropped == {"in a batch that did not fill": 8}


def test_sources_are_mixed_in_proportion() -> None:
    sources = [make_source(0, 300, 10**6, 1), make_source(1, 100, 10**6, 2)]
    plan = SingleSourceConfig(batch_size=4).build().plan(sources, 0, 0)
    order = [batch[0].source for batch in plan.batches]
    first_half = order[: len(order) // 2].count(1) / (len(order) // 2)
    assert 0.1 < first_half < 0.4


def test_choose_is_uniform() -> None:
    random = np.random.default_rng(0)
    counts = Counter(int(item) for _ in range(6000) for item in choose(np.arange(6), 2, random))
    assert all(count == pytest.approx(2000, rel=0.1) for count in counts.values())
