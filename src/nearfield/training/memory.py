"""The memory of a training: measured on a few chunks and on parts of the loss, without leaving a trace; and the budget that it gives.

A budget says how many tokens a step encodes at a time, and up to how many it keeps the graph of.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfield.batching.plan import total_steps
from nearfield.objectives.infonce import InfoNCE
from nearfield.training.backends.replicated import saved_buffers, trainable
from nearfield.training.chunks import (
    SMALLEST_MICRO_BATCH_TOKENS,
    Budget,
    Cut,
    TextPool,
    contrastive_batch,
    cut_batch,
)
from nearfield.training.launch import min_over_ranks
from nearfield.training.optimizers import make_optimizer
from nearfield.training.step import encode_chunk, is_out_of_memory, seed_chunk

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.batching.plan import Batch, Plan
    from nearfield.training.chunks import Work
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")

FAST_MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Where encoding is at its fastest: more tokens at a time only take memory."""

MARGIN = 0.1
"""The share of the memory available that is left alone."""

HEAP = {"cpu": 1.12, "cuda": 1.05}
"""Memory taken for each byte of tensors: the allocator's holes, and what kernels need inside themselves."""

_LARGE = 32 << 20
"""Larger blocks are given memory of their own by glibc, not what was freed before."""

_CELLS, _TILE = 1 << 20, 256
"""Cells of the largest part of a loss that is measured, and rows of its tiles."""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _kilobytes(lines: Sequence[str], key: str) -> list[int]:
    """The bytes that lines such as ``VmRSS:  20 kB`` say."""
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")]


def resident_bytes(status: str | None = None) -> int:
    """Main memory that this process holds now; 0 where the system does not say."""
    return next(iter(_kilobytes(_status(status), "VmRSS")), 0)


def peak_resident_bytes(status: str | None = None) -> int:
    """The most main memory that this process has held since :func:`reset_peak` or its start."""
    return next(iter(_kilobytes(_status(status), "VmHWM")), 0)


def _status(status: str | None) -> list[str]:
    return _lines(_PROC / "self" / "status") if status is None else status.splitlines()


def reset_peak_resident() -> None:
    """Let the peak begin anew at what is held now, where the system allows that."""
    with suppress(OSError):
        (_PROC / "self" / "clear_refs").write_text("5")


def held_bytes(device: torch.device) -> int:
    """Memory in use on the device that trains: of this process on a CPU, of tensors on a GPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_bytes()


def reset_peak(device: torch.device) -> None:
    """Let the peak of memory begin anew."""
    reset_peak_resident()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory since :func:`reset_peak`."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()


def available_memory(device: torch.device) -> int | None:
    """Bytes that this rank can still have on its device; ranks of one machine share its main memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    available = available_main_memory()
    return None if available is None else available // local_processes()


def available_main_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Bytes of main memory that can still be had: what the system has left, or less where a container limits it.

    None where the system does not say.
    """
    limits = _kilobytes(_lines(proc / "meminfo"), "MemAvailable")
    # The control groups that this process is in, from its own up to the root (cgroup 2 and 1).
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroup, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroup / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        rooms = [_room(one, *names) for one in (folder, *folder.parents) if one.is_relative_to(root)]
        limits += [room for room in rooms if room is not None]
    return min(limits) if limits else None


def _room(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """The memory left to a control group."""
    try:
        most = (folder / limit).read_text().strip()
        held = int((folder / used).read_text())
        if most == "max" or int(most) >= 1 << 60:
            return None
        counts = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines() if line)
    except (OSError, ValueError):
        return None
    # Pages of files that were read are counted as used, and are given back when memory is wanted.
    return max(0, int(most) - held + int(counts.get(cached, 0)))


def local_processes() -> int:
    """Ranks that share this machine, as the launcher says; 1 without one."""
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 1


class AllocationTracker(TorchDispatchMode):
    """While it is active, counts the bytes of the tensors that operations make: those alive, and the most at a time.

    By storage, so that views count once, and tensors from before are not counted. Memory that a kernel needs inside
    itself is not seen.
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


