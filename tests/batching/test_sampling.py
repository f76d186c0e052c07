"""How often each source comes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nearfield.batching import ShuffledConfig, SingleSourceConfig
from nearfield.batching.config import (
    ProportionalSampling,
    RoundRobinSampling,
    SharesSampling,
    SourceSampling,
    TemperatureSampling,
)
from nearfield.batching.planner import EpochBatches, order_batches, targets
from nearfield.errors import BadInputError
from tests.batching.making import make_apart


def test_targets_by_hand() -> None:
    names = ["a", "b", "c"]
    assert targets(ProportionalSampling(), names, [100, 25, 4]) == [100, 25, 4]
    assert targets(TemperatureSampling(alpha=1), names, [100, 25, 4]) == [100, 25, 4]
    # Square roots are 10 : 5 : 2, and c has 4 batches: the epoch is twice that.
    assert targets(TemperatureSampling(alpha=0.5), names, [100, 25, 4]) == [20, 10, 4]
    assert targets(TemperatureSampling(alpha=0), names, [100, 25, 4]) == [4, 4, 4]
    assert targets(RoundRobinSampling(), names, [100, 25, 4]) == [4, 4, 4]
    shares = SharesSampling(shares={"a": 3, "b": 1, "c": 0.5})
    assert targets(shares, names, [100, 25, 4]) == [24, 8, 4]
    # Repeating keeps the length of the epoch: 129 batches.
    assert targets(RoundRobinSampling(exhausted="repeat"), names, [100, 25, 4]) == [43, 43, 43]
    repeat = TemperatureSampling(alpha=0.5, exhausted="repeat")
    assert targets(repeat, names, [100, 25, 4]) == [76, 38, 15]
    assert targets(RoundRobinSampling(), names, [100, 0, 4]) == [4, 0, 4]
    assert targets(RoundRobinSampling(), names, [0, 0, 0]) == [0, 0, 0]


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    alpha=st.floats(0, 1),
    exhausted=st.sampled_from(["stop", "repeat"]),
)
@settings(max_examples=100, deadline=None)
def test_targets_are_possible(sizes: list[int], alpha: float, exhausted: str) -> None:
    config = TemperatureSampling.model_validate({"alpha": alpha, "exhausted": exhausted})
    names = [str(number) for number in range(len(sizes))]
    found = targets(config, names, sizes)
    if exhausted == "repeat":
        assert sum(found) == sum(sizes)
        assert all(count == 0 for count, size in zip(found, sizes, strict=True) if size == 0)
    else:
        assert all(count <= size for count, size in zip(found, sizes, strict=True))
        # One of them is used up.
        assert not any(sizes) or any(count == size > 0 for count, size in zip(found, sizes, strict=True))


def test_shares_must_name_the_sources() -> None:
    with pytest.raises(BadInputError, match="'d', which is no source or pool"):
        targets(SharesSampling(shares={"a": 1, "d": 1}), ["a"], [3])
    with pytest.raises(BadInputError, match="b has no share"):
        targets(SharesSampling(shares={"a": 1}), ["a", "b"], [3, 3])


def test_round_robin_takes_turns() -> None:
    order = order_batches(RoundRobinSampling(), [3, 2, 3], 2, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(10))
    stream = np.repeat([0, 1, 2, 3], [3, 2, 3, 2])[order]
    assert stream[stream < 3].tolist() == [0, 1, 2, 0, 1, 2, 0, 2]
    assert order_batches(RoundRobinSampling(), [], 0, np.random.default_rng(0)).tolist() == []


def sources_of(epoch: EpochBatches) -> list[int]:
    return [int(source) for source in epoch.rows.source[epoch.offsets[:-1]]]


SAMPLINGS: list[SourceSampling] = [
    TemperatureSampling(alpha=0.5),
    RoundRobinSampling(),
    SharesSampling(shares={"source0": 1, "source1": 3}),
    TemperatureSampling(alpha=0.5, exhausted="repeat"),
    RoundRobinSampling(exhausted="repeat"),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.kind}-{s.exhausted}")
def test_batches_come_as_asked_and_the_rest_is_counted(sampling: SourceSampling) -> None:
    sources = [make_apart(0, 162), make_apart(1, 18)]
    epoch = SingleSourceConfig(batch_size=2, sampling=sampling).build().plan(sources, 0, 0)
    assert Counter(sources_of(epoch)) == Counter(dict(enumerate(targets(sampling, ["source0", "source1"], [81, 9]))))
    placed = Counter(epoch.rows.example.tolist())
    repeated = sum(count - 1 for count in placed.values())
    assert repeated == epoch.details["repeated"]
    assert (repeated > 0) == (sampling.kind != "proportional" and sampling.exhausted == "repeat")
    assert len(placed) + sum(epoch.dropped.values()) == 180
    if isinstance(sampling, RoundRobinSampling):
        order = sources_of(epoch)
        assert order == [0, 1] * (len(order) // 2)


def test_what_an_epoch_leaves_another_takes() -> None:
    sources = [make_apart(0, 40), make_apart(1, 10)]
    planner = SingleSourceConfig(batch_size=2, sampling=RoundRobinSampling()).build()
    seen = {row for epoch in range(60) for row in planner.plan(sources, 0, epoch).rows.example.tolist()}
    assert len(seen) == 50


def test_shuffled_batches_count_examples() -> None:
    sources = [make_apart(0, 160), make_apart(1, 40)]
    epoch = ShuffledConfig(batch_size=4, sampling=TemperatureSampling(alpha=0.5)).build().plan(sources, 0, 0)
    assert np.bincount(epoch.rows.source).tolist() == [80, 40]
    assert epoch.dropped == {"not reached by the sampling of sources": 80}
    again = ShuffledConfig(batch_size=4, sampling=RoundRobinSampling(exhausted="repeat")).build().plan(sources, 0, 0)
    assert np.bincount(again.rows.source).tolist() == [100, 100]
    assert again.details["repeated"] == 60
    for batch in range(len(again)):
        assert len(set(again.batch(batch).example.tolist())) == 4


def test_a_pool_is_sampled_as_one() -> None:
    sources = [make_apart(0, 40), make_apart(1, 40), make_apart(2, 80)]
    sampling = SharesSampling(shares={"both": 1, "source2": 1})
    config = SingleSourceConfig(batch_size=4, pools={"both": ("source0", "source1")}, sampling=sampling)
    epoch = config.build().plan(sources, 0, 0)
    kinds = Counter(frozenset(epoch.batch(number).source.tolist()) for number in range(len(epoch)))
    assert kinds[frozenset([2])] == 20
    assert sum(count for kind, count in kinds.items() if kind <= {0, 1}) == 20
    assert kinds[frozenset([0, 1])] > 10


def test_runs_of_one_source_make_a_batch() -> None:
    sources = [make_apart(0, 70), make_apart(1, 41), make_apart(2, 9)]
    epoch = ShuffledConfig(batch_size=16, run=4).build().plan(sources, 0, 0)
    assert epoch.sizes.tolist() == [16] * 7
    runs = epoch.rows.source.reshape(7, 4, 4)
    assert (runs == runs[:, :, :1]).all()
    assert all(len(set(batch[:, 0].tolist())) > 1 for batch in runs), "and batches mix them"
    assert Counter(runs[:, :, 0].ravel().tolist()).total() == 28
    one, plain = (ShuffledConfig(batch_size=16, **more).build().plan(sources, 0, 0) for more in ({"run": 1}, {}))
    assert one.rows.example.tolist() == plain.rows.example.tolist()
    other = ShuffledConfig(batch_size=16, run=4).build().plan(sources, 0, 1)
    assert other.rows.example.tolist() != epoch.rows.example.tolist(), "anew each epoch"
    with pytest.raises(ValidationError, match="no multiple of run 5"):
        ShuffledConfig(batch_size=16, run=5)


class LastTwice(SourceSampling):
    """A sampling of another package: the last source counts twice."""

    last: str

    @property
    def exponent(self) -> float | None:
        return 0.0

    @property
    def weights(self) -> dict[str, float]:
        return {"source0": 1.0, "source1": 1.0, self.last: 2.0}


def test_a_sampling_of_another_package() -> None:
    sources = [make_apart(number, 60) for number in range(3)]
    config = SingleSourceConfig.model_validate({"batch_size": 4, "sampling": LastTwice(last="source2")})
    epoch = config.build().plan(sources, 0, 0)
    # Of 15 batches each: the last source's are all there, and half as many of the others.
    assert np.bincount(epoch.rows.source[epoch.offsets[:-1]]).tolist() == [7, 7, 15]
