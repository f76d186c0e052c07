"""A batch spread over processes that pass its parts round gives what the whole batch gives in one."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.errors import BadInputError
from nearfield.objectives import ContrastiveBatch, InfoNCEConfig, LossSum
from nearfield.objectives.batch import Ring
from nearfield.objectives.config import SpreadConfig
from tests.objectives.options import configs, random_batch
from tests.objectives.test_statistics import build
from tests.patience import PATIENCE


def part_of(batch: ContrastiveBatch, low: int, high: int) -> tuple[ContrastiveBatch, Tensor]:
    """The queries ``low`` to ``high`` with their documents, numbered from 0; which documents these are."""
    documents = ((batch.owner >= low) & (batch.owner < high)).nonzero().squeeze(1)

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[low:high]

    def columns(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[documents]

    part = replace(
        batch,
        queries=batch.queries.detach()[low:high].requires_grad_(),
        documents=batch.documents.detach()[documents].requires_grad_(),
        owner=batch.owner[documents] - low,
        is_positive=batch.is_positive[documents],
        document_ids=batch.document_ids[documents],
        known_positives=batch.known_positives[low:high],
        query_ids=rows(batch.query_ids),
        labels=rows(batch.labels),
        document_labels=columns(batch.document_labels),
        weights=rows(batch.weights),
        sources=rows(batch.sources),
        guide_queries=rows(batch.guide_queries),
        guide_documents=columns(batch.guide_documents),
    )
    return part, documents


def in_a_ring(
    config: InfoNCEConfig, batch: ContrastiveBatch, world: int, tile: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean loss, row losses and gradients of a batch whose parts lie in ``world`` threads, each with its own objective."""
    edges = [len(batch.queries) * rank // world for rank in range(world + 1)]
    parts = [part_of(batch, low, high) for low, high in itertools.pairwise(edges)]
    mail: list[queue.Queue[Tensor]] = [queue.Queue() for _ in range(world)]
    found: dict[int, tuple[LossSum, list[Tensor]]] = {}
    errors: list[BaseException] = []

    def without(rank: int) -> ContrastiveBatch:
        part = parts[rank][0]
        return replace(part, queries=part.queries.detach().to("meta"), documents=part.documents.detach().to("meta"))

    def rotate(rank: int) -> Callable[[Tensor, int], Tensor]:
        def pass_on(tensor: Tensor, rows: int) -> Tensor:
            mail[(rank + 1) % world].put(tensor.clone())
            got = mail[rank].get(timeout=PATIENCE)
            assert len(got) == rows
            return got

        return pass_on

    def work(rank: int) -> None:
        try:
            part, _ = parts[rank]
            ring = Ring(
                rank,
                [len(p.queries) for p, _ in parts],
                [len(p.documents) for p, _ in parts],
                batch.denominator(),
                without,
                rotate(rank),
            )
            objective = build(config, "auto", tile)
            loss = objective(replace(part, ring=ring))
            mean = loss.total / loss.denominator
            found[rank] = (
                loss,
                list(torch.autograd.grad(mean, [part.queries, part.documents, *objective.parameters()])),
            )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    documents = torch.zeros_like(batch.documents)
    for rank in range(world):
        documents[parts[rank][1]] = found[rank][1][1]
    learnt = [sum(values) for values in zip(*(found[rank][1][2:] for rank in range(world)), strict=True)]
    return (
        torch.stack([found[rank][0].total.detach() / found[rank][0].denominator for rank in range(world)]).sum(),
        torch.cat([found[rank][0].rows for rank in range(world)]),
        [torch.cat([found[rank][1][0] for rank in range(world)]), documents, *learnt],  # type: ignore[list-item]
    )


def compare(config: InfoNCEConfig, batch: ContrastiveBatch, world: int, tile: int) -> None:
    objective = build(config, "dense", tile)
    loss = objective(batch)
    mean = loss.total / loss.denominator
    expected = [
        mean.detach(),
        loss.rows,
        *torch.autograd.grad(mean, [batch.queries, batch.documents, *objective.parameters()]),
    ]
    total, rows, gradients = in_a_ring(config, batch, world, tile)
    for ours, theirs in zip([total, rows, *gradients], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(
    config=configs(),
    seed=st.integers(0, 2**32),
    size=st.integers(1, 9),
    world=st.integers(1, 4),
    tile=st.sampled_from([1, 3, 64]),
    negatives=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_ring_is_the_whole_batch(
    config: InfoNCEConfig, seed: int, size: int, world: int, tile: int, negatives: int
) -> None:
    compare(config.model_copy(update={"spread": None}), random_batch(seed, size, negatives=negatives), world, tile)


def test_unequal_parts_and_both_directions() -> None:
    config = InfoNCEConfig(both_directions=True, learn_temperature=True, temperature=0.1)
    compare(config, random_batch(7, 101, positives=1, negatives=3), 3, 16)
    compare(config, random_batch(7, 2), 3, 16)


def test_what_looks_at_all_embeddings_is_refused() -> None:
    with pytest.raises(BadInputError, match="spread"):
        in_a_ring(InfoNCEConfig(spread=SpreadConfig()), random_batch(1, 4), 2, 8)