def bytes_of(device: torch.device, run: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Bytes alive when ``run`` calls what it is given, and the most at a time while it runs."""
    alive = before = 0
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with nullcontext() if cuda else AllocationTracker() as tracker:

        def look() -> None:
            nonlocal alive
            alive = torch.cuda.memory_allocated(device) - before if tracker is None else tracker.live

        run(look)
        return alive, torch.cuda.max_memory_allocated(device) - before if tracker is None else tracker.peak


@dataclass(frozen=True)
class ChunkCost:
    """Memory and time of the forward and the backward of one chunk."""

    tokens: int
    """As encoded, padding included."""
    squares: int
    """Sum over texts of the squared number of tokens."""
    kept: int
    """Bytes that the graph holds after the forward."""
    peak: int
    """The most bytes at a time, without the gradient of the parameters."""
    forward_seconds: float
    seconds: float
    """Of forward and backward."""


def chunk_size(lengths: Rows, *, padded: bool) -> tuple[int, int]:
    """(tokens, squares) of a chunk of texts of ``lengths`` (n,)."""
    if padded:
        lengths = np.full(len(lengths), int(lengths.max()))
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


def run_chunk(engine: Engine, pool: TextPool, chunk: Rows, on_forward: Callable[[], None] = lambda: None) -> None:
    """Encode a chunk and push a gradient of zeros back, as a rank does that has fewer chunks than others.

    Collective where chunks are. To be called inside :func:`no_trace`.
    """
    seed_chunk(0, 0, 0)
    embeddings = encode_chunk(engine.backend, engine.make_features(pool)(chunk))
    on_forward()
    engine.backend.backward((embeddings * torch.zeros_like(embeddings)).sum(), last=True)


def measure_chunk(engine: Engine, pool: TextPool, chunk: Rows) -> ChunkCost:
    """Memory and time of one chunk; inside :func:`no_trace`, after a chunk that warmed up."""
    tokens, squares = chunk_size(engine.lengths(pool)[chunk], padded=engine.padded)
    graph, peak = bytes_of(engine.backend.device, lambda look: run_chunk(engine, pool, chunk, look))
    times: list[float] = []

    def note() -> None:
        if engine.backend.device.type == "cuda":
            torch.cuda.synchronize(engine.backend.device)
        times.append(time.perf_counter())

    note()
    run_chunk(engine, pool, chunk, note)
    note()
    began, between, ended = times
    return ChunkCost(tokens, squares, graph, peak, between - began, ended - began)


@dataclass(frozen=True)
class LinearCost:
    """``fixed + per_token * tokens + per_square * squares``."""

    fixed: float
    per_token: float
    per_square: float

    def __call__(self, tokens: float, squares: float) -> float:
        """The value at a number of tokens and of squares."""
        return self.fixed + self.per_token * tokens + self.per_square * squares

    def times(self, factor: float) -> LinearCost:
        """All of it so many times."""
        return LinearCost(self.fixed * factor, self.per_token * factor, self.per_square * factor)

    def tokens_within(self, limit: float, longest: float) -> int:
        """How many tokens of texts of ``longest`` tokens stay within a limit."""
        each = self.per_token + self.per_square * longest
        return int(max(0.0, limit - self.fixed) / each) if each > 0 else 2**60


def fit_line(points: Sequence[tuple[float, float, float]]) -> LinearCost:
    """The line of least relative squares, with no part negative, through (tokens, squares, value); raised until no
    measured value is above it."""
    from scipy.optimize import nnls

    known = [point for point in points if point[2] > 0]
    if not known:
        return LinearCost(0.0, 0.0, 0.0)
    tokens, squares, values = (np.asarray(column, dtype=float) for column in zip(*known, strict=True))
    # One or two points say nothing of their parts: then all is per token.
    columns = [np.ones_like(tokens), tokens, squares] if len(known) > 2 else [0 * tokens, tokens, 0 * squares]
    scales = [float(column.max()) or 1.0 for column in columns]
    design = np.stack([column / scale for column, scale in zip(columns, scales, strict=True)], axis=1)
    coefficients, _ = nnls(design / values[:, None], np.ones_like(values))
    line = LinearCost(*(float(part / scale) for part, scale in zip(coefficients, scales, strict=True)))
    return line.times(max(1.0, *(value / max(line(t, s), 1e-12) for t, s, value in known)))


@dataclass(frozen=True)
class StateSize:
    """Bytes a rank, and counts of the whole model."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    """The most that is held of the gradient in a step."""
    optimizer: int
    """With the float32 copy of half-precision weights where the backend keeps one."""
    checkpoint: int
    """Of a checkpoint: its files on the disk, and its copies in rank 0's main memory while they are written."""
    checkpoint_large: int
    """Those of its copies that are so large that glibc gives them memory of their own, not what was freed before."""
    largest: int
    """The gradient of the largest trained parameter that is passed on whole: not of tables that pass on looked-up rows."""
    trained_bytes: int
    """The gradient of all trained parameters, whole."""


def state_size(engine: Engine) -> StateSize:
    """Count it for the backend in effect; nothing is allocated."""
    backend, world, module = engine.backend, engine.launch.world_size, engine.backend.module
    everything = {id(p): p for p in module.parameters()}
    trained = trainable(module)
    by_row = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding) and part.sparse}
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    sizes = {id(p): _count(p) * p.element_size() for p in everything.values()}
    each = [sizes[id(p)] for p in trained.values()]
    whole, count = sum(each), sum(_count(p) for p in trained.values())
    # ZeRO keeps its optimiser's state, and what gradients are added in, in float32.
    zero = backend.name.startswith("zero")
    state = optimizer_bytes(trained, engine.config, torch.float32 if zero else None)
    shards = world if backend.name in ("fsdp2", "zero3") else 1
    gradients, optimizer = whole, state
    if backend.name == "ddp":
        gradients += min(whole, 64 << 20)  # the buffer that is sent
    elif backend.name == "fsdp2":
        gradients += whole // world  # whole until the last chunk, then the shard beside it
        optimizer //= world
    elif zero:
        masters, half = 4 * count, any(p.element_size() < 4 for p in trained.values())
        gradients = masters // world if backend.name != "zero1" else masters + (whole if half else 0)
        optimizer = (state + masters) // world
    files = 4 * count if zero else whole
    large = sum(size for size in each if size >= _LARGE)
    return StateSize(
        parameters=sum(map(_count, everything.values())),
        trained=count,
        weights=sum(sizes.values()) // shards + buffers,
        gradients=gradients,
        optimizer=optimizer,
        checkpoint=files + sum(buffer.nbytes for buffer in saved_buffers(module).values()) + state,
        checkpoint_large=large + int(large / max(1, whole) * state),
        largest=max((sizes[id(p)] for p in trained.values() if id(p) not in by_row), default=0),
        trained_bytes=whole,
    )


