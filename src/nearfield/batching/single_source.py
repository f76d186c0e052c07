"""Batches of one source each, and what the planners of finer batches share with it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nearfield.batching.config import SeparatedConfig, ShuffledConfig
from nearfield.batching.drawing import Stream
from nearfield.batching.fitting import arrange
from nearfield.batching.planner import NOT_FILLED, NOT_REACHED, Drawn, EpochBatches, Request, StreamPlanner
from nearfield.batching.rows import Lists, PlannedRows, Rows, join_rows
from nearfield.batching.sampling import order_batches, targets
from nearfield.batching.shuffled import ShuffledPlanner


@dataclasses.dataclass
class _Made:
    """Batches of one stream."""

    rows: PlannedRows
    sizes: Rows
    moved: int
    left: int
    unusable: int = 0
    """Examples that could be in no batch."""


class SingleSourcePlanner(StreamPlanner):
    """Shuffled batches of one stream each.

    Subclasses say by ``groups`` which rows may share a batch, and in which order they are cut.
    """

    config: SeparatedConfig

    def strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        """(n,) the stratum of each row of a stream, from 0 on or -1, and what there is to tell of them."""
        return np.full(len(stream), -1, dtype=np.int64), {}

    def groups(self, drawn: Drawn, strata: Rows, request: Request, turn: int) -> Iterator[Rows]:
        """Orders of rows, each to be cut into batches by itself."""
        yield drawn.order

    def finish(self, drawn: Drawn, rows: PlannedRows, sizes: Rows, request: Request) -> PlannedRows:
        """A last change to a stream's batches of these sizes that leaves each row where it is."""
        return rows

    def plan_streams(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> EpochBatches:
        """The batches of one epoch."""
        config = self.config
        dropped: Counter[str] = Counter()
        details: dict[str, Any] = {"moved": 0, "repeated": 0}
        among, others = self._mixed_rows(streams, request, among)
        made, base, strata_of = [], 0, []
        for stream in streams:
            strata, about = self.strata(stream, request)
            if about:
                details.setdefault("strata", {})[stream.name] = about
            strata_of.append(strata)
            drawn = self.draw(stream, request, among.get(stream.name))
            dropped.update(drawn.dropped)
            unusable = sum(drawn.dropped.values())
            made.append(dataclasses.replace(self._batches(drawn, strata, base, request, 0), unusable=unusable))
            base += int(strata.max(initial=-1)) + 1
            dropped[NOT_FILLED] += made[-1].left
            details["moved"] += made[-1].moved
        wanted = targets(config.sampling, [stream.name for stream in streams], [len(one.sizes) for one in made])
        parts, base = [], 0
        for stream, strata, first, count in zip(streams, strata_of, made, wanted, strict=True):
            part = EpochBatches(first.rows, Lists.from_counts(first.sizes, first.rows.example).offsets)
            if count < len(part):
                chosen = np.sort(request.random("chosen", stream.name).permutation(len(part))[:count])
                dropped[NOT_REACHED] += len(part.rows) - int(part.sizes[chosen].sum())
                part = part.ordered(chosen)
            elif count > len(part):
                part, repeated = self._again(part, count, stream, strata, base, request, among.get(stream.name))
                details["repeated"] += repeated
                # An example that found no room at first has perhaps found some now.
                dropped[NOT_FILLED] -= first.left - min(
                    first.left, max(0, self._unplaced(stream, part, among) - first.unusable)
                )
            base += int(strata.max(initial=-1)) + 1
            parts.append(part)
        mixed = self._mixed_batches(streams, request, others)
        if mixed is not None:
            dropped.update(mixed.dropped)
            for name in ("moved", "repeated"):
                details[name] += mixed.details[name]
            details["mixed_batches"] = len(mixed)
        everything = [*parts, *([mixed] if mixed is not None else [])]
        sizes = np.concatenate([np.empty(0, dtype=np.int64), *(part.sizes for part in everything)])
        rows = join_rows([part.rows for part in everything])
        epoch = EpochBatches(rows, Lists.from_counts(sizes, rows.example).offsets, +dropped, details)
        counts = [len(part) for part in parts]
        random = request.random("order of batches")
        return epoch.ordered(order_batches(config.sampling, counts, len(mixed) if mixed is not None else 0, random))

    @staticmethod
    def _unplaced(stream: Stream, part: EpochBatches, among: Mapping[str, Rows]) -> int:
        """Examples of a stream that are in none of its batches."""
        available = stream.examples[among[stream.name]] if stream.name in among else stream.examples
        return len(np.setdiff1d(available, part.rows.example))

    def _batches(self, drawn: Drawn, strata: Rows, base: int, request: Request, turn: int) -> _Made:
        config = self.config
        made = [
            arrange(order, config.batch_size, drawn.claims, keep_small=not config.drop_last)
            for order in self.groups(drawn, strata, request, turn)
        ]
        none = np.empty(0, dtype=np.int64)
        places = np.concatenate([none, *(one.rows for one in made)])
        sizes = np.concatenate([none, *(one.sizes for one in made)])
        stratum = strata[places]
        rows = self.finish(drawn, dataclasses.replace(drawn.rows.take(places), stratum=stratum), sizes, request)
        rows = dataclasses.replace(rows, stratum=np.where(stratum >= 0, stratum + base, -1))
        return _Made(rows, sizes, sum(one.moved for one in made), len(drawn.order) - len(places))

    def _again(
        self,
        part: EpochBatches,
        count: int,
        stream: Stream,
        strata: Rows,
        base: int,
        request: Request,
        among: Rows | None,
    ) -> tuple[EpochBatches, int]:
        """Begin a stream anew until it has ``count`` batches; also, how many rows that repeats."""
        turn, rows, sizes = 0, [part.rows], [part.sizes]
        missing = count - len(part)
        while missing > 0:
            turn += 1
            more = self._batches(self.draw(stream, request, among, turn), strata, base, request, turn)
            chosen = np.sort(request.random("chosen", stream.name, turn).permutation(len(more.sizes))[:missing])
            taken = EpochBatches(more.rows, Lists.from_counts(more.sizes, more.rows.example).offsets).ordered(chosen)
            if not len(taken):
                break
            rows.append(taken.rows)
            sizes.append(taken.sizes)
            missing -= len(taken)
        joined = join_rows(rows)
        whole = EpochBatches(joined, Lists.from_counts(np.concatenate(sizes), joined.example).offsets)
        return whole, len(joined) - len(part.rows)

    def _mixed_rows(
        self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]
    ) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """The rows for this kind's batches, and those for batches that mix the streams."""
        share = self.config.homogeneous
        own: dict[str, Rows] = dict(among)
        others: dict[str, Rows] = {}
        if share == 1:
            return own, others
        for stream in streams:
            available = among.get(stream.name, np.arange(len(stream), dtype=np.int64))
            random = request.random("homogeneous", stream.name)
            own[stream.name] = self.portion(stream, available, round(share * len(available)), request, random)
            others[stream.name] = np.setdiff1d(available, own[stream.name], assume_unique=True)
        return own, others

    def _mixed_batches(
        self, streams: Sequence[Stream], request: Request, others: Mapping[str, Rows]
    ) -> EpochBatches | None:
        if not others:
            return None
        shared = {name: getattr(self.config, name) for name in self.config.shared_settings()}
        return ShuffledPlanner(ShuffledConfig(**shared)).plan_streams(streams, request, others)
