"""The planners: which examples meet in which batch. Read from the last class of a kind upwards.

``plan`` turns sources into streams (:mod:`.streams`), draws each example's positives and negatives, and cuts an order of
rows into batches without conflicts (:mod:`.assign`). The kinds differ in the order: shuffled over all sources, one source a
batch, one cluster a batch, or unions of communities (both in :mod:`.groups`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.arrays import Floats, Ragged, Rows, Vectors, occurrences, ranges, starts
from nearfield.batching.assign import Conflicts, assign, find_conflicts, repeats_itself
from nearfield.batching.streams import PlannedRows, SourceExamples, Stream, draw, join_rows, make_streams
from nearfield.errors import BadInputError
from nearfield.provenance import derive_seed, generator

if TYPE_CHECKING:
    from nearfield.batching.config import (
        MixedConfig,
        PlannerSettings,
        SeparatedConfig,
        ShuffledConfig,
        SourceSampling,
    )

VectorsOf = Callable[[str, Rows], Vectors]
"""(role, item rows) -> a teacher's unit vectors, (n, d)."""

NOT_FILLED = "in a batch that did not fill"
NOT_REACHED = "not reached by the sampling of sources"
REPEATS_ITSELF = "the same item twice in one example"


@dataclass
class EpochBatches:
    """The batches of an epoch in the order of their steps, and what was left out and why."""

    rows: PlannedRows
    """All rows, batch after batch."""
    offsets: Rows
    """[batches + 1]: where in ``rows`` each batch begins."""
    dropped: Counter[str] = field(default_factory=Counter)
    details: dict[str, Any] = field(default_factory=dict)
    """Figures of the planner: clusters, communities, moved and repeated examples."""

    @classmethod
    def of(cls, batches: Sequence[PlannedRows], **others: Any) -> EpochBatches:
        """From batches one by one."""
        return cls(join_rows(batches), starts([len(batch) for batch in batches]), **others)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Rows:
        """(batches,)"""
        sizes: Rows = np.diff(self.offsets)
        return sizes

    def batch_of_rows(self) -> Rows:
        """(rows,) the batch of each row."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)

    def batch(self, number: int) -> PlannedRows:
        """The rows of one batch."""
        return self.rows.take(np.arange(self.offsets[number], self.offsets[number + 1]))

    def ordered(self, batches: Rows) -> EpochBatches:
        """These batches, in this order."""
        sizes = self.sizes[batches]
        rows = self.rows.take(ranges(self.offsets[batches], sizes))
        return EpochBatches(rows, starts(sizes), self.dropped, self.details)


@dataclass(frozen=True)
class Request:
    """The inputs of a plan beside settings and examples."""

    seed: int
    epoch: int
    generation: int = 0
    known: Ragged | None = None
    """The known positives of each item."""
    vectors: VectorsOf | None = None
    part: int | None = None
    """The part of a mixture that asks."""

    def random(self, use: str, *names: str | int) -> np.random.Generator:
        """The generator of one use in this epoch. The use comes first, so that no source's name can make two alike."""
        use = use if self.part is None else f"{use} of part {self.part}"
        return generator(self.seed, "plan", use, self.epoch, self.generation, *names)

    def fixed_seed(self, use: str, name: str) -> int:
        """A seed that is the same in all epochs."""
        return derive_seed(self.seed, "plan", use, name)

    def need_vectors(self, kind: str) -> VectorsOf:
        """The vectors, which this kind cannot do without."""
        if self.vectors is None:
            raise BadInputError(
                f"batches of kind {kind!r} are made of a teacher's vectors, and there are none",
                where="batches.kind",
                hint="Name a teacher in the recipe, or use kind: single_source.",
            )
        return self.vectors


@dataclass
class Drawn:
    """The examples of a stream with what was chosen for them in an epoch, and those of them that can be placed."""

    stream: Stream
    rows: PlannedRows
    conflicts: Conflicts
    order: Rows
    """The rows that can be placed, shuffled."""
    dropped: Counter[str]