def _count(parameter: nn.Parameter) -> int:
    """Entries of a whole parameter: ZeRO 3 leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def optimizer_bytes(
    parameters: dict[str, nn.Parameter], config: TrainingConfig, dtype: torch.dtype | None = None
) -> int:
    """Bytes of the optimiser's state for whole parameters, of type ``dtype`` if given: found by a step on tensors that have
    no memory.

    8 bytes an entry, AdamW's, where an optimiser cannot step such tensors.
    """
    meta = torch.device("meta")
    named = []
    for name, parameter in parameters.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        copy = nn.Parameter(torch.empty(shape, dtype=dtype or parameter.dtype, device=meta))
        copy.grad = torch.empty_like(copy)
        named.append((name, copy))
    try:
        optimizer = make_optimizer(named, config, meta)
        optimizer.step()
    except Exception:  # looks at values (Adafactor that scales its rate), or has kernels for one device only
        plain = config.optimizer.without_values()
        if plain != config.optimizer:
            return optimizer_bytes(parameters, config.model_copy(update={"optimizer": plain}), dtype)
        return config.optimizer.moment_bytes * sum(copy.numel() for _, copy in named)
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


@dataclass(frozen=True)
class LossCost:
    """Bytes of the loss on each rank, above those of the embeddings."""

    lines: Mapping[str, LinearCost]
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
        name = self.implementation(batch)
        if name not in self.lines:  # a batch that is smaller than the heavy ones
            name = next(iter(self.lines))
        return self.held + self.lines[name](*self.size(batch, name))

    def implementation(self, batch: Batch) -> str:
        """How the logits of a batch are computed: ``blockwise`` only if no part of the objective holds the matrix."""
        choices = {part.choose(self.logits(batch, [part]), self.device) for part in self.parts}
        return "blockwise" if self.ring or choices == {"blockwise"} else "dense"

    def logits(self, batch: Batch, parts: Sequence[InfoNCE]) -> int:
        """The cells of a rank in some parts; of an objective without parts those of queries and documents."""
        queries, documents = len(batch.query), _documents(batch)
        cells = sum(part.logits(queries, *documents, self.ranks, self.queued) for part in parts)
        return cells or queries * sum(documents) // self.ranks

    def size(self, batch: Batch, name: str) -> tuple[int, int]:
        """Embeddings, and cells held at a time."""
        columns = sum(_documents(batch))
        embeddings = len(batch.query) + columns
        if name == "dense":
            return embeddings, self.logits(batch, self.parts)
        tile = max(part.tile for part in self.parts)
        if self.ring:
            embeddings, columns = 2 * -(-embeddings // self.ranks), -(-columns // self.ranks)
        return embeddings, min(-(-len(batch.query) // self.ranks), tile) * min(columns, tile)


def _documents(batch: Batch) -> tuple[int, int]:
    """Positives and negatives."""
    return sum(map(len, batch.positives)), sum(map(len, batch.negatives))


def measure_loss(engine: Engine, batches: Sequence[Batch]) -> LossCost:
    """Measure the loss on parts of the widest of some batches, with random embeddings; collective.

    A part is at most some million cells. Where the whole batch is computed in tiles the part is too, in smaller ones.
    """
    parts = [part for part in engine.objective.modules() if isinstance(part, InfoNCE)]
    device, queued = engine.backend.device, 0 if engine.queue is None else engine.queue.size
    lines: dict[str, LinearCost] = {}
    held = 4.0 * queued * engine.dimension
    cost = LossCost(lines, parts, device, engine.launch.world_size, queued, held, engine.ring)
    # A part is measured on one rank's account, whatever the number of ranks, and before anything is queued.
    alone = LossCost(lines, parts, device, 1)
    widest = max(batches, key=lambda batch: len(batch.query) * sum(_documents(batch)))
    size = min(len(widest.query), int(math.sqrt(_CELLS * len(widest.query) / max(1, sum(_documents(widest))))))
    for name in dict.fromkeys(map(cost.implementation, batches)):
        points = []
        # Of three sizes or tiles: what is fixed, what each text takes, and each cell.
        for queries, tile in ((size, _TILE), (size, _TILE // 2), (size // 2, _TILE), (size // 4, _TILE)):
            part = cut_batch(widest, 0, max(2, queries))
            with _computed(parts, name, tile):
                points.append((*alone.size(part, name), _loss_bytes(engine, part)))
        lines[name] = fit_line(points)
    return cost


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


def _loss_bytes(engine: Engine, batch: Batch) -> int:
    """The most bytes at a time that the loss of a batch takes."""
    pool, known, device = engine.pool(batch), engine.data.known(batch), engine.backend.device
    leaf = torch.randn(len(pool.items), engine.columns, device=device).requires_grad_()
    learnt = [p for p in engine.objective.parameters() if p.requires_grad]

    def run(look: Callable[[], None]) -> None:
        contrastive = contrastive_batch(pool, leaf, known, draw=0, guide=engine.data.guide)
        engine.objective.forward(contrastive).gradients([leaf, *learnt])

    with engine.backend.whole(learnt):
        return bytes_of(device, run)[1]


@dataclass(frozen=True)
class Profile:
    """Memory and time of chunks of this run's texts on this rank's device; the same on all ranks."""

    kept: LinearCost
    """Bytes that a chunk's graph holds."""
    peak: LinearCost
    """The most bytes of a chunk's forward and backward."""
    loss: LossCost
    """Bytes of the loss of a batch."""
    forward_seconds: float
    """A token, of the forward alone."""
    seconds: float
    """A token, of forward and backward."""
    longest: int
    """Tokens of the plan's longest text."""
    state: StateSize
    room: int
    """Bytes that activations may take: what is available less what the run will hold, and less a margin."""
    available: int
    """Bytes of memory that this rank could have when it was measured; 0 where the system does not say."""


