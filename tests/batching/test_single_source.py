"""Single-source batches: what holds beside the promises of all planners."""

from __future__ import annotations

import numpy as np
import pytest

from nearfield.arrays import Ragged
from nearfield.batching import SingleSourceConfig
from nearfield.batching.config import RoundRobinSampling
from nearfield.batching.streams import SourceExamples
from nearfield.provenance import derive_seed, generator
from tests.batching.making import make_apart, make_source


def test_epochs_seeds_and_pools_of_negatives_differ() -> None:
    source = make_source(0, 64, 10_000, 3)
    planner = SingleSourceConfig(batch_size=8).build()
    orders = {
        tuple(planner.plan([source], seed, epoch, generation=generation).rows.example.tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
        for generation in (0, 1)
    }
    assert len(orders) == 8


def test_duplicates_can_be_allowed() -> None:
    source = SourceExamples(
        0, "same", np.arange(8), np.full(8, 5), Ragged.single(np.zeros(8, dtype=np.int64)), Ragged.empty(8)
    )
    assert not len(SingleSourceConfig(batch_size=4).build().plan([source], 0, 0))
    allowed = SingleSourceConfig(batch_size=4, duplicates="allow").build().plan([source], 0, 0)
    assert allowed.sizes.tolist() == [4, 4]
    forbidden = SingleSourceConfig(batch_size=4).build().plan([source], 0, 0)
    assert forbidden.dropped == {"in a batch that did not fill": 8}


def test_sources_are_mixed_in_proportion() -> None:
    sources = [make_apart(0, 300), make_apart(1, 100)]
    plan = SingleSourceConfig(batch_size=4).build().plan(sources, 0, 0)
    order = plan.rows.source[plan.offsets[:-1]]
    assert (order == 0).sum() == 75 and (order == 1).sum() == 25
    first_half = order[: len(order) // 2].tolist().count(1) / (len(order) // 2)
    assert 0.1 < first_half < 0.4


def test_no_name_of_a_source_makes_two_random_streams_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of batches, say, has a stream of its own, whatever sources are called."""
    used: list[int] = []

    def noting(seed: int, *names: str | int) -> np.random.Generator:
        used.append(derive_seed(seed, *names))
        return generator(seed, *names)

    monkeypatch.setattr("nearfield.batching.planner.generator", noting)
    sources = [make_apart(number, 40) for number in range(5)]
    for source, name in zip(sources, ("order", "order of batches", "rows", "draw", "chosen"), strict=True):
        object.__setattr__(source, "name", name)
    config = SingleSourceConfig(batch_size=4, sampling=RoundRobinSampling(exhausted="repeat"), homogeneous=0.5)
    for epoch in (0, 1):
        for generation in (0, 1):
            config.build().plan(sources, 0, epoch, generation=generation)
    # Batches that mix the streams draw the same rows' items by the same names: of these each is used twice.
    assert len(used) > 50
    assert max(used.count(one) for one in set(used)) <= 2
    pure = used.copy()
    used.clear()
    SingleSourceConfig(batch_size=4).build().plan(sources, 0, 0)
    assert len(used) == len(set(used)) and len(pure) > len(used)
