"""How many tokens a step encodes at a time, and up to how many it keeps the graph of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nearfield.training.chunks import Cut
from nearfield.training.exchange import min_over_ranks
from nearfield.training.loss_cost import LossCost, measure_loss
from nearfield.training.machine import available_main_memory, local_processes
from nearfield.training.measure import (
    ChunkCost,
    Line,
    chunk_size,
    fit_line,
    measure_chunk,
    no_trace,
    run_chunk,
)
from nearfield.training.state_size import StateSize, state_size
from nearfield.training.step import can_keep_graphs, is_out_of_memory

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.batching.plan import Batch, Plan
    from nearfield.training.backends.base import Backend
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine
    from nearfield.training.step import Work

logger = logging.getLogger("nearfield.training")

FAST_MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Where encoding is at its fastest: more tokens at a time only take memory."""
SMALLEST_MICRO_BATCH_TOKENS = 16
MARGIN = 0.1
"""The share of the memory available that is left alone."""
HEAP = {"cpu": 1.12, "cuda": 1.05}
"""Memory taken for each byte of tensors: the allocator's holes, and what kernels need inside themselves."""


@dataclass(frozen=True)
class Budget:
    """The token budget in force: it decides how batches are cut, hence it is state."""

    micro_batch_tokens: int
    graph_tokens: int
    ranks: int = 1
    """The ranks that the run began with: the number of chunks is a multiple of them."""
    apart: bool = False
    """Whether texts share no chunk with pictures that go through the same transformer."""

    @property
    def cut(self) -> Cut:
        """How batches are cut."""
        return Cut(self.micro_batch_tokens, self.ranks, self.apart)

    def to_json(self) -> dict[str, int | bool]:
        """The entries of a checkpoint's state."""
        return {
            "micro_batch_tokens": self.micro_batch_tokens,
            "graph_tokens": self.graph_tokens,
            "cut_ranks": self.ranks,
            "cut_apart": self.apart,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Budget:
        """The budget that a checkpoint's state holds."""
        tokens, graph = int(state["micro_batch_tokens"]), int(state["graph_tokens"])
        return cls(tokens, graph, int(state["cut_ranks"]), bool(state["cut_apart"]))

    def halved(self) -> Budget | None:
        """Half of it; none where nothing is left to halve."""
        if self.micro_batch_tokens <= SMALLEST_MICRO_BATCH_TOKENS:
            return None
        tokens = max(SMALLEST_MICRO_BATCH_TOKENS, self.micro_batch_tokens // 2)
        return replace(self, micro_batch_tokens=tokens, graph_tokens=self.graph_tokens // 2)


@dataclass(frozen=True)
class Profile:
    """What chunks of this run's texts take on this rank's device; the same on all ranks."""

    kept: Line
    """Bytes that a chunk's graph holds."""
    peak: Line
    """The most bytes of a chunk's forward and backward."""
    loss: LossCost
    """Bytes of the loss of a batch."""
    forward_seconds: float
    """A token, of the forward alone."""
    seconds: float
    """A token, of forward and backward; 0 where it was not timed."""
    longest: int
    """Tokens of the plan's longest text."""
    state: StateSize
    room: int
    """Bytes that activations may take: what is available less what the run will hold, and less a margin."""
    available: int
    """Bytes of memory that this rank could have when it was measured; 0 where the system does not say."""


def choose_budget(
    config: TrainingConfig,
    engine: Engine,
    plans: Sequence[Plan],
    known_positives: Callable[[int], Rows],
    profile: Profile | None = None,
) -> Budget:
    """The budget to begin with, the same on all ranks; *collective*. Numbers of the recipe are used as they are."""
    micro, graph = config.micro_batch_tokens, config.graph_tokens
    ranks, apart = engine.launch.world_size, engine.level
    if micro != "auto" and graph != "auto":
        return Budget(micro, graph, ranks, apart)
    profile = profile or measure_profile(config, engine, plans, known_positives)
    device = engine.backend.device
    if micro == "auto":
        fast = FAST_MICRO_BATCH_TOKENS[device.type]
        fits = profile.peak.tokens_within(profile.room, profile.longest)
        micro = fast if fits >= fast else max(SMALLEST_MICRO_BATCH_TOKENS, fits // 16 * 16)
        # Ranks may have measured differently, and must cut alike.
        micro = int(min_over_ranks([float(micro)], device)[0])
    if graph == "auto":
        batches = heavy_batches(plans, config.max_steps)
        cut = Cut(micro, ranks, apart)
        graph = int(min_over_ranks([_graph_tokens(engine, batches, known_positives, profile, cut)], device)[0])
    return Budget(micro, graph, ranks, apart)


def keeps_graph(config: TrainingConfig, budget: Budget, work: Work, backend: Backend) -> bool:
    """Whether a step keeps the graph of all its chunks, rather than encode each twice."""
    fits = config.gradient_cache == "never" or (
        config.gradient_cache == "auto" and work.heaviest <= budget.graph_tokens
    )
    return fits and can_keep_graphs(backend, work.rounds if backend.same_chunk_count else len(work.own))


def share_costs(work: Work, lengths: Rows, line: Line, *, padded: bool) -> list[tuple[int, float]]:
    """For each rank, (tokens, bytes by ``line``) of its chunks; ``lengths`` are of the pool's texts."""
    sizes = [chunk_size(lengths[chunk], padded=padded) for chunk in work.chunks]
    return [(sum(sizes[n][0] for n in share), sum(line(*sizes[n]) for n in share)) for share in work.shares]


def _graph_tokens(
    engine: Engine, batches: Sequence[Batch], known_positives: Callable[[int], Rows], profile: Profile, cut: Cut
) -> int:
    """Tokens of a rank's share whose graph fits, by the densest of the plan's heaviest batches.

    Where all of them fit it is a round number above the heaviest, so that it does not depend on how much memory is free.
    """
    heaviest, density = 1, 0.0
    for batch in batches:
        work, lengths = engine.work(batch, known_positives, cut)
        for tokens, kept in share_costs(work, lengths, profile.kept, padded=engine.padded):
            heaviest, density = max(heaviest, tokens), max(density, kept / max(1, tokens))
    micro = cut.tokens
    spare = profile.peak(micro, micro * profile.longest) - profile.kept(micro, micro * profile.longest)
    room = profile.room - max(spare, 3.0 * profile.state.largest)
    fits = int(max(0.0, room) / density) if density > 0 else 2**60
    wanted = _round(heaviest, up=True)
    return max(SMALLEST_MICRO_BATCH_TOKENS, wanted if fits >= wanted else _round(max(1, fits), up=False))


def _round(value: int, *, up: bool) -> int:
    """To three leading bits."""
    unit = 1 << max(0, value.bit_length() - 3)
    return -(-value // unit) * unit if up else value // unit * unit


def heavy_batches(plans: Sequence[Plan], max_steps: int | None = None, count: int = 4) -> list[Batch]:
    """The batches of a run with the most tokens, the heaviest first, then those that hold the examples with the most."""
    heavy: list[tuple[int, int, int]] = []
    wide: list[tuple[int, int, int]] = []
    left = sum(len(plan) for plan in plans) if max_steps is None else max_steps
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


def measure_profile(
    config: TrainingConfig,
    engine: Engine,
    plans: Sequence[Plan],
    known_positives: Callable[[int], Rows],
    *,
    timed: bool = False,
) -> Profile:
    """Run a few chunks of the plan's heaviest batches, from small to large; *collective*, and leaves no trace."""
    state, device = state_size(engine, config), engine.backend.device
    batches = heavy_batches(plans, config.max_steps)
    pools = [(engine.pool(batch), batch) for batch in batches]
    longest = [int(engine.lengths(pool).max()) for pool, _ in pools]
    pool, batch = pools[int(np.argmax(longest))]
    lengths = engine.lengths(pool)
    wanted = config.micro_batch_tokens
    target = FAST_MICRO_BATCH_TOKENS[device.type] if wanted == "auto" else wanted
    with no_trace(engine):
        loss = measure_loss(engine, batches, known_positives)
        available = available_memory(device)
        room = (available or 2**60) * (1 - MARGIN) - (state.gradients + state.optimizer) * 1.0
        room -= state.checkpoint if device.type == "cpu" else 0
        room = (room - max(loss(batch) for batch in batches)) / HEAP[device.type]
        one = np.asarray([int(np.argmax(lengths))])
        run_chunk(engine, pool, one)
        first = measure_chunk(engine, pool, one)
        fits = min_over_ranks([room / max(1.0, first.peak / first.tokens)], device)[0]
        costs: list[ChunkCost] = []
        while not costs:
            budget = max(SMALLEST_MICRO_BATCH_TOKENS, int(min(target, fits)))
            try:
                costs = _measure_chunks(engine, batch, known_positives, budget, timed)
            except Exception as error:
                # Where chunks hold collectives the other ranks could not be told.
                if not (is_out_of_memory(error) and engine.backend.retries_in_place) or budget <= max(longest):
                    raise
                fits, room = budget / 2, first.peak / first.tokens * budget / 2
    costs = [first, *costs]
    clock = [cost for cost in costs if cost.seconds > 0]
    tokens = sum(cost.tokens for cost in clock) or 1
    return Profile(
        kept=fit_line([(cost.tokens, cost.squares, cost.kept) for cost in costs]),
        peak=fit_line([(cost.tokens, cost.squares, cost.peak) for cost in costs]),
        loss=loss,
        forward_seconds=sum(cost.forward_seconds for cost in clock) / tokens,
        seconds=sum(cost.seconds for cost in clock) / tokens,
        longest=max(longest),
        state=state,
        room=int(max(0.0, room)),
        available=int(available or 0),
    )


def _measure_chunks(
    engine: Engine, batch: Batch, known_positives: Callable[[int], Rows], budget: int, timed: bool
) -> list[ChunkCost]:
    """The chunk of the longest texts, half of it, and a full one of short texts."""
    work, lengths = engine.work(batch, known_positives, Cut(budget, engine.launch.world_size, engine.level))
    chunks = [work.chunks[0]]
    if len(chunks[0]) > 1:
        chunks.insert(0, chunks[0][: len(chunks[0]) // 2])
    full = [number for number, tokens in enumerate(work.tokens) if 2 * tokens >= min(budget, max(work.tokens))]
    short = min(full, key=lambda number: int(lengths[work.chunks[number]].max()))
    if short != 0:
        chunks.append(work.chunks[short])
    return [measure_chunk(engine, work.pool, chunk, timed=timed) for chunk in chunks]


def available_memory(device: torch.device) -> int | None:
    """Bytes that this rank can still have on its device; ranks of one machine share its main memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = available_main_memory()
    return None if found is None else found // local_processes()
