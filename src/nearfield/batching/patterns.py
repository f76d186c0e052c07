"""Batches of whole samples, whose sources are patterns of them: one forward scores all that a sample has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from nearfield.batching.claims import Claims
from nearfield.batching.config import PatternsConfig
from nearfield.batching.drawing import Stream
from nearfield.batching.fitting import arrange
from nearfield.batching.planner import NOT_FILLED, Drawn, EpochBatches, Request, StreamPlanner
from nearfield.batching.rows import Lists, Rows, join_lists, join_rows
from nearfield.errors import BadInputError


class PatternsPlanner(StreamPlanner):
    """Samples in one order, cut into batches; within a batch the rows stand source by source."""

    config: PatternsConfig

    def plan_streams(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> EpochBatches:
        """The batches. Two samples clash where two examples of one source do: sources never meet in the loss."""
        config = self.config
        drawn = [self.draw(stream, request, among.get(stream.name)) for stream in streams]
        rows, claims = join_rows([part.rows for part in drawn]), _apart([part.claims for part in drawn])
        starts = np.cumsum([0, *(len(part.rows) for part in drawn)])
        # Which rows can be placed, and the sample of each: of a source with several examples of one, the first goes with the
        # first of the others, and so on.
        places = np.concatenate([start + part.order for start, part in zip(starts, drawn, strict=False)])
        keys = np.concatenate([_numbered(part) for part in drawn], axis=1)
        _, sample = np.unique(keys, axis=1, return_inverse=True)
        order = np.lexsort((places, sample.ravel()))
        members = Lists.from_counts(np.bincount(sample.ravel()), places[order])
        whole = Claims(_of_members(claims.holds, members), _of_members(claims.shuns, members), claims.distinct)
        samples = request.random("samples").permutation(len(members))
        made = arrange(samples, config.batch_size, whole, keep_small=not config.drop_last)
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
        epoch = EpochBatches(rows.take(sorted_rows), Lists.from_counts(counts, rows.example).offsets, +dropped, details)
        return epoch.ordered(request.random("order of batches").permutation(len(epoch)))


def _numbered(part: Drawn) -> Rows:
    """[2, n] for each row that can be placed, in its order: its sample, and how many of the sample stood before it."""
    if part.stream.samples is None:
        raise BadInputError(
            "batches of kind 'patterns' want to know which examples are of one sample", where="batches.kind"
        )
    samples = part.stream.samples[part.order]
    order = np.argsort(samples, kind="stable")
    first = np.searchsorted(samples[order], samples[order])
    rank = np.empty(len(samples), dtype=np.int64)
    rank[order] = np.arange(len(samples)) - first
    return np.stack([samples, rank])


def _apart(parts: Sequence[Claims]) -> Claims:
    """The claims of several sources, whose items are no longer the same where two sources bring one."""
    holds, shuns, base = [], [], 0
    for part in parts:
        holds.append(Lists(part.holds.offsets, part.holds.values + base))
        shuns.append(Lists(part.shuns.offsets, part.shuns.values + base))
        base += max(int(part.holds.values.max(initial=-1)), int(part.shuns.values.max(initial=-1))) + 1
    return Claims(join_lists(holds), join_lists(shuns), any(part.distinct for part in parts))


def _of_members(claims: Lists, members: Lists) -> Lists:
    """For each sample the claims of all its rows."""
    of_rows = claims.take(members.values)
    counts = np.bincount(members.owners(), weights=of_rows.lengths, minlength=len(members)).astype(np.int64)
    return Lists.from_counts(counts, of_rows.values)
