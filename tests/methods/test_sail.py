"""Batches of whole samples: each source is a pattern of them, and sources never meet in the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.arrays import Ragged
from nearfield.batching.planner import EpochBatches
from nearfield.batching.streams import SourceExamples
from nearfield.errors import BadInputError
from nearfield.methods.sail import PatternsConfig
from tests.batching.making import batches_of, known_of, make_source


def with_samples(source: SourceExamples, samples: list[int]) -> SourceExamples:
    return replace(source, samples=np.array(samples, dtype=np.int64))


def of_each_source(epoch: EpochBatches, source: SourceExamples) -> list[list[int]]:
    """For each batch the places in the source of its examples."""
    base = int(source.examples[0]) if len(source) else 0
    inside = {int(example) for example in source.examples}
    return [[example - base for example in batch if example in inside] for batch in batches_of(epoch)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.booleans())
def test_samples_stay_whole_and_nothing_clashes_within_a_source(seed: int, size: int, drop_last: bool) -> None:
    random = np.random.default_rng(seed)
    sources = [
        with_samples(make_source(number, count, 60, seed + number), random.integers(0, 25, count).tolist())
        for number, count in enumerate((20, 14, 25))
    ]
    config = PatternsConfig(batch_size=size, negatives=1, drop_last=drop_last)
    known = known_of(sources)
    epoch = config.build().plan(sources, 3, 0, known=known)
    assert batches_of(epoch) == batches_of(config.build().plan(sources, 3, 0, known=known))
    placed = [example for batch in batches_of(epoch) for example in batch]
    assert len(set(placed)) == len(placed)
    assert len(placed) + sum(epoch.dropped.values()) == sum(map(len, sources))
    shunned = {
        query: set(known.values[known.offsets[query] : known.offsets[query + 1]].tolist())
        for query in range(len(known.offsets) - 1)
    }
    for number in range(len(epoch)):
        rows = epoch.batch(number)
        assert rows.source.tolist() == sorted(rows.source.tolist())
        members: set[tuple[int, int]] = set()
        for source in sources:
            mine = np.flatnonzero(rows.source == source.source)
            assert source.samples is not None
            samples = source.samples[rows.example[mine] - source.examples[0]].tolist()
            members |= {(sample, samples[:place].count(sample)) for place, sample in enumerate(samples)}
            items = [rows.items()[row].tolist() for row in mine]
            everything = [item for row in items for item in row]
            assert len(set(everything)) == len(everything), "no item twice in a source's part"
            for row, held in zip(mine.tolist(), items, strict=True):
                others = {item for other in items if other is not held for item in other}
                assert not others & (shunned.get(int(rows.query[row]), set()) - set(held))
        assert len(members) <= size
        if drop_last:
            assert len(members) == size or len({sample for sample, _ in members}) <= size


def test_a_sample_without_a_pattern_is_in_the_batch_with_the_others() -> None:
    def source(number: int, samples: list[int]) -> SourceExamples:
        count = len(samples)
        query = 100 * np.array(samples)
        return SourceExamples(
            number, f"s{number}", np.arange(count) + 1000 * number, query, Ragged.single(query + 1 + number), Ragged.empty(count),
            samples=np.array(samples),
        )  # fmt: skip

    # The queries of both are the same items: allowed, as the two are not contrasted with each other.
    sources = [source(0, [0, 1, 2, 3, 4, 5]), source(1, [5, 3, 1])]
    epoch = PatternsConfig(batch_size=2).build().plan(sources, 0, 0, known=known_of(sources))
    assert len(epoch) == 3 and epoch.details["patterns"] == {"1": 3, "2": 3} and epoch.details["samples"] == 6
    first, second = of_each_source(epoch, sources[0]), of_each_source(epoch, sources[1])
    for left, right in zip(first, second, strict=True):
        assert len(left) == 2
        assert sorted({1: 2, 3: 1, 5: 0}[sample] for sample in left if sample % 2) == sorted(right)
    orders = {
        tuple(map(tuple, batches_of(PatternsConfig(batch_size=2).build().plan(sources, 0, epoch))))
        for epoch in range(5)
    }
    assert len(orders) > 1, "drawn anew each epoch"


def test_what_cannot_be_said_of_samples() -> None:
    with pytest.raises(BadInputError, match="which examples are of one sample"):
        PatternsConfig(batch_size=2).build().plan([make_source(0, 8, 60, 0)], 0, 0)
    with pytest.raises(ValueError, match="neither 'sampling' nor 'pools'"):
        PatternsConfig.model_validate({"sampling": {"kind": "round_robin"}})
