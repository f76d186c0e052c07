"""What the loss of a batch and its gradient take of memory: measured on a part of a batch, in the way the whole is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nearfield.objectives.infonce import InfoNCE
from nearfield.training.chunks import cut_batch
from nearfield.training.exchange import contrastive_batch
from nearfield.training.measure import Line, bytes_of, fit_line

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.batching.plan import Batch
    from nearfield.training.engine import Engine

_CELLS = 1 << 20
_TILE = 256


@dataclass(frozen=True)
class LossCost:
    """Bytes of the loss on each rank, above those of the embeddings."""

    lines: Mapping[str, Line]
    """For each implementation that the run's heavy batches ask for: bytes by embeddings, and by cells held at a time."""
    parts: Sequence[InfoNCE]
    """The objective's own, which choose the implementation."""
    device: torch.device
    ranks: int
    queued: int = 0
    """Documents of earlier steps."""
    held: float = 0.0
    """Bytes of them."""
    ring: bool = False
    """Whether a rank holds two parts of the batch at a time instead of the whole."""

    def __call__(self, batch: Batch) -> float:
        """Of a batch."""
        name = "blockwise" if self.ring else implementation(self.parts, batch, self.device, self.ranks, self.queued)
        if name not in self.lines:  # a batch that is smaller than the heavy ones
            name = next(iter(self.lines))
        return self.held + self.lines[name](*self.size(batch, name))

    def size(self, batch: Batch, name: str) -> tuple[int, int]:
        """Embeddings, and cells held at a time."""
        embeddings = len(batch.query) + sum(_documents(batch))
        if name == "dense":
            return embeddings, _logits(self.parts, batch, self.ranks, self.queued)
        tile = max(part.tile for part in self.parts)
        columns = sum(_documents(batch))
        if self.ring:
            embeddings, columns = 2 * -(-embeddings // self.ranks), -(-columns // self.ranks)
        return embeddings, min(-(-len(batch.query) // self.ranks), tile) * min(columns, tile)


def implementation(parts: Sequence[InfoNCE], batch: Batch, device: torch.device, ranks: int, queued: int = 0) -> str:
    """How the logits of a batch are computed: ``blockwise`` only if no part of the objective holds the matrix."""
    found = {part.choose(_logits([part], batch, ranks, queued), device) for part in parts}
    return "blockwise" if found == {"blockwise"} else "dense"


def _documents(batch: Batch) -> tuple[int, int]:
    """Positives and negatives."""
    return sum(map(len, batch.positives)), sum(map(len, batch.negatives))


def _logits(parts: Sequence[InfoNCE], batch: Batch, ranks: int, queued: int) -> int:
    queries, documents = len(batch.query), _documents(batch)
    return sum(part.logits(queries, *documents, ranks, queued) for part in parts) or queries * sum(documents) // ranks


def measure_loss(engine: Engine, batches: Sequence[Batch], known_positives: Callable[[int], Rows]) -> LossCost:
    """Measure the loss on parts of the widest of some batches, with random embeddings; collective.

    A part is at most some million cells. Where the whole batch is computed in tiles the part is too, in smaller ones.
    """
    parts = [part for part in engine.objective.modules() if isinstance(part, InfoNCE)]
    device, ranks = engine.backend.device, engine.launch.world_size
    widest = max(batches, key=lambda batch: len(batch.query) * sum(_documents(batch)))
    size = min(len(widest.query), int(math.sqrt(_CELLS * len(widest.query) / max(1, sum(_documents(widest))))))
    lines: dict[str, Line] = {}
    queued = 0 if engine.queue is None else engine.queue.size
    # A part is measured on one rank's account, whatever the number of ranks, and before anything is queued.
    one = LossCost(lines, parts, device, 1)
    names = ["blockwise" if engine.ring else implementation(parts, batch, device, ranks, queued) for batch in batches]
    for name in dict.fromkeys(names):
        points = []
        # Of three sizes or tiles: what is fixed, what each text takes, and each cell.
        for queries, tile in ((size, _TILE), (size, _TILE // 2), (size // 2, _TILE), (size // 4, _TILE)):
            part = cut_batch(widest, 0, max(2, queries))
            with _computed(parts, name, tile):
                points.append((*one.size(part, name), _measure(engine, part, known_positives)))
        lines[name] = fit_line(points)
    return LossCost(lines, parts, device, ranks, queued, 4.0 * queued * engine.dimension, engine.ring)


@contextmanager
def _computed(parts: Sequence[InfoNCE], implementation: str, tile: int) -> Iterator[None]:
    """Compute in this way, with tiles of this size."""
    before = [(part.implementation, part.tile) for part in parts]
    for part in parts:
        part.implementation, part.tile = implementation, tile
    try:
        yield
    finally:
        for part, (name, size) in zip(parts, before, strict=True):
            part.implementation, part.tile = name, size


def _measure(engine: Engine, batch: Batch, known_positives: Callable[[int], Rows]) -> int:
    """The most bytes at a time that the loss of a batch takes."""
    pool = engine.pool(batch)
    known = [known_positives(int(query)) for query in batch.query]
    device = engine.backend.device
    leaf = torch.randn(len(pool.items), engine.columns, device=device).requires_grad_()
    learnt = [p for p in engine.objective.parameters() if p.requires_grad]

    def run(look: Callable[[], None]) -> None:
        contrastive = contrastive_batch(pool, leaf, known, draw=0, guide=engine.feed.guide)
        loss = engine.objective.forward(contrastive)
        loss.gradients([leaf, *learnt])

    with engine.backend.whole(learnt):
        _, peak = bytes_of(device, run)
    return peak