class StreamPlanner:
    """The base of the planners: ``plan`` makes streams of sources, ``plan_streams`` makes batches of streams.

    The batches are a function of the settings and of the arguments of ``plan``, nothing else.
    """

    whole_groups = False
    """Whether its part of a mixture is whole groups of rows, and so must be taken before the other parts'."""

    def __init__(self, config: PlannerSettings) -> None:
        self.config = config
        self._remembered: dict[str, tuple[str, VectorsOf | None, Any]] = {}

    def plan(
        self,
        sources: Sequence[SourceExamples],
        seed: int,
        epoch: int,
        *,
        generation: int = 0,
        known: Ragged | None = None,
        vectors: VectorsOf | None = None,
    ) -> EpochBatches:
        """The batches of one epoch; ``generation`` numbers the pool of negatives that the examples come with."""
        request = Request(seed, epoch, generation, known, vectors)
        return self.plan_streams(make_streams(sources, self.config.pools), request, {})

    def plan_streams(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> EpochBatches:
        """The batches of streams; ``among`` names the rows of a stream that may be used, where not all may."""
        raise NotImplementedError

    def portion(
        self, stream: Stream, available: Rows, wanted: int, request: Request, random: np.random.Generator
    ) -> Rows:
        """The rows of a stream, of those that are available, that this planner takes for its part of a mixture."""
        return np.sort(random.permutation(available)[:wanted])

    def draw(self, stream: Stream, request: Request, among: Rows | None, turn: int = 0) -> Drawn:
        """Choose positives and negatives of a stream's rows and shuffle those that can be placed.

        ``turn`` counts how often the epoch begins the stream anew.
        """
        config = self.config
        rows, usable, dropped = draw(stream, config, request.random("draw", stream.name, turn))
        conflicts = self.conflicts(rows, request)
        if among is not None:
            allowed = np.zeros(len(stream), dtype=np.bool_)
            allowed[among] = True
            dropped = Counter({reason: int((~usable & allowed).sum()) for reason in dropped})
            usable = usable & allowed
        if config.duplicates == "forbid":
            twice = repeats_itself(conflicts) & usable
            if twice.any():
                dropped[REPEATS_ITSELF] += int(twice.sum())
                usable &= ~twice
        order = request.random("rows", stream.name, turn).permutation(len(stream))
        return Drawn(stream, rows, conflicts, order[usable[order]], +dropped)

    def conflicts(self, rows: PlannedRows, request: Request) -> Conflicts:
        """The conflicts between rows under these settings."""
        return find_conflicts(
            rows,
            distinct=self.config.duplicates == "forbid",
            known=request.known if self.config.known_positives == "forbid" else None,
            distinct_labels=self.config.same_label == "forbid",
        )

    def remember(self, stream: Stream, request: Request, make: Callable[[], Any]) -> Any:
        """The value that ``make`` computes about a stream, once for all epochs."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (stream.examples, stream.queries, stream.representatives()):
            digest.update(np.ascontiguousarray(part).data)
        digest.update(str(request.seed).encode())
        key = digest.hexdigest()
        before = self._remembered.get(stream.name)
        if before is None or before[0] != key or before[1] is not request.vectors:
            self._remembered[stream.name] = (key, request.vectors, make())
        return self._remembered[stream.name][2]


# How many batches of each source


def targets(sampling: SourceSampling, names: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """How many of each stream's ``sizes`` batches the epoch takes; more than there are means to begin it anew.

    A stream that has none gets none, and does not end the epoch of the others.
    """
    shares, exponent = sampling.weights, sampling.exponent
    if shares:
        _check_names(shares, names)
    if exponent is None or not any(sizes):
        return list(sizes)
    counts = np.asarray(sizes, dtype=np.float64)
    weights = np.asarray([shares.get(name, 1.0) for name in names], dtype=np.float64) * counts**exponent
    weights = np.where(counts > 0, weights, 0.0)
    weights /= weights.sum()
    if sampling.repeats:
        return _round(weights * counts.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = float(np.where(weights > 0, counts / weights, np.inf).min())
    return [min(int(w * whole + 1e-6), size) for w, size in zip(weights, sizes, strict=True)]


def _round(shares: Floats) -> list[int]:
    """Whole numbers with the same sum: the largest remainders are rounded up."""
    whole = np.floor(shares + 1e-9).astype(np.int64)
    missing = round(float(shares.sum())) - int(whole.sum())
    whole[np.argsort(whole - shares, kind="stable")[:missing]] += 1
    return [int(value) for value in whole]


def _check_names(shares: Mapping[str, float], names: Sequence[str]) -> None:
    for name in shares:
        if name not in names:
            raise BadInputError(
                f"a share is given to {name!r}, which is no source or pool that is trained on",
                where="batches.sampling.shares",
                hint=f"Sources: {', '.join(names)}.",
            )
    missing = [name for name in names if name not in shares]
    if missing:
        raise BadInputError(f"{', '.join(missing)} has no share", where="batches.sampling.shares")


def order_batches(turns: bool, counts: Sequence[int], mixed: int, random: np.random.Generator) -> Rows:
    """The order of an epoch's batches, which are numbered stream after stream, the ``mixed`` ones last.

    All are shuffled. With ``turns`` the streams then take turns, and batches that mix streams stand anywhere between.
    """
    order = random.permutation(sum(counts) + mixed)
    if not turns:
        return order
    stream = np.repeat(np.arange(len(counts) + 1), [*counts, mixed])[order]
    separate = stream < len(counts)
    turn = occurrences(stream)
    result = order.copy()
    result[separate] = order[separate][np.lexsort((stream[separate], turn[separate]))]
    return result


# Batches that mix sources


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
            missing, turn = count - len(part.order), 0
            dropped[NOT_REACHED] += max(0, -missing)
            parts.append(part.rows.take(part.order[:count]))
            while missing > 0 and len(part.order):
                turn += 1
                part = self.draw(part.stream, request, among.get(part.stream.name), turn)
                parts.append(part.rows.take(part.order[:missing]))
                repeated += len(parts[-1])
                missing -= len(parts[-1])
        rows = join_rows(parts)
        order = request.random("mixing").permutation(len(rows))
        if config.run > 1:
            order = in_runs(order, rows.source, config.run, request.random("runs"))
        made = assign(order, config.batch_size, self.conflicts(rows, request), keep_small=not config.drop_last)
        dropped[NOT_FILLED] += len(made.left)
        details = {"moved": made.moved, "repeated": repeated}
        epoch = EpochBatches(rows.take(made.rows), starts(made.sizes), +dropped, details)
        return epoch.ordered(request.random("order of batches").permutation(len(epoch)))


# Batches of one source each


class SingleSourcePlanner(StreamPlanner):
    """Shuffled batches of one stream each.

    Subclasses say by ``groups`` which rows may share a batch, and in which order they are cut.
    """

    config: SeparatedConfig

    def strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        """(n,) the stratum of each row of a stream, from 0 on or -1, and figures of them."""
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
        details: dict[str, Any] = {"moved": 0, "repeated": 0}
        among, others = self._mixed_rows(streams, request, among)
        made: list[EpochBatches] = []
        first_stratum, next_stratum = [], 0
        strata_of = []
        for stream in streams:
            strata, about = self.strata(stream, request)
            if about:
                details.setdefault("strata", {})[stream.name] = about
            strata_of.append(strata)
            first_stratum.append(next_stratum)
            made.append(self._batches(stream, strata, next_stratum, request, among.get(stream.name), 0))
            next_stratum += int(strata.max(initial=-1)) + 1
            details["moved"] += made[-1].details["moved"]
        wanted = targets(config.sampling, [stream.name for stream in streams], [len(part) for part in made])
        dropped = sum((part.dropped for part in made), Counter[str]())
        parts = []
        for number, (stream, part, count) in enumerate(zip(streams, made, wanted, strict=True)):
            rows = among.get(stream.name)
            if count < len(part):
                chosen = np.sort(request.random("chosen", stream.name).permutation(len(part))[:count])
                dropped[NOT_REACHED] += len(part.rows) - int(part.sizes[chosen].sum())
                part = part.ordered(chosen)
            elif count > len(part):
                left, unusable = part.dropped[NOT_FILLED], part.dropped.total() - part.dropped[NOT_FILLED]
                before = len(part.rows)
                part = self._again(part, count, stream, strata_of[number], first_stratum[number], request, rows)
                details["repeated"] += len(part.rows) - before
                # An example that found no room at first may have found some now.
                available = stream.examples if rows is None else stream.examples[rows]
                unplaced = len(np.setdiff1d(available, part.rows.example)) - unusable
                dropped[NOT_FILLED] -= left - min(left, max(0, unplaced))
            parts.append(part)
        counts = [len(part) for part in parts]
        if others:
            mixed = config.over_all_sources().build().plan_streams(streams, request, others)
            dropped.update(mixed.dropped)
            for name in ("moved", "repeated"):
                details[name] += mixed.details[name]
            details["mixed_batches"] = len(mixed)
            parts.append(mixed)
        epoch = join_batches(parts, +dropped, details)
        random = request.random("order of batches")
        return epoch.ordered(order_batches(config.sampling.turns, counts, len(epoch) - sum(counts), random))

    def _batches(
        self, stream: Stream, strata: Rows, first: int, request: Request, among: Rows | None, turn: int
    ) -> EpochBatches:
        """Batches of one stream, whose strata are numbered from ``first`` on in the plan."""
        config, drawn = self.config, self.draw(stream, request, among, turn)
        made = [
            assign(order, config.batch_size, drawn.conflicts, keep_small=not config.drop_last)
            for order in self.groups(drawn, strata, request, turn)
        ]
        none = np.empty(0, dtype=np.int64)
        places = np.concatenate([none, *(one.rows for one in made)])
        sizes = np.concatenate([none, *(one.sizes for one in made)])
        stratum = strata[places]
        rows = self.finish(drawn, dataclasses.replace(drawn.rows.take(places), stratum=stratum), sizes, request)
        rows = dataclasses.replace(rows, stratum=np.where(stratum >= 0, stratum + first, -1))
        dropped = drawn.dropped + Counter({NOT_FILLED: len(drawn.order) - len(places)})
        return EpochBatches(rows, starts(sizes), dropped, {"moved": sum(one.moved for one in made)})

    def _again(
        self,
        part: EpochBatches,
        count: int,
        stream: Stream,
        strata: Rows,
        first: int,
        request: Request,
        among: Rows | None,
    ) -> EpochBatches:
        """Begin a stream anew until it has ``count`` batches."""
        turn, parts = 0, [part]
        missing = count - len(part)
        while missing > 0:
            turn += 1
            more = self._batches(stream, strata, first, request, among, turn)
            chosen = np.sort(request.random("chosen", stream.name, turn).permutation(len(more))[:missing])
            if not len(chosen):
                break
            parts.append(more.ordered(chosen))
            missing -= len(chosen)
        return join_batches(parts, part.dropped, part.details)

    def _mixed_rows(
        self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]
    ) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """The rows for this kind's batches, and those for batches that mix the streams."""
        share = self.config.homogeneous
        single: dict[str, Rows] = dict(among)
        others: dict[str, Rows] = {}
        if share == 1:
            return single, others
        for stream in streams:
            available = among.get(stream.name, np.arange(len(stream), dtype=np.int64))
            random = request.random("homogeneous", stream.name)
            single[stream.name] = self.portion(stream, available, round(share * len(available)), request, random)
            others[stream.name] = np.setdiff1d(available, single[stream.name], assume_unique=True)
        return single, others


def join_batches(parts: Sequence[EpochBatches], dropped: Counter[str], details: dict[str, Any]) -> EpochBatches:
    """The batches of all parts, one after another."""
    sizes = np.concatenate([np.empty(0, dtype=np.int64), *(part.sizes for part in parts)])
    return EpochBatches(join_rows([part.rows for part in parts]), starts(sizes), dropped, details)


# Mixtures of kinds


class MixedPlanner(StreamPlanner):
    """Deals the rows of each stream to its parts by weight, anew each epoch; the batches of all parts are shuffled together.

    A part that takes whole groups of rows is served before the others.
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
        epoch = join_batches(made, +dropped, details)
        # Where a part has an order of its own (turns), it keeps it: only who comes next is shuffled.
        turns = request.random("order of parts").permutation(np.repeat(np.arange(len(made)), [len(p) for p in made]))
        order = np.empty(len(turns), dtype=np.int64)
        order[np.argsort(turns, kind="stable")] = np.arange(len(turns))
        return epoch.ordered(order)

    def _deal(self, streams: Sequence[Stream], request: Request, among: Mapping[str, Rows]) -> list[dict[str, Rows]]:
        weights = np.asarray([part.weight for part in self.config.parts])
        edges = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        served = sorted(range(len(self.parts)), key=lambda number: (not self.parts[number].whole_groups, number))
        shares: list[dict[str, Rows]] = [{} for _ in self.parts]
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
