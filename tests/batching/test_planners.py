"""The promises that every planner keeps, for any data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from nearfield.batching import (
    BatchConfig,
    CommunitiesConfig,
    KMeansStrataConfig,
    MixedConfig,
    MixedPart,
    ShuffledConfig,
    SingleSourceConfig,
    StreamPlanner,
)
from nearfield.batching.groups import CommunityPlanner, KMeansStrataPlanner, merge_small
from nearfield.batching.plan import count_exceptions
from nearfield.batching.planner import EpochBatches, MixedPlanner
from nearfield.batching.streams import SourceExamples
from nearfield.errors import BadInputError
from tests.batching.making import batches_of, items_of, known_of, make_apart, make_source, make_vectors

VECTORS = make_vectors()
ANY: TypeAdapter[Any] = TypeAdapter(BatchConfig)


@dataclass
class FakeClusters:
    labels: npt.NDArray[np.int32]
    centroids: npt.NDArray[np.float32]


def fake_clusters(vectors: npt.NDArray[np.float32], clusters: int, **_: Any) -> FakeClusters:
    """A row's cluster is its place in turn."""
    labels = np.arange(len(vectors), dtype=np.int32) % clusters
    return FakeClusters(labels, np.stack([vectors[labels == c].mean(axis=0) for c in range(clusters)]))


@dataclass
class FakeCommunities:
    groups: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    neighbours: npt.NDArray[np.int32]
    first: npt.NDArray[np.int32]
    cut: float = 0.25
    edges: int = 9
    recall: float | None = None
    isolated: int = 0

    @property
    def seconds(self) -> dict[str, float]:
        return {"cut": 0.1}


def fake_communities(queries: npt.NDArray[np.float32], documents: npt.NDArray[np.float32], **settings: Any) -> Any:
    """Neighbours in the order of rows are a community; a row's window are the rows behind it."""
    size, count = settings["size"], len(queries)
    whole = count // size * size
    window = (np.arange(count)[:, None] + np.arange(1, 9)[None, :]) % count
    groups = np.arange(whole).reshape(-1, size)
    return FakeCommunities(groups, np.arange(whole, count), window.astype(np.int32), window[:, :0].astype(np.int32))


def build(settings: dict[str, Any]) -> StreamPlanner:
    config = ANY.validate_python(settings)
    planner: StreamPlanner = config.build()
    for part in planner.parts if isinstance(planner, MixedPlanner) else [planner]:
        if isinstance(part, KMeansStrataPlanner):
            part.cluster = fake_clusters
        if isinstance(part, CommunityPlanner):
            part.find = fake_communities
    return planner


NO_EXCEPTIONS = {"repeated_items": 0, "known_positives": 0, "repeated_labels": 0}
KINDS: dict[str, dict[str, Any]] = {
    "shuffled": {"kind": "shuffled"},
    "single_source": {"kind": "single_source"},
    "homogeneous": {"kind": "single_source", "homogeneous": 0.6},
    "pooled": {"kind": "single_source", "pools": {"pool": ["source0", "source1"]}},
    "kmeans_strata": {"kind": "kmeans_strata", "clusters": 3},
    "kmeans_strata dropping": {"kind": "kmeans_strata", "clusters": 3, "small": "drop", "side": "document"},
    "communities": {"kind": "communities", "community_size": 2},
    "communities and negatives": {"kind": "communities", "community_size": 2, "cluster_negatives": 2},
    "communities homogeneous": {"kind": "communities", "community_size": 2, "homogeneous": 0.5},
    "mixed": {
        "kind": "mixed",
        "parts": [
            {"weight": 1, "planner": {"kind": "kmeans_strata", "clusters": 2}},
            {"weight": 2, "planner": {"kind": "communities", "community_size": 2}},
            {"weight": 1, "planner": {"kind": "shuffled"}},
        ],
    },
}

sources = st.lists(
    st.tuples(st.integers(1, 60), st.integers(5, 400), st.integers(0, 10**6)), min_size=2, max_size=3
).map(lambda shapes: [make_source(number, *shape) for number, shape in enumerate(shapes)])


