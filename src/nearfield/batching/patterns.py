"""Batches of whole samples, whose sources are patterns of them: one forward scores all that a sample has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nearfield.arrays import Ragged, Rows, concatenate, occurrences, starts
from nearfield.batching.assign import Conflicts, assign
from nearfield.batching.planner import NOT_FILLED, Drawn, EpochBatches, Request, StreamPlanner
from nearfield.batching.streams import Stream, join_rows
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.batching.config import PatternsConfig


class PatternsPlanner(StreamPlanner):
    """Samples in one order, cut into batches; within a batch the rows stand source by source."""

    config: PatternsConfig

    def plan_streams(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> EpochBatches:
        """The batches. Two samples conflict where two examples of one source do: sources never meet in the loss."""
        config = self.config
        drawn = [self.draw(stream, request, among.get(stream.name)) for stream in streams]
        rows, conflicts = join_rows([part.rows for part in drawn]), _apart([part.conflicts for part in drawn])
        begins = starts([len(part.rows) for part in drawn])
        # Which rows can be placed, and the sample of each: of a source with several examples of one, the first goes with the
        # first of the others, and so on.
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
