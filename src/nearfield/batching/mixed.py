"""A mixture of planners: each gets a share of the examples, anew each epoch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nearfield.batching.config import MixedConfig
from nearfield.batching.drawing import Stream
from nearfield.batching.planner import EpochBatches, Request, StreamPlanner
from nearfield.batching.rows import Lists, Rows, join_rows


class MixedPlanner(StreamPlanner):
    """Deals the rows of each stream to its parts by weight; the batches of all parts are shuffled together.

    A part of communities takes whole communities, so it is served before the others.
    """

    config: MixedConfig

    def __init__(self, config: MixedConfig) -> None:
        super().__init__(config)
        self.parts = [part.build() for part in config.part_configs]

    def plan_streams(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> EpochBatches:
        """The batches of one epoch."""
        shares = self._deal(streams, request, among)
        dropped: Counter[str] = Counter()
        made, strata = [], 0
        details: dict[str, Any] = {"parts": []}
        for number, (planner, share) in enumerate(zip(self.parts, shares, strict=True)):
            part = planner.plan_streams(streams, dataclasses.replace(request, part=number), share)
            stratum = np.where(part.rows.stratum >= 0, part.rows.stratum + strata, -1)
            strata = max(strata, int(stratum.max(initial=-1)) + 1)
            part.rows = dataclasses.replace(part.rows, stratum=stratum)
            made.append(part)
            dropped.update(part.dropped)
            kind = self.config.parts[number].planner.kind
            details["parts"].append({"kind": kind, "batches": len(part), **part.details})
        for name in ("moved", "repeated"):
            details[name] = sum(part.details[name] for part in made)
        rows = join_rows([part.rows for part in made])
        sizes = np.concatenate([part.sizes for part in made])
        epoch = EpochBatches(rows, Lists.from_counts(sizes, rows.example).offsets, +dropped, details)
        # Where a part has an order of its own (turns), it keeps it: only who comes next is shuffled.
        counts = [len(part) for part in made]
        turns = request.random("order of parts").permutation(np.repeat(np.arange(len(made)), counts))
        order = np.empty(len(turns), dtype=np.int64)
        order[np.argsort(turns, kind="stable")] = np.arange(len(turns))
        return epoch.ordered(order)

    def _deal(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> list[dict[str, Rows]]:
        weights = np.asarray([part.weight for part in self.config.parts])
        edges = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        kinds = [part.planner.kind for part in self.config.parts]
        served = sorted(range(len(kinds)), key=lambda number: (kinds[number] != "communities", number))
        shares: list[dict[str, Rows]] = [{} for _ in kinds]
        for stream in streams:
            available = among.get(stream.name, np.arange(len(stream), dtype=np.int64))
            # Rounded edges, so that the parts' numbers add up.
            numbers = np.diff(np.round(edges * len(available)).astype(np.int64))
            for number in served[:-1]:
                random = request.random("part", stream.name, number)
                mine = self.parts[number].portion(stream, available, int(numbers[number]), request, random)
                shares[number][stream.name] = mine
                available = np.setdiff1d(available, mine, assume_unique=True)
            shares[served[-1]][stream.name] = available
        return shares