def check_promises(
    epoch: EpochBatches, sources: list[SourceExamples], settings: dict[str, Any], extra_negatives: int = 0
) -> None:
    size = settings["batch_size"]
    placed = Counter(epoch.rows.example.tolist())
    assert all(count == 1 for count in placed.values())
    assert len(placed) + sum(epoch.dropped.values()) == sum(len(source) for source in sources)
    full = [len(batch) == size for batch in batches_of(epoch)]
    assert all(full) if settings["drop_last"] else all(len(batch) >= 2 for batch in batches_of(epoch))
    for batch in items_of(epoch):
        items = [item for row in batch for item in row]
        assert len(items) == len(set(items)), "an item stands twice in a batch"
    for row in range(len(epoch.rows)):
        source = sources[int(epoch.rows.source[row])]
        index = int(epoch.rows.example[row]) - 1000 * source.source
        assert epoch.rows.query[row] == source.queries[index]
        positives, negatives = epoch.rows.positives[row].tolist(), epoch.rows.negatives[row].tolist()
        own, rest = negatives[:1] if len(source.negatives[index]) else [], len(source.negatives[index]) > 0
        assert set(positives) <= set(source.positives[index].tolist())
        assert set(own) <= set(source.negatives[index].tolist())
        assert len(positives) == min(2, len(source.positives[index]))
        assert len(own) <= len(negatives) <= rest + extra_negatives


@pytest.mark.parametrize("kind", KINDS)
@given(
    sources=sources, pairs=st.integers(1, 4), drop_last=st.booleans(), seed=st.integers(0, 100), epoch=st.integers(0, 3)
)
@settings(max_examples=15, deadline=None)
def test_promises(kind: str, sources: list[SourceExamples], pairs: int, drop_last: bool, seed: int, epoch: int) -> None:
    config = {"batch_size": 2 * pairs, "positives": 2, "negatives": 1, "drop_last": drop_last, **KINDS[kind]}
    known = known_of(sources)
    made = build(config).plan(sources, seed, epoch, known=known, vectors=VECTORS)
    check_promises(made, sources, config, config.get("cluster_negatives", 0))
    assert count_exceptions(made, known) == NO_EXCEPTIONS
    again = build(config).plan(sources, seed, epoch, known=known, vectors=VECTORS)
    assert items_of(again) == items_of(made)
    assert again.rows.stratum.tolist() == made.rows.stratum.tolist()
    assert again.details == made.details
    # In a planner that has planned another epoch before, too.
    used = build(config)
    used.plan(sources, seed, epoch + 1, known=known, vectors=VECTORS)
    assert items_of(used.plan(sources, seed, epoch, known=known, vectors=VECTORS)) == items_of(made)


@pytest.mark.parametrize("kind", ["single_source", "kmeans_strata", "communities", "pooled"])
def test_a_batch_has_one_stream(kind: str) -> None:
    sources = [make_source(number, 90, 500, number) for number in range(3)]
    pool = {0: 0, 1: 0, 2: 2} if kind == "pooled" else {0: 0, 1: 1, 2: 2}
    epoch = build({"batch_size": 6, **KINDS[kind]}).plan(sources, 0, 0, vectors=VECTORS)
    for number in range(len(epoch)):
        assert len({pool[source] for source in epoch.batch(number).source.tolist()}) == 1
    shuffled = build({"kind": "shuffled", "batch_size": 6}).plan(sources, 0, 0)
    assert np.mean([len(set(shuffled.batch(number).source.tolist())) > 1 for number in range(len(shuffled))]) > 0.9


def test_what_is_relaxed_is_counted() -> None:
    sources = [make_source(0, 60, 30, 1)]
    known = known_of(sources)
    strict = build({"kind": "single_source", "batch_size": 4}).plan(sources, 0, 0, known=known)
    assert count_exceptions(strict, known) == NO_EXCEPTIONS
    loose = {"kind": "single_source", "batch_size": 4, "duplicates": "allow", "known_positives": "allow"}
    counted = count_exceptions(build(loose).plan(sources, 0, 0, known=known), known)
    assert counted["repeated_items"] > 0 and counted["known_positives"] > 0


def test_labels_can_be_kept_apart() -> None:
    source = make_apart(0, 80)
    labelled = SourceExamples(
        0, "topics", source.examples, source.queries, source.negatives, source.negatives, labels=np.arange(80) % 8
    )
    apart = build({"kind": "single_source", "batch_size": 4, "same_label": "forbid"}).plan([labelled], 0, 0)
    assert len(apart) == 20
    assert all(len(set(apart.batch(number).label.tolist())) == 4 for number in range(len(apart)))
    assert count_exceptions(apart, None)["repeated_labels"] == 0
    together = build({"kind": "single_source", "batch_size": 4}).plan([labelled], 0, 0)
    assert count_exceptions(together, None)["repeated_labels"] > 0
    assert len(together) == 20
    for batch in items_of(together):
        items = [item for row in batch for item in row]
        assert len(items) == len(set(items))


# k-means strata


