"""The statistics where a batch is spread over processes that never gather it.

Each process keeps its own queries with their documents and computes their rows; the parts of the others come by one after
another (Inf-CL, arXiv 2410.17243). A row's sum is joined over the visits. In the backward a part brings the gradient of its
embeddings along, each process adds its share, and after a whole round it is home. So a process holds two parts, and the tiles
of :mod:`.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from nearfield.objectives.batch import ContrastiveBatch, Ring
from nearfield.objectives.statistics import (
    Gradients,
    RowStatistics,
    SoftmaxInputs,
    Statistics,
    Workspace,
    backward_block,
    forward_block,
)

LayOut = Callable[[ContrastiveBatch, tuple[int, int]], SoftmaxInputs]
"""(batch, the first query and document that are candidates) -> what is to be computed."""


def ring_statistics(
    problem: SoftmaxInputs, batch: ContrastiveBatch, ring: Ring, lay_out: LayOut, scales: Mapping[str, Tensor]
) -> Statistics:
    """The statistics of this process's rows over the candidates of all; *collective*, as is its backward."""
    work = _Work(problem, batch, ring, lay_out)
    pairs, *parts = _RingRound.apply(batch.queries, batch.documents, work, *(scales[name] for name in problem.blocks))  # type: ignore[no-untyped-call]
    return Statistics(pairs, {n: RowStatistics(*parts[3 * i : 3 * i + 3]) for i, n in enumerate(problem.blocks)})


@dataclass(frozen=True)
class _Work:
    own: SoftmaxInputs
    """This process's rows against its own candidates."""
    batch: ContrastiveBatch
    ring: Ring
    lay_out: LayOut

    def visit(self, process: int, embeddings: Tensor) -> SoftmaxInputs:
        """This process's rows against the candidates of another, whose embeddings these are."""
        batch, other = self.batch, self.ring.part(process)
        queries = len(batch.queries)
        theirs = embeddings[: len(other.queries)], embeddings[len(other.queries) :]
        joined = replace(
            batch,
            queries=torch.cat([batch.queries.detach(), theirs[0].to(batch.queries.dtype)]),
            documents=torch.cat([batch.documents.detach(), theirs[1].to(batch.documents.dtype)]),
            owner=torch.cat([batch.owner, other.owner + queries]),
            is_positive=torch.cat([batch.is_positive, other.is_positive]),
            document_ids=torch.cat([batch.document_ids, other.document_ids]),
            known_positives=_stack(batch.known_positives, other.known_positives),
            rows=torch.arange(queries, device=batch.owner.device),
            queue=None,
            ring=None,
            query_ids=_both(batch.query_ids, other.query_ids),
            labels=_both(batch.labels, other.labels),
            document_labels=_both(batch.document_labels, other.document_labels),
            weights=_both(batch.weights, other.weights),
            sources=_both(batch.sources, other.sources),
            guide_queries=_both(batch.guide_queries, other.guide_queries),
            guide_documents=_both(batch.guide_documents, other.guide_documents),
        )
        return self.lay_out(joined, (queries, len(batch.documents)))


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """(n, K) and (m, L) ids -> (n + m, max(K, L)), padded with -1."""
    width = max(first.shape[1], second.shape[1])
    return torch.cat([functional.pad(part, (0, width - part.shape[1]), value=-1) for part in (first, second)])


class _RingRound(torch.autograd.Function):
    """(queries, documents, work, a scale for each block) -> pair scores, and three statistics for each block."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, documents: Tensor, work: _Work, *scales: Tensor) -> tuple[Tensor, ...]:
        local_problem, ring = work.own, work.ring
        sums = _statistics(local_problem, scales)
        moving = torch.cat([queries.detach(), documents.detach()])
        for process in ring.visits():
            moving = ring.rotate(moving, ring.size(process))
            for number, visit in enumerate(_statistics(work.visit(process, moving), scales)):
                log_sum, total, count = sums[number]
                sums[number] = (torch.logaddexp(log_sum, visit[0]), total + visit[1], count + visit[2])
        for _, _, count in sums:
            ctx.mark_non_differentiable(count)
        ctx.save_for_backward(queries, documents, *scales, *(log_sum for log_sum, _, _ in sums))
        ctx.work = work
        pairs = local_problem.vectors.pair_scores(local_problem.pair_queries, local_problem.pair_documents)
        return pairs, *(part for parts in sums for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        local_problem, ring = work.own, work.ring
        queries, documents, *saved = ctx.saved_tensors
        count = len(local_problem.blocks)
        scales, log_sums = saved[:count], saved[count:]
        scale_sums = [torch.zeros_like(scale) for scale in scales]

        def push(problem: SoftmaxInputs, sink: Gradients) -> Tensor:
            """The gradient of the raw vectors of both sides, end to end."""
            space = Workspace(problem)
            for number, block in enumerate(problem.blocks.values()):
                upstream, total = gradients[1 + 3 * number], gradients[2 + 3 * number]
                scale, log_sum, wanted = scales[number], log_sums[number], ctx.needs_input_grad[3 + number]
                scale_sums[number] += backward_block(
                    problem, block, scale, log_sum, (upstream, total), sink, space, wanted
                )
            dtype = torch.empty(0, dtype=local_problem.vectors.dtype)
            return torch.cat([sink.result("query", dtype), sink.result("document", dtype)])

        sink = Gradients(local_problem.vectors)
        sink.add_pairs(local_problem.pair_queries, local_problem.pair_documents, gradients[0])
        mine = push(local_problem, sink)
        here = len(queries)
        moving = torch.cat([queries, documents]).to(mine.dtype)
        brought = torch.zeros_like(moving)
        for process in ring.visits():
            both = ring.rotate(torch.cat([moving, brought]), 2 * ring.size(process))
            moving, brought = both.chunk(2)
            problem = work.visit(process, moving)
            gradient = push(problem, Gradients(problem.vectors))
            # Own queries, theirs, own documents, theirs.
            edges = here, here + ring.queries[process], here + ring.queries[process] + len(documents)
            mine += torch.cat([gradient[: edges[0]], gradient[edges[1] : edges[2]]])
            brought = brought + torch.cat([gradient[edges[0] : edges[1]], gradient[edges[2] :]])
        if ring.visits():
            mine += ring.rotate(brought, ring.size(ring.rank))
        wanted = ctx.needs_input_grad[3:]
        return (
            mine[:here].to(queries.dtype),
            mine[here:].to(documents.dtype),
            None,
            *(total if needed else None for total, needed in zip(scale_sums, wanted, strict=True)),
        )


def _statistics(problem: SoftmaxInputs, scales: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Those of each block; of the first ``scales``, where a visitor brings fewer blocks."""
    space = Workspace(problem)
    return [forward_block(problem, block, scale, space) for block, scale in zip(problem.blocks.values(), scales)]  # noqa: B905
