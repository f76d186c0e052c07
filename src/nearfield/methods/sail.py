"""SAIL-Embedding (arXiv 2510.12709): batches of whole samples, and how often to draw each data set.

Pattern matching: the sources are patterns of the same samples (image to text, text to text ...), and one forward scores all
that a sample has. Stochastic specialisation: training draws one data set a batch (``single_source``), with a distribution from
optimal transport between the clusters of the data sets' vectors. The paper leaves open how many clusters, how they are weighed,
the regularisation, and the temperature of the softmax: clusters weigh what they hold, and the others are settings here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from nearfield.arrays import Floats, Ragged, Rows, Vectors, concatenate, occurrences, starts
from nearfield.batching.assign import Conflicts, assign
from nearfield.batching.config import PlannerSettings
from nearfield.batching.planner import NOT_FILLED, Drawn, EpochBatches, Request, StreamPlanner
from nearfield.batching.streams import Stream, join_rows
from nearfield.errors import BadInputError
from nearfield.mining.approximate import spherical_kmeans


class PatternsConfig(PlannerSettings):
    """Batches of whole samples: what the sources have of one sample (image to text, text to text ...) stands in one batch.

    Pattern matching (SAIL-Embedding, arXiv 2510.12709): the sources are patterns of the same samples, told by the data recipe's
    ``cluster`` column; what a sample has no example of is left out. Each source is to be contrasted by itself
    (``each_source`` of an objective's part).
    """

    needs_samples: ClassVar[bool] = True

    kind: Literal["patterns"] = "patterns"
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Samples a step, over all devices; each has up to as many examples as there are sources."""

    @model_validator(mode="after")
    def _sources_come_with_their_samples(self) -> Self:
        if self.pools or self.sampling.exponent is not None:
            raise ValueError("whole samples bring all of their sources: neither 'sampling' nor 'pools' can be set")
        return self

    def build(self) -> StreamPlanner:
        """The planner."""
        return PatternsPlanner(self)


class PatternsPlanner(StreamPlanner):
    """Samples in one order, cut into batches; within a batch the rows stand source by source."""

    config: PatternsConfig

    def plan_streams(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> EpochBatches:
        """The batches. Two samples conflict where two examples of one source do: sources never meet in the loss."""
        config = self.config
        drawn = [self.draw(stream, request, among.get(stream.name)) for stream in streams]
        rows, conflicts = join_rows([part.rows for part in drawn]), _apart([part.conflicts for part in drawn])
        begins = starts([len(part.rows) for part in drawn])
        # The rows that can be placed, and the sample of each: where a source has several examples of a sample, the first goes
        # with the first of the other sources, and so on.
        places = np.concatenate([begin + part.order for begin, part in zip(begins, drawn, strict=False)])
        keys = np.concatenate([_numbered(part) for part in drawn], axis=1)
        _, sample = np.unique(keys, axis=1, return_inverse=True)
        order = np.lexsort((places, sample.ravel()))
        members = Ragged.from_lengths(np.bincount(sample.ravel()), places[order])
        whole = Conflicts(
            _of_members(conflicts.items, members), _of_members(conflicts.forbidden, members), conflicts.distinct
        )
        samples = request.random("samples").permutation(len(members))
        made = assign(samples, config.batch_size, whole, keep_small=not config.drop_last)
        taken = members.take(made.rows)
        batch = np.repeat(np.arange(len(made.sizes)), made.sizes)[taken.owners()]
        sorted_rows = taken.values[np.lexsort((np.arange(len(batch)), rows.source[taken.values], batch))]
        counts = np.bincount(batch, minlength=len(made.sizes)).astype(np.int64)
        dropped: Counter[str] = sum((part.dropped for part in drawn), Counter())
        dropped[NOT_FILLED] += int(members.lengths[made.left].sum())
        patterns = Counter(members.lengths[made.rows].tolist())
        details = {
            "moved": made.moved,
            "samples": len(made.rows),
            "patterns": {str(n): patterns[n] for n in sorted(patterns)},
        }
        epoch = EpochBatches(rows.take(sorted_rows), starts(counts), +dropped, details)
        return epoch.ordered(request.random("order of batches").permutation(len(epoch)))


def _numbered(part: Drawn) -> Rows:
    """[2, n] for each row that can be placed, in its order: its sample, and how many of the sample stood before it."""
    if part.stream.samples is None:
        raise BadInputError(
            "batches of kind 'patterns' want to know which examples are of one sample", where="batches.kind"
        )
    samples = part.stream.samples[part.order]
    return np.stack([samples, occurrences(samples)])


def _apart(parts: Sequence[Conflicts]) -> Conflicts:
    """The conflicts of several sources, whose items are no longer the same where two sources bring one."""
    items, forbidden, base = [], [], 0
    for part in parts:
        items.append(Ragged(part.items.offsets, part.items.values + base))
        forbidden.append(Ragged(part.forbidden.offsets, part.forbidden.values + base))
        base += max(int(part.items.values.max(initial=-1)), int(part.forbidden.values.max(initial=-1))) + 1
    return Conflicts(concatenate(items), concatenate(forbidden), any(part.distinct for part in parts))


def _of_members(conflicts: Ragged, members: Ragged) -> Ragged:
    """For each sample the conflicts of all its rows."""
    of_rows = conflicts.take(members.values)
    return Ragged.from_lengths(Ragged(members.offsets, of_rows.lengths).sums(), of_rows.values)


# Shares of data sets


def sinkhorn(cost: Floats, rows: Floats, columns: Floats, regularisation: float, iterations: int = 10_000) -> Floats:
    """The transport plan [n, m] between two distributions of least cost less ``regularisation`` times its entropy (Cuturi, 2013)."""
    kernel = np.exp(-(cost - cost.min()) / regularisation)
    left = np.ones(len(rows))
    for _ in range(iterations):
        right = columns / np.maximum(kernel.T @ left, 1e-300)
        left = rows / np.maximum(kernel @ right, 1e-300)
        plan: Floats = left[:, None] * kernel * right[None, :]
        if np.abs(plan.sum(axis=0) - columns).max() < 1e-9:
            break
    return plan


def transport_similarity(
    first: Vectors, second: Vectors, *, clusters: int = 32, regularisation: float = 0.05, seed: int = 0
) -> float:
    """The mean cosine of what is moved onto what: sum of P * C, with P of least cost 1 - C between the sets' centroids."""
    parts = [spherical_kmeans(vectors, min(clusters, len(vectors)), seed=seed) for vectors in (first, second)]
    cosines = parts[0].centroids.astype(np.float64) @ parts[1].centroids.astype(np.float64).T
    masses = [part.sizes / part.sizes.sum() for part in parts]
    return float((sinkhorn(1 - cosines, masses[0], masses[1], regularisation) * cosines).sum())


def specialised_shares(scores: Mapping[str, Mapping[str, float]], temperature: float) -> dict[str, float]:
    """Softmax of each data set's mean score over the sets that it is compared with; a high temperature makes shares even."""
    means = np.array([np.mean(list(of.values())) for of in scores.values()])
    weights = np.exp((means - means.max()) / temperature)
    return dict(zip(scores, (weights / weights.sum()).tolist(), strict=True))