def test_a_stratum_fills_a_batch_and_every_row_is_there_once() -> None:
    sources = [make_apart(0, 90), make_apart(1, 60)]
    epoch = build({"kind": "kmeans_strata", "clusters": 3, "batch_size": 7}).plan(sources, 0, 0, vectors=VECTORS)
    strata = [set(epoch.batch(number).stratum.tolist()) for number in range(len(epoch))]
    assert all(len(one) == 1 for one in strata)
    # 30 rows make 4 batches of 7, 20 rows make 2.
    assert Counter(stratum for one in strata for stratum in one) == {0: 4, 1: 4, 2: 4, 3: 2, 4: 2, 5: 2}
    assert epoch.dropped == {"in a batch that did not fill": 6 + 18}
    kept = build({"kind": "kmeans_strata", "clusters": 3, "batch_size": 7, "drop_last": False})
    assert len(kept.plan(sources, 0, 0, vectors=VECTORS).rows) == 150
    assert epoch.details["strata"]["source1"]["sizes"] == [20, 20, 20]


def test_one_cluster_is_the_single_source_planner() -> None:
    sources = [make_source(number, 90, 300, number) for number in range(2)]
    known = known_of(sources)
    for epoch in (0, 1):
        plain = SingleSourceConfig(batch_size=6).build().plan(sources, 3, epoch, known=known)
        one = build({"kind": "kmeans_strata", "clusters": 1, "batch_size": 6})
        assert items_of(one.plan(sources, 3, epoch, known=known, vectors=VECTORS)) == items_of(plain)


def test_small_clusters_join_the_nearest() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] * 9 + [3] * 2)
    centroids = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.8, 0.2]], dtype=np.float32)
    merged, count = merge_small(labels, centroids, 8)
    # 3 is nearest to 1; both together, 5, to 0.
    assert count == 2
    assert merged.tolist() == [0] * 13 + [1] * 9 + [0] * 2
    assert merge_small(labels, centroids, 1000)[0].tolist() == [0] * 24
    assert merge_small(labels, centroids, 1)[0].tolist() == labels.tolist()
    # A cluster that has no member is no cluster.
    assert set(merge_small(np.array([0, 0, 3]), centroids, 1)[0].tolist()) == {0, 1}


def test_clusters_are_found_once_for_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(*arguments: Any, **settings: Any) -> FakeClusters:
        calls.append(settings["seed"])
        return fake_clusters(*arguments, **settings)

    planner = KMeansStrataPlanner(KMeansStrataConfig(batch_size=4, clusters=3))
    monkeypatch.setattr(planner, "cluster", counting)
    sources = [make_apart(0, 60), make_apart(1, 60)]
    first = planner.plan(sources, 0, 0, vectors=VECTORS)
    second = planner.plan(sources, 0, 1, vectors=VECTORS)
    assert len(calls) == 2 and len(set(calls)) == 2
    assert batches_of(first) != batches_of(second)
    planner.plan(sources, 1, 0, vectors=VECTORS)
    assert len(set(calls)) == 4
    planner.plan([make_apart(0, 61)], 1, 0, vectors=VECTORS)
    assert len(calls) == 5


# communities


def test_batches_are_unions_of_communities() -> None:
    sources = [make_apart(0, 96), make_apart(1, 50)]
    planner = build({"kind": "communities", "community_size": 4, "batch_size": 12})
    seen = set()
    for number in range(2):
        epoch = planner.plan(sources, 0, number, vectors=VECTORS)
        for batch in range(len(epoch)):
            rows = epoch.batch(batch)
            strata = Counter(rows.stratum.tolist())
            assert len(set(rows.source.tolist())) == 1
            # All members of each community, next to one another; of the second source two rows have none.
            assert all(count == 4 for stratum, count in strata.items() if stratum >= 0)
            seen.add(frozenset(strata))
        # 96 and 48 rows of communities, and the last two of source 1 with a whole community's worth too few.
        assert epoch.details["strata"]["source1"] == {
            "kind": "communities", "communities": 12, "size": 4, "left": 2, "cut": 0.25, "edges": 9, "without_edge": 0,
            "recall": None, "items_in_too_many_examples": 0,
        }  # fmt: skip
    assert len(seen) > 15, "communities meet others in another epoch"


def test_members_that_share_an_item_do_not_stay_together() -> None:
    source = make_apart(0, 32)
    source.positives.values[1] = source.positives.values[0]
    epoch = build({"kind": "communities", "community_size": 4, "batch_size": 8}).plan([source], 0, 0, vectors=VECTORS)
    assert len(epoch.rows) == 32
    place = {example: batch for batch, examples in enumerate(batches_of(epoch)) for example in examples}
    assert place[0] != place[1]
    assert epoch.details["moved"] == 1


