"""Shuffled batches that mix the examples of all sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from nearfield.batching.config import ShuffledConfig
from nearfield.batching.drawing import Stream
from nearfield.batching.fitting import arrange
from nearfield.batching.planner import NOT_FILLED, NOT_REACHED, EpochBatches, Request, StreamPlanner
from nearfield.batching.rows import Lists, Rows, join_rows
from nearfield.batching.sampling import targets


def in_runs(order: Rows, source: Rows, size: int, random: np.random.Generator) -> Rows:
    """An order of rows in which ``size`` rows of one source follow each other, run after run; ``source`` (n,) is each row's.

    Rows that fill no run come last.
    """
    runs, rest = [], []
    for number in np.unique(source):
        mine = order[source[order] == number]
        whole = len(mine) // size * size
        runs += list(mine[:whole].reshape(-1, size))
        rest.append(mine[whole:])
    return np.concatenate([*(runs[i] for i in random.permutation(len(runs))), *rest])


class ShuffledPlanner(StreamPlanner):
    """All sources' examples in one order, cut into batches: the classic way."""

    config: ShuffledConfig

    def plan_streams(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> EpochBatches:
        """The batches; the sampling of sources counts examples here, not batches."""
        config = self.config
        dropped: Counter[str] = Counter()
        drawn = [self.draw(stream, request, among.get(stream.name)) for stream in streams]
        wanted = targets(config.sampling, [stream.name for stream in streams], [len(part.order) for part in drawn])
        parts, repeated = [], 0
        for part, count in zip(drawn, wanted, strict=True):
            dropped.update(part.dropped)
            rest, turn = count - len(part.order), 0
            dropped[NOT_REACHED] += max(0, -rest)
            parts.append(part.rows.take(part.order[:count]))
            while rest > 0 and len(part.order):
                turn += 1
                part = self.draw(part.stream, request, among.get(part.stream.name), turn)
                parts.append(part.rows.take(part.order[:rest]))
                repeated += len(parts[-1])
                rest -= len(parts[-1])
        rows = join_rows(parts)
        order = request.random("mixing").permutation(len(rows))
        if config.run > 1:
            order = in_runs(order, rows.source, config.run, request.random("runs"))
        made = arrange(order, config.batch_size, self.claims(rows, request), keep_small=not config.drop_last)
        dropped[NOT_FILLED] += len(made.left)
        offsets = Lists.from_counts(made.sizes, rows.example).offsets
        details = {"moved": made.moved, "repeated": repeated}
        epoch = EpochBatches(rows.take(made.rows), offsets, +dropped, details)
        return epoch.ordered(request.random("order of batches").permutation(len(epoch)))
