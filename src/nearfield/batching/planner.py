"""What every planner takes and gives, and the way that all of them go."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.batching.claims import Claims, make_claims, repeats_itself
from nearfield.batching.config import CommonConfig
from nearfield.batching.drawing import Stream, draw, make_streams
from nearfield.batching.rows import Lists, PlannedRows, Rows, SourceExamples, join_rows
from nearfield.errors import BadInputError
from nearfield.randomness import derive_seed, generator

if TYPE_CHECKING:
    from nearfield.data.store import KnownPositives

__all__ = ["EpochBatches", "Rows", "SourceExamples", "StreamPlanner", "VectorsOf"]

VectorsOf = Callable[[str, Rows], npt.NDArray[np.float32]]
"""(role, item rows) -> a teacher's unit vectors, (n, d)."""

NOT_FILLED = "in a batch that did not fill"
NOT_REACHED = "not reached by the sampling of sources"
REPEATS_ITSELF = "repeats an item in itself"


@dataclass
class EpochBatches:
    """The batches of an epoch in the order of their steps, and what was left out and why."""

    rows: PlannedRows
    """All rows, batch after batch."""
    offsets: Rows
    """[batches + 1]: where in ``rows`` each batch begins."""
    dropped: Counter[str] = field(default_factory=Counter)
    details: dict[str, Any] = field(default_factory=dict)
    """What the planner found: clusters, communities, moved and repeated examples."""

    @classmethod
    def of(cls, batches: Sequence[PlannedRows], **others: Any) -> EpochBatches:
        """From batches one by one."""
        offsets = np.concatenate([[0], np.cumsum([len(batch) for batch in batches], dtype=np.int64)]).astype(np.int64)
        return cls(join_rows(batches), offsets, **others)

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
        lists = Lists(self.offsets, self.rows.example)
        offsets = Lists.from_counts(self.sizes[batches], self.rows.example).offsets
        return EpochBatches(self.rows.take(lists.positions(batches)), offsets, self.dropped, self.details)


@dataclass(frozen=True)
class Request:
    """What a plan is a function of, beside settings and examples."""

    seed: int
    epoch: int
    generation: int = 0
    known: KnownPositives | None = None
    vectors: VectorsOf | None = None
    part: int | None = None
    """Which part of a mixture asks."""

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
    claims: Claims
    order: Rows
    """The rows that can be placed, shuffled."""
    dropped: Counter[str]


class StreamPlanner:
    """The base of the planners: ``plan`` makes streams of sources, ``plan_streams`` makes batches of streams.

    The batches are a function of the settings and of the arguments of ``plan``, nothing else.
    """

    def __init__(self, config: CommonConfig) -> None:
        self.config = config
        self._kept: dict[str, tuple[str, VectorsOf | None, Any]] = {}

    def plan(
        self,
        sources: Sequence[SourceExamples],
        seed: int,
        epoch: int,
        *,
        generation: int = 0,
        known: KnownPositives | None = None,
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
        claims = self.claims(rows, request)
        allowed = np.ones(len(stream), dtype=np.bool_)
        if among is not None:
            allowed[:] = False
            allowed[among] = True
            dropped = Counter({reason: int((~usable & allowed).sum()) for reason in dropped})
        usable = usable & allowed
        if config.duplicates == "forbid":
            twice = repeats_itself(claims) & usable
            if twice.any():
                dropped[REPEATS_ITSELF] += int(twice.sum())
                usable &= ~twice
        order = request.random("rows", stream.name, turn).permutation(len(stream))
        return Drawn(stream, rows, claims, order[usable[order]], +dropped)

    def claims(self, rows: PlannedRows, request: Request) -> Claims:
        """What keeps rows apart under these settings."""
        return make_claims(
            rows,
            distinct=self.config.duplicates == "forbid",
            known=request.known if self.config.known_positives == "forbid" else None,
            distinct_labels=self.config.same_label == "forbid",
        )

    def keep(self, stream: Stream, request: Request, make: Callable[[], Any]) -> Any:
        """What ``make`` finds out about a stream, made once for all epochs."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (stream.examples, stream.queries, stream.representatives()):
            digest.update(np.ascontiguousarray(part).data)
        digest.update(str(request.seed).encode())
        key = digest.hexdigest()
        kept = self._kept.get(stream.name)
        if kept is None or kept[0] != key or kept[1] is not request.vectors:
            self._kept[stream.name] = (key, request.vectors, make())
        return self._kept[stream.name][2]
