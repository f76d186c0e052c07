"""Positives of earlier steps as further candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nearfield.objectives import ContrastiveBatch, InfoNCEConfig
from nearfield.objectives.batch import MemoryQueue
from tests.objectives.options import random_batch


def batch_of(start: int, count: int, **changes: object) -> ContrastiveBatch:
    """``count`` queries with a positive each, of ids from ``start`` on, and a negative each."""
    rows = torch.arange(count)
    ids = torch.cat([rows + start, rows + 900])
    owner, positive = rows.repeat(2), torch.arange(2 * count) < count
    vectors = ids[:, None].double() * torch.ones(3, dtype=torch.float64)
    batch = ContrastiveBatch(vectors[:count], vectors, owner, positive, ids, (rows + start)[:, None])
    return replace(batch, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 4, 5, 9])
def test_the_newest_positives_are_held(size: int) -> None:
    queue, seen = MemoryQueue(size), []
    assert queue.queued() is None and len(queue) == 0
    for start, count in ((0, 3), (10, 2), (20, 7), (30, 1), (40, 4)):
        queue.push(batch_of(start, count))
        seen += range(start, start + count)
        found = queue.queued()
        assert found is not None
        assert sorted(found.ids.tolist()) == sorted(seen[-size:])
        assert torch.equal(found.vectors[:, 0], found.ids.double())
        assert found.labels.tolist() == found.sources.tolist() == [-1] * len(found.ids)


def test_a_queue_goes_on_in_its_order_from_what_a_checkpoint_holds() -> None:
    one, other = MemoryQueue(5), MemoryQueue(5)
    one.push(batch_of(0, 3, labels=torch.tensor([1, 2, -1]), sources=torch.tensor([3, 3, 3])))
    one.push(batch_of(10, 4, labels=torch.tensor([0, 0, 0, 7]), sources=torch.tensor([1, 1, 1, 1])))
    other.load({"block": torch.zeros(3), **dict(one.tensors())})
    for queue in (one, other):
        queue.push(batch_of(20, 2))
    a, b = one.queued(), other.queued()
    assert a is not None and b is not None
    for name in ("vectors", "ids", "labels", "sources"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not dict(MemoryQueue(5).tensors())
    other.load({})
    assert other.queued() is None


def value(config: InfoNCEConfig, batch: ContrastiveBatch) -> torch.Tensor:
    loss: torch.Tensor = config.build()(batch).rows
    return loss


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_no_queue_is_the_base_case(implementation: str) -> None:
    batch = random_batch(3, 6)
    without, with_queue = (InfoNCEConfig.model_validate({"implementation": implementation, "queue": n}) for n in (0, 5))
    assert torch.equal(value(without, batch), value(without, replace(batch, queue=None)))
    assert torch.equal(value(without, batch), value(with_queue, replace(batch, queue=None)))
    assert (value(with_queue, batch) >= value(without, batch)).all()
    assert not torch.equal(value(with_queue, batch), value(without, batch))


def test_an_entry_counts_as_a_document_of_another_query_would() -> None:
    """Queued vectors = the same vectors as explicit negatives of a query that is not counted."""
    batch = replace(random_batch(4, 6, repeats=False), sources=None, weights=None)
    assert batch.queue is not None
    stray = replace(
        batch,
        queue=None,
        queries=torch.cat([batch.queries, torch.ones(1, 12, dtype=torch.float64)]),
        documents=torch.cat([batch.documents, batch.queue.vectors]),
        owner=torch.cat([batch.owner, torch.full((7,), 6)]),
        is_positive=torch.cat([batch.is_positive, torch.arange(7) < 1]),
        document_ids=torch.cat([batch.document_ids, batch.queue.ids]),
        known_positives=torch.cat([batch.known_positives, torch.full((1, batch.known_positives.shape[1]), -1)]),
        rows=torch.arange(6),
    )
    config = InfoNCEConfig(queue=7)
    torch.testing.assert_close(value(config, batch), value(config, stray), rtol=1e-12, atol=0)


def test_a_known_positive_in_the_queue_is_no_candidate() -> None:
    batch = batch_of(0, 2)
    queue = MemoryQueue(2)
    queue.push(batch_of(1, 1))
    config = InfoNCEConfig(similarity="dot", temperature=1e4)
    plain = value(config, batch)
    batch = replace(batch, queue=queue.queued())
    masked = value(config.model_copy(update={"queue": 2}), batch)
    kept = value(config.model_copy(update={"queue": 2, "mask_known_positives": False}), batch)
    assert masked[1] == plain[1]
    assert kept[1] > plain[1]
    assert masked[0] > plain[0]


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_a_query_sees_those_of_its_own_source(implementation: str) -> None:
    batch = batch_of(0, 2, sources=torch.tensor([1, 2]))
    queue = MemoryQueue(4)
    queue.push(batch_of(5, 2, sources=torch.tensor([2, 2])))
    config = InfoNCEConfig.model_validate({"queue": 4, "implementation": implementation})
    found, plain = value(config, replace(batch, queue=queue.queued())), value(config, batch)
    assert found[0] == plain[0] and found[1] > plain[1]
    unknown = replace(batch, sources=None)
    assert (value(config, replace(unknown, queue=queue.queued())) > plain).all()
