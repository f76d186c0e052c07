"""The parts that ranks pass round, as pools of their own, and what a ring cannot compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearfield.errors import BadInputError
from nearfield.objectives import InfoNCEConfig, Objective
from nearfield.training import TrainingConfig
from nearfield.training.chunks import Shares, TextPool, contrastive_batch, part_of, split_rows
from nearfield.training.engine import check_ring, open_queue
from nearfield.training.step import Passed


def make_pool(queries: int, seed: int) -> TextPool:
    random = np.random.default_rng(seed)
    owner = np.sort(np.r_[np.arange(queries), random.integers(0, queries, queries)])
    texts = 2 * queries
    return TextPool(
        items=np.arange(texts) + 50,
        prompts=random.integers(0, 2, texts),
        queries=random.integers(0, texts, queries),
        documents=random.integers(0, texts, len(owner)),
        owner=owner,
        is_positive=random.random(len(owner)) < 0.5,
        labels=random.integers(-1, 3, queries),
        sources=random.integers(0, 3, queries),
        weights=random.random(queries),
    )


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_the_parts_are_the_pool(queries: int, ranks: int, seed: int) -> None:
    pool = make_pool(queries, seed)
    assert pool.labels is not None and pool.sources is not None and pool.weights is not None
    documents = 0
    for rank in range(ranks):
        rows = split_rows(queries, ranks, rank)
        part, wanted = part_of(pool, rows)
        mine = np.isin(pool.owner, rows)
        assert part.items[part.queries].tolist() == pool.items[pool.queries[rows]].tolist()
        assert part.items[part.documents].tolist() == pool.items[pool.documents[mine]].tolist()
        assert part.prompts.tolist() == pool.prompts[wanted].tolist()
        assert (part.owner + (rows[0] if len(rows) else 0)).tolist() == pool.owner[mine].tolist()
        assert part.is_positive.tolist() == pool.is_positive[mine].tolist()
        for name in ("labels", "sources", "weights"):
            assert getattr(part, name).tolist() == getattr(pool, name)[rows].tolist()
        assert len(np.unique(wanted)) == len(wanted) == len(part.items)
        documents += len(part.documents)
    assert documents == len(pool.documents)


def test_what_a_rank_knows_of_another_is_all_but_its_embeddings() -> None:
    pool, known = make_pool(7, 3), [np.array([row + 50]) for row in range(7)]
    shares = Shares(np.array_split(np.arange(14), 2), 0)
    vectors: dict[str, Any] = {role: np.random.default_rng(1).random((64, 4)) for role in ("query", "document")}
    passed = Passed(pool, shares, known, lambda role, rows: vectors[role][rows].astype(np.float32))
    mine = passed.batch(torch.randn(len(passed.wanted[0]), 3), draw=5)
    assert mine.ring is not None and mine.draw == 5
    assert mine.place() == (0, 7)
    assert mine.denominator() == pytest.approx(float(pool.weights.sum()))  # type: ignore[union-attr]
    assert mine.ring.visits() == [1]
    other = mine.ring.part(1)
    truth = contrastive_batch(passed.pools[1], torch.randn(len(passed.wanted[1]), 3), known[3:], guide=passed.guide)
    assert other.queries.device.type == "meta" and other.queries.shape == truth.queries.shape
    assert mine.ring.size(1) == len(truth.queries) + len(truth.documents)
    for name in (
        "owner",
        "document_ids",
        "known_positives",
        "query_ids",
        "labels",
        "weights",
        "sources",
        "guide_documents",
    ):
        assert torch.equal(getattr(other, name), getattr(truth, name)), name


@pytest.mark.parametrize("settings", [{"spread": {}}, {"queue": 3}], ids=str)
def test_a_ring_never_brings_a_batch_together(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="which a ring never brings together"):
        check_ring(InfoNCEConfig.model_validate(settings).build())
    with pytest.raises(BadInputError, match="this objective looks at all"):
        check_ring(Objective())
    check_ring(InfoNCEConfig().build())


def test_the_largest_queue_that_is_asked_for_is_opened() -> None:
    queue = open_queue(TrainingConfig(), InfoNCEConfig(queue=3).build())
    assert queue is not None and queue.size == 3
    assert open_queue(TrainingConfig(), InfoNCEConfig().build()) is None
    with pytest.raises(BadInputError, match="whole batches"):
        open_queue(TrainingConfig(averaged_batches=2), InfoNCEConfig(queue=3).build())