def test_cluster_negatives_are_of_the_window_and_clash_with_nothing() -> None:
    sources = [make_apart(0, 64)]
    known = known_of(sources)
    planner = build(
        {"kind": "communities", "community_size": 4, "batch_size": 8, "cluster_negatives": 2, "negatives": 0}
    )
    epoch = planner.plan(sources, 0, 0, known=known, vectors=VECTORS)
    assert epoch.rows.negatives.lengths.max() == 2
    assert epoch.rows.negatives.lengths.mean() > 1
    assert count_exceptions(epoch, known) == NO_EXCEPTIONS
    for row in range(len(epoch.rows)):
        group = int(epoch.rows.example[row]) // 4
        window = {(4 * group + member + step) % 64 for member in range(4) for step in range(1, 9)} - set(
            range(4 * group, 4 * group + 4)
        )
        assert set((epoch.rows.negatives[row] - 50_000).tolist()) <= window


def test_a_batch_that_is_no_union_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 10 is no multiple of community_size 4"):
        CommunitiesConfig(batch_size=10, community_size=4)
    with pytest.raises(ValueError, match="rank_to 5 must be above rank_from 5"):
        CommunitiesConfig(rank_from=5, rank_to=5)


@pytest.mark.parametrize("kind", ["kmeans_strata", "communities", "mixed"])
def test_without_vectors_it_says_what_to_do(kind: str) -> None:
    assert ANY.validate_python({"batch_size": 4, **KINDS[kind]}).needs_vectors
    with pytest.raises(BadInputError, match="a teacher's vectors, and there are none") as error:
        build({"batch_size": 4, **KINDS[kind]}).plan([make_apart(0, 40)], 0, 0)
    assert error.value.hint is not None


# mixtures


def test_a_mixture_deals_by_weight() -> None:
    sources = [make_apart(0, 400), make_apart(1, 200)]
    config = MixedConfig(
        batch_size=4,
        parts=(
            MixedPart(weight=3, planner=SingleSourceConfig()),
            MixedPart(weight=1, planner=ShuffledConfig()),
        ),
    )
    assert not config.needs_vectors
    epoch = config.build().plan(sources, 0, 0)
    assert [part["batches"] for part in epoch.details["parts"]] == [112, 37]
    assert len(epoch) == 149
    mixed = [len(set(epoch.batch(number).source.tolist())) > 1 for number in range(len(epoch))]
    assert 0.1 < np.mean(mixed[:75]) / np.mean(mixed) < 1.9
    other = config.build().plan(sources, 0, 1)
    assert set(map(frozenset, batches_of(epoch))).isdisjoint(map(frozenset, batches_of(other)))


def test_a_part_of_communities_takes_whole_ones() -> None:
    settings = {
        "kind": "mixed",
        "batch_size": 8,
        "parts": [
            {"weight": 1, "planner": {"kind": "shuffled"}},
            {"weight": 1, "planner": {"kind": "communities", "community_size": 4}},
        ],
    }
    epoch = build(settings).plan([make_apart(0, 160)], 0, 0, vectors=VECTORS)
    strata = [Counter(epoch.batch(number).stratum.tolist()) for number in range(len(epoch))]
    whole = [one for one in strata if -1 not in one]
    assert len(whole) == 10
    assert all(set(one.values()) == {4} for one in whole)


def test_shared_settings_stand_on_the_mixture() -> None:
    part = {"planner": {"kind": "shuffled", "drop_last": False}}
    with pytest.raises(ValueError, match="drop_last must be set on the mixture"):
        ANY.validate_python({"kind": "mixed", "parts": [part]})
    other = {"planner": {"kind": "shuffled", "batch_size": 8}}
    with pytest.raises(ValueError, match="a part has batch_size 8, the mixture 64"):
        ANY.validate_python({"kind": "mixed", "parts": [other]})
    uneven = {"planner": {"kind": "communities", "community_size": 32}}
    with pytest.raises(ValueError, match="no multiple of community_size"):
        ANY.validate_python({"kind": "mixed", "batch_size": 48, "parts": [uneven]})


def test_the_homogeneous_share() -> None:
    sources = [make_apart(0, 400), make_apart(1, 400)]
    for share, least, most in ((1.0, 1.0, 1.0), (0.7, 0.65, 0.75), (0.0, 0.0, 0.1)):
        epoch = SingleSourceConfig(batch_size=8, homogeneous=share).build().plan(sources, 0, 0)
        pure = np.mean([len(set(epoch.batch(number).source.tolist())) == 1 for number in range(len(epoch))])
        assert least <= pure <= most
        assert len(epoch) >= 98