def heavy_batches(plans: Sequence[Plan], max_steps: int | None = None, count: int = 4) -> list[Batch]:
    """The batches of a run with the most tokens, the heaviest first, then those that hold the examples with the most."""
    heavy: list[tuple[int, int, int]] = []
    wide: list[tuple[int, int, int]] = []
    left = total_steps(plans, max_steps)
    for number, plan in enumerate(plans):
        length = min(len(plan), left)
        left -= length
        if length == 0:
            continue
        steps = plan.table["step"].to_numpy()
        rows = plan.table["query_tokens"].to_numpy().astype(np.int64) + plan.table["document_tokens"].to_numpy()
        rows = np.where(steps < length, rows, 0)
        totals = plan.tokens()[:length]
        heavy += [(-int(totals[step]), number, int(step)) for step in np.argsort(-totals, kind="stable")[:count]]
        widest = np.argsort(-rows, kind="stable")[:count]
        wide += [(-int(rows[row]), number, int(steps[row])) for row in widest if steps[row] < length]
    chosen = [key[1:] for key in sorted(heavy)[:count]] + [key[1:] for key in sorted(wide)[:count]]
    return [plans[number].batch(step) for number, step in dict.fromkeys(chosen)]


def measure_profile(engine: Engine, plans: Sequence[Plan]) -> Profile:
    """Run a few chunks of the plan's heaviest batches, from small to large; *collective*, and leaves no trace."""
    config, device = engine.config, engine.backend.device
    state = state_size(engine)
    batches = heavy_batches(plans, config.max_steps)
    lengths = [engine.lengths(engine.pool(batch)) for batch in batches]
    longest = [int(each.max()) for each in lengths]
    worst = int(np.argmax(longest))
    batch, pool, one = batches[worst], engine.pool(batches[worst]), np.asarray([int(np.argmax(lengths[worst]))])
    wanted = config.micro_batch_tokens
    target = FAST_MICRO_BATCH_TOKENS[device.type] if wanted == "auto" else wanted
    with no_trace(engine):
        loss = measure_loss(engine, batches)
        available = available_memory(device)
        room = (available or 2**60) * (1 - MARGIN) - (state.gradients + state.optimizer) * 1.0
        room -= state.checkpoint if device.type == "cpu" else 0
        room = (room - max(loss(each) for each in batches)) / HEAP[device.type]
        run_chunk(engine, pool, one)
        first = measure_chunk(engine, pool, one)
        fits = min_over_ranks([room / max(1.0, first.peak / first.tokens)], device)[0]
        costs: list[ChunkCost] = []
        while not costs:
            budget = max(SMALLEST_MICRO_BATCH_TOKENS, int(min(target, fits)))
            try:
                costs = _measure_chunks(engine, batch, budget)
            except Exception as error:
                # Where chunks hold collectives the other ranks could not be told.
                if not (is_out_of_memory(error) and engine.backend.retries_in_place) or budget <= max(longest):
                    raise
                fits, room = budget / 2, first.peak / first.tokens * budget / 2
    tokens, sizes = sum(cost.tokens for cost in costs), [first, *costs]
    return Profile(
        kept=fit_line([(cost.tokens, cost.squares, cost.kept) for cost in sizes]),
        peak=fit_line([(cost.tokens, cost.squares, cost.peak) for cost in sizes]),
        loss=loss,
        forward_seconds=sum(cost.forward_seconds for cost in costs) / tokens,
        seconds=sum(cost.seconds for cost in costs) / tokens,
        longest=max(longest),
        state=state,
        room=int(max(0.0, room)),
        available=int(available or 0),
    )


