"""What a piece of a step takes of memory and time: measured by running it, without leaving a trace."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nearfield.training.chunks import Pool
from nearfield.training.step import encode_chunk, seed_chunk

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.training.engine import Engine


class AllocationTracker(TorchDispatchMode):
    """While it is active, counts the bytes of the tensors that operations make: those alive, and the most at a time.

    By storage, so that views count once, and what was there before not at all. What a kernel needs inside itself is
    not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [storage for storage in _storages(result) if id(storage) not in self._sizes]
        if made:
            given = {id(storage) for storage in (*_storages(args), *_storages(kwargs))}
            for storage in made:
                if id(storage) not in given and id(storage) not in self._sizes:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._sizes[key] = size
        self._watches[key] = weakref.finalize(storage, self._forget, key)
        self._watches[key].atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        self._watches.pop(key)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Those of the plain tensors in what an operation takes or gives: subclasses (sharded tensors) are made of plain
    tensors, which have operations of their own."""
    if type(tree) in (Tensor, torch.nn.Parameter):
        if tree.layout == torch.strided and tree.device.type != "meta":
            yield tree.untyped_storage()
    elif isinstance(tree, (tuple, list, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _storages(part)


@dataclass(frozen=True)
class ChunkCost:
    """What the forward and the backward of one chunk took."""

    tokens: int
    """As encoded, padding included."""
    squares: int
    """Sum over texts of the squared number of tokens."""
    kept: int
    """Bytes that the graph holds after the forward."""
    peak: int
    """The most bytes at a time, without the gradient of the parameters."""
    forward_seconds: float = 0.0
    seconds: float = 0.0
    """Of forward and backward; 0 where it was not timed."""


def chunk_size(lengths: Rows, *, padded: bool) -> tuple[int, int]:
    """(tokens, squares) of a chunk of texts of ``lengths`` (n,)."""
    if padded:
        longest = int(lengths.max())
        return longest * len(lengths), longest * longest * len(lengths)
    return int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())


@contextmanager
def no_trace(engine: Engine) -> Iterator[None]:
    """Run forwards and backwards without gradient: random state as before, the backend's gradient forgotten.

    Where ``begin`` does not forget (ZeRO), all that was added must be zeros, as :func:`run_chunk` adds.
    """
    device = engine.backend.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        engine.backend.begin()
        try:
            yield
        finally:
            engine.backend.begin()


def run_chunk(engine: Engine, pool: Pool, chunk: Rows, on_forward: Callable[[], None] = lambda: None) -> None:
    """Encode a chunk and push a gradient of zeros back, as a rank does that has fewer chunks than others.

    Collective where chunks are. To be called inside :func:`no_trace`.
    """
    seed_chunk(0, 0, 0)
    embeddings = encode_chunk(engine.backend, engine.make_features(pool)(chunk))
    on_forward()
    engine.backend.backward((embeddings * torch.zeros_like(embeddings)).sum(), last=True)


def measure_chunk(engine: Engine, pool: Pool, chunk: Rows, *, timed: bool = False) -> ChunkCost:
    """Memory, and if asked for time, of one chunk; inside :func:`no_trace`, after a chunk that warmed up."""
    tokens, squares = chunk_size(engine.lengths(pool)[chunk], padded=engine.padded)
    kept, peak = bytes_of(engine.backend.device, lambda look: run_chunk(engine, pool, chunk, look))
    cost = ChunkCost(tokens, squares, kept, peak)
    if not timed:
        return cost
    times = [0.0]

    def note() -> None:
        if engine.backend.device.type == "cuda":
            torch.cuda.synchronize(engine.backend.device)
        times.append(time.perf_counter())

    note()
    run_chunk(engine, pool, chunk, note)
    note()
    _, began, between, ended = times
    return replace(cost, forward_seconds=between - began, seconds=ended - began)


def bytes_of(device: torch.device, run: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Bytes alive when ``run`` calls what it is given, and the most at a time while it runs."""
    kept = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)

        def look() -> None:
            nonlocal kept
            torch.cuda.synchronize(device)
            kept = torch.cuda.memory_allocated(device) - before

        run(look)
        torch.cuda.synchronize(device)
        return kept, torch.cuda.max_memory_allocated(device) - before
    with AllocationTracker() as tracker:

        def look_at_tensors() -> None:
            nonlocal kept
            kept = tracker.live

        run(look_at_tensors)
    return kept, tracker.peak


@dataclass(frozen=True)
class Line:
    """``fixed + per_token * tokens + per_square * squares``."""

    fixed: float
    per_token: float
    per_square: float

    def __call__(self, tokens: float, squares: float) -> float:
        """The value at a number of tokens and of squares."""
        return self.fixed + self.per_token * tokens + self.per_square * squares

    def tokens_within(self, limit: float, longest: float) -> int:
        """How many tokens of texts of ``longest`` tokens stay within a limit."""
        each = self.per_token + self.per_square * longest
        return int(max(0.0, limit - self.fixed) / each) if each > 0 else 2**60


def fit_line(points: Sequence[tuple[float, float, float]]) -> Line:
    """The line of least relative squares, with no part negative, through (tokens, squares, value); raised until no
    measured value is above it."""
    from scipy.optimize import nnls

    known = [point for point in points if point[2] > 0]
    if not known:
        return Line(0.0, 0.0, 0.0)
    tokens, squares, values = (np.asarray(column, dtype=float) for column in zip(*known, strict=True))
    # One or two points say nothing of their parts: then all is per token.
    columns = [np.ones_like(tokens), tokens, squares] if len(known) > 2 else [0 * tokens, tokens, 0 * squares]
    scales = [float(column.max()) or 1.0 for column in columns]
    design = np.stack([column / scale for column, scale in zip(columns, scales, strict=True)], axis=1)
    found, _ = nnls(design / values[:, None], np.ones_like(values))
    line = Line(*(float(part / scale) for part, scale in zip(found, scales, strict=True)))
    worst = max(value / max(line(t, s), 1e-12) for t, s, value in known)
    factor = max(1.0, worst)
    return Line(line.fixed * factor, line.per_token * factor, line.per_square * factor)
