"""How ranks see each other's embeddings: all of them gathered, or parts passed round.

A rank encodes the chunks that it was dealt. What the loss then needs is one of two things. *Gathered*: all embeddings, for the
rows of an even share. *Ring*: the queries of such a share with their own documents, sent there by the ranks that encoded them;
the parts of other ranks come by while the loss is computed, so that no rank ever holds the whole batch. Either way the gradient
goes back to the ranks that encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nearfield.batching.planner import Rows, VectorsOf
from nearfield.objectives.batch import ContrastiveBatch, Queued, Ring
from nearfield.training.chunks import Pool, split_rows
from nearfield.training.communication import (
    Shares,
    gather_embeddings,
    reduce_gradient,
    return_rows,
    rotate,
    send_rows,
)


def contrastive_batch(
    pool: Pool,
    embeddings: Tensor,
    known_positives: Sequence[Rows],
    rows: Rows | None = None,
    draw: int | None = None,
    guide: VectorsOf | None = None,
    queue: Queued | None = None,
    device: torch.device | None = None,
) -> ContrastiveBatch:
    """The objective's view of a pool's (n, d) embeddings; ``known_positives`` are item rows, one array a query.

    ``draw`` is the seed of what the objective draws, ``guide`` gives a guide's vectors of items, ``queue`` is what was seen
    before. ``device`` is where all but the embeddings are; by default where these are.
    """
    place, device = embeddings.device, device or embeddings.device
    token_losses = None
    if pool.token_columns:
        width = embeddings.shape[1] - pool.token_columns
        token_losses = embeddings[torch.from_numpy(pool.queries).to(place), width:]
        embeddings = embeddings[:, :width]

    def guided(role: str, places: Rows) -> Tensor | None:
        # A copy: torch takes no memory that is mapped for reading only.
        return None if guide is None else torch.from_numpy(np.array(guide(role, pool.items[places]))).to(device)

    sources = pool.sources
    if sources is None and pool.source is not None:
        sources = np.full(len(pool.queries), pool.source, dtype=np.int64)
    most = max((len(known) for known in known_positives), default=0)
    known = np.full((len(known_positives), max(1, most)), -1, dtype=np.int64)
    for line, items in enumerate(known_positives):
        known[line, : len(items)] = items
    return ContrastiveBatch(
        queries=embeddings[torch.from_numpy(pool.queries).to(place)],
        documents=embeddings[torch.from_numpy(pool.documents).to(place)],
        owner=torch.from_numpy(pool.owner).to(device),
        is_positive=torch.from_numpy(pool.is_positive).to(device),
        document_ids=torch.from_numpy(pool.items[pool.documents]).to(device),
        known_positives=torch.from_numpy(known).to(device),
        rows=None if rows is None else torch.from_numpy(rows).to(device),
        query_ids=torch.from_numpy(pool.items[pool.queries]).to(device),
        labels=None if pool.labels is None else torch.from_numpy(pool.labels).to(device),
        weights=None if pool.weights is None else torch.from_numpy(pool.weights).to(device),
        sources=None if sources is None else torch.from_numpy(sources).to(device),
        guide_queries=guided("query", pool.queries),
        guide_documents=guided("document", pool.documents),
        queue=queue,
        scores=None if pool.scores is None else torch.from_numpy(pool.scores).to(device),
        teacher_scores=None if pool.teacher_scores is None else torch.from_numpy(pool.teacher_scores).to(device),
        token_losses=token_losses,
        query_tokens=None if pool.query_tokens is None else torch.from_numpy(pool.query_tokens).to(device),
        draw=draw,
    )


class Exchange(Protocol):
    """The way of a batch's embeddings to the objective and of their gradient back."""

    def bring(self, own: Tensor) -> Tensor:
        """(own, d) embeddings of this rank's chunks -> (n, d), detached, those that its part of the loss sees; *collective*."""
        ...

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """The objective's view of what was brought."""
        ...

    def back(self, gradient: Tensor) -> Tensor:
        """(n, d) gradient of what was brought -> (own, d), summed over ranks; *collective*."""
        ...


class Gathered:
    """Every rank gets all embeddings."""

    def __init__(
        self,
        pool: Pool,
        shares: Shares,
        known_positives: Sequence[Rows],
        guide: VectorsOf | None,
        queue: Queued | None,
    ) -> None:
        self.pool, self.shares, self.known_positives, self.guide, self.queue = (
            pool,
            shares,
            known_positives,
            guide,
            queue,
        )

    def bring(self, own: Tensor) -> Tensor:
        """One collective."""
        return gather_embeddings(own, self.shares)

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """The whole batch, and the rows of this rank."""
        ranks = len(self.shares.rows)
        rows = split_rows(len(self.pool.queries), ranks, self.shares.rank) if ranks > 1 else None
        return contrastive_batch(self.pool, embeddings, self.known_positives, rows, draw, self.guide, self.queue)

    def back(self, gradient: Tensor) -> Tensor:
        """One collective."""
        return reduce_gradient(gradient, self.shares)


class Passed:
    """Every rank gets the queries of its share with their documents; the rest comes by in a ring."""

    def __init__(self, pool: Pool, shares: Shares, known_positives: Sequence[Rows], guide: VectorsOf | None) -> None:
        self.shares, self.guide = shares, guide
        ranks = range(len(shares.rows))
        rows = [split_rows(len(pool.queries), len(ranks), rank) for rank in ranks]
        parts = [part_of(pool, part) for part in rows]
        self.pools = [part for part, _ in parts]
        self.wanted = [wanted for _, wanted in parts]
        self.known_positives = [[known_positives[int(row)] for row in part] for part in rows]
        self.weight = (float(len(pool.queries)) if pool.weights is None else float(pool.weights.sum())) or 1.0

    def bring(self, own: Tensor) -> Tensor:
        """One collective, in which each embedding goes where it is needed."""
        return send_rows(own, self.shares, self.wanted)

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """This rank's part, and the ring that the others come by on."""
        rank = self.shares.rank

        def part(other: int) -> ContrastiveBatch:
            nothing = torch.empty((len(self.wanted[other]), embeddings.shape[1]), device="meta")
            return contrastive_batch(
                self.pools[other],
                nothing,
                self.known_positives[other],
                guide=self.guide,
                device=embeddings.device,
            )

        ring = Ring(
            rank,
            [len(pool.queries) for pool in self.pools],
            [len(pool.documents) for pool in self.pools],
            self.weight,
            part,
            lambda tensor, rows: rotate(tensor, rows, rank, len(self.pools)),
        )
        own = contrastive_batch(self.pools[rank], embeddings, self.known_positives[rank], draw=draw, guide=self.guide)
        return replace(own, ring=ring)

    def back(self, gradient: Tensor) -> Tensor:
        """One collective."""
        return return_rows(gradient, self.shares, self.wanted)


def part_of(pool: Pool, rows: Rows) -> tuple[Pool, Rows]:
    """Some queries of a pool with their documents as a pool of their own, and which texts of the pool that has."""
    mine = np.isin(pool.owner, rows)
    queries, documents = pool.queries[rows], pool.documents[mine]
    wanted, where = np.unique(np.concatenate([queries, documents]), return_inverse=True)
    part = Pool(
        pool.items[wanted],
        pool.prompts[wanted],
        where[: len(rows)],
        where[len(rows) :],
        np.searchsorted(rows, pool.owner[mine]),
        pool.is_positive[mine],
        None if pool.labels is None else pool.labels[rows],
        pool.source,
        None if pool.sources is None else pool.sources[rows],
        None if pool.weights is None else pool.weights[rows],
    )
    return part, wanted