def _measure_chunks(engine: Engine, batch: Batch, budget: int) -> list[ChunkCost]:
    """The chunk of the longest texts, half of it, and a full one of short texts."""
    work, lengths = engine.work(batch, Cut(budget, engine.launch.world_size, engine.level))
    chunks = [work.chunks[0]]
    if len(chunks[0]) > 1:
        chunks.insert(0, chunks[0][: len(chunks[0]) // 2])
    full = [number for number, tokens in enumerate(work.tokens) if 2 * tokens >= min(budget, max(work.tokens))]
    short = min(full, key=lambda number: int(lengths[work.chunks[number]].max()))
    if short != 0:
        chunks.append(work.chunks[short])
    return [measure_chunk(engine, work.pool, chunk) for chunk in chunks]


def choose_budget(engine: Engine, plans: Sequence[Plan], profile: Profile) -> Budget:
    """The budget to begin with, the same on all ranks; *collective*. Numbers of the recipe are used as they are."""
    config, device = engine.config, engine.backend.device
    micro, graph = config.micro_batch_tokens, config.graph_tokens
    ranks, apart = engine.launch.world_size, engine.level
    if micro != "auto" and graph != "auto":
        return Budget(micro, graph, ranks, apart)
    if micro == "auto":
        fast = FAST_MICRO_BATCH_TOKENS[device.type]
        fits = profile.peak.tokens_within(profile.room, profile.longest)
        micro = fast if fits >= fast else max(SMALLEST_MICRO_BATCH_TOKENS, fits // 16 * 16)
        # Ranks may have measured differently, and must cut alike.
        micro = int(min_over_ranks([float(micro)], device)[0])
    if graph == "auto":
        wanted = _graph_tokens(engine, heavy_batches(plans, config.max_steps), profile, Cut(micro, ranks, apart))
        graph = int(min_over_ranks([wanted], device)[0])
    return Budget(micro, graph, ranks, apart)


def share_costs(work: Work, lengths: Rows, line: LinearCost, *, padded: bool) -> list[tuple[int, float]]:
    """For each rank, (tokens, bytes by ``line``) of its chunks; ``lengths`` are of the pool's texts."""
    sizes = [chunk_size(lengths[chunk], padded=padded) for chunk in work.chunks]
    return [(sum(sizes[n][0] for n in share), sum(line(*sizes[n]) for n in share)) for share in work.shares]


def _graph_tokens(engine: Engine, batches: Sequence[Batch], profile: Profile, cut: Cut) -> int:
    """Tokens of a rank's share whose graph fits, by the densest of the plan's heaviest batches.

    Where all of them fit it is a round number above the heaviest, so that it does not depend on how much memory is free.
    """
    heaviest, density = 1, 0.0
    for batch in batches:
        work, lengths = engine.work(batch, cut)
        for tokens, graph in share_costs(work, lengths, profile.kept, padded=engine.padded):
            heaviest, density = max(heaviest, tokens), max(density, graph / max(1, tokens))
    chunk = cut.tokens, cut.tokens * profile.longest
    room = profile.room - max(profile.peak(*chunk) - profile.kept(*chunk), 3.0 * profile.state.largest)
    fits = int(max(0.0, room) / density) if density > 0 else 2**60
    wanted = _round(heaviest, up=True)
    return max(SMALLEST_MICRO_BATCH_TOKENS, wanted if fits >= wanted else _round(max(1, fits), up=False))


def _round(value: int, *, up: bool) -> int:
    """To three leading bits."""
    unit = 1 << max(0, value.bit_length() - 3)
    return -(-value // unit) * unit if up else value // unit * unit
