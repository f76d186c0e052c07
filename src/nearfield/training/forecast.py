"""The forecast of a run: its steps, tokens, memory and time, said before it is paid for, and how it came out.

Lines through what a few chunks take (:mod:`.memory`) give the cost of each step of the plan. A dry run then makes whole steps that
change nothing: how long they take, and how much memory they leave in use.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nearfield.batching.plan import total_steps
from nearfield.console import track
from nearfield.errors import BadInputError, Notice
from nearfield.files import read_json, write_json
from nearfield.objectives.diagnostics import similarities
from nearfield.training.backends.replicated import square_sum
from nearfield.training.chunks import BUSY, Budget, Load, busy_share, say_busy, split_batch
from nearfield.training.launch import broadcast_json, min_over_ranks
from nearfield.training.memory import (
    HEAP,
    LinearCost,
    Profile,
    choose_budget,
    chunk_size,
    fit_line,
    heavy_batches,
    held_bytes,
    local_processes,
    measure_profile,
    peak_bytes,
    reset_peak,
    share_costs,
)
from nearfield.training.step import batch_gradient

if TYPE_CHECKING:
    from nearfield.batching.plan import Batch, Plan
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine

logger = logging.getLogger("nearfield.training")

FILE = "forecast.json"

VERSION = 2

DRIFT = 1.03
"""A long run finds the allocator's memory more fragmented than a few steps do."""

_LIBRARIES = {"cpu": 24 << 20, "cuda": 0}
"""Memory of a process for its libraries' own buffers, files read and threads once it trains."""

_LOOKED_AT = 16
"""Steps whose loads are looked at."""

_SAMPLED_STEPS = 200
"""Steps that are cut for a forecast."""


def sampled_steps(plans: Sequence[Plan], max_steps: int | None, most: int) -> list[tuple[Plan, int]]:
    """All steps of a run, or ``most`` of them, spread evenly."""
    total = total_steps(plans, max_steps)
    steps = [(plan, step) for plan in plans for step in range(len(plan))][:total]
    if total <= most:
        return steps
    return [steps[i] for i in np.linspace(0, total - 1, most).round().astype(int)]


def measure_loads(engine: Engine, budget: Budget, plans: Sequence[Plan]) -> list[Load]:
    """The loads of some steps of a run."""
    return [
        Load.of(*engine.work(part, budget.cut))
        for plan, step in sampled_steps(plans, engine.config.max_steps, _LOOKED_AT)
        for part in split_batch(plan.batch(step), engine.config.averaged_batches)
    ]


def tell_busy(engine: Engine, budget: Budget, plans: Sequence[Plan]) -> None:
    """Log the busy share of several ranks: as a warning where some idle."""
    ranks = engine.launch.world_size
    if ranks == 1 or not engine.launch.is_main:
        return
    loads = measure_loads(engine, budget, plans)
    logger.log(logging.INFO if busy_share(loads) >= BUSY else logging.WARNING, say_busy(loads, budget, ranks))


@dataclass(frozen=True)
class StepCost:
    """The work of the busiest rank in one step of the plan."""

    tokens: int
    """Encoded, of all ranks."""
    real: int
    examples: int
    keeps: bool
    kept: float
    """Bytes of the graphs of all chunks of a rank."""
    chunk: float
    """The most bytes that one chunk takes."""
    chunks: int
    """Of the rank with the most."""
    loss: float
    """Bytes of the loss of a rank and of the embeddings."""
    seconds: float
    """By the profile."""
    loads: tuple[Load, ...]
    """Of the ranks: one, or one a part of averaged batches."""


def step_cost(engine: Engine, budget: Budget, profile: Profile, batch: Batch) -> StepCost:
    """Cut a batch as the loop will, and add up its chunks."""
    parts = split_batch(batch, engine.config.averaged_batches)
    works = [engine.work(part, budget.cut) for part in parts]
    keeps = [engine.keeps_graph(work, budget) for work, _ in works]
    ranks = engine.launch.world_size if engine.ring else 1
    costs = [share_costs(work, lengths, profile.kept, padded=engine.padded) for work, lengths in works]
    chunks = [chunk_size(lengths[c], padded=engine.padded) for work, lengths in works for c in work.chunks]
    embeddings = [16.0 * len(work.pool.items) / ranks * engine.dimension for work, _ in works]
    each = [profile.seconds + (0.0 if kept else profile.forward_seconds) for kept in keeps]
    return StepCost(
        tokens=sum(sum(work.tokens) for work, _ in works),
        real=sum(int(lengths.sum()) for _, lengths in works),
        examples=len(batch.query),
        keeps=all(keeps),
        kept=max(kept for shares in costs for _, kept in shares),
        chunk=max(profile.peak(*size) for size in chunks),
        chunks=sum(work.rounds for work, _ in works),
        loss=max(profile.loss(part) + held for part, held in zip(parts, embeddings, strict=True)),
        seconds=sum(work.heaviest * seconds for (work, _), seconds in zip(works, each, strict=True)),
        loads=tuple(Load.of(work, lengths) for work, lengths in works),
    )


@dataclass(frozen=True)
class PlanCosts:
    """The work of the steps of a run."""

    steps: list[tuple[Plan, int]]
    """All of them, or a sample that is spread evenly."""
    costs: list[StepCost]
    """Of each of ``steps``."""
    heavy: list[tuple[Batch, StepCost]]
    """The heaviest batches."""


def plan_costs(engine: Engine, budget: Budget, profile: Profile, plans: Sequence[Plan]) -> PlanCosts:
    """Cut the batches of a run, or a sample of them and the heaviest."""
    most = engine.config.max_steps
    steps = sampled_steps(plans, most, _SAMPLED_STEPS)
    costs = [step_cost(engine, budget, profile, plan.batch(step)) for plan, step in steps]
    heavy = [(batch, step_cost(engine, budget, profile, batch)) for batch in heavy_batches(plans, most)]
    return PlanCosts(steps, costs, heavy)


@dataclass(frozen=True)
class Memory:
    """Bytes that the rank with the most holds at its peak, by part."""

    base: int
    """The process before it trains: Python, libraries, data; on a GPU 0."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of the largest chunk, or of the largest graph that is kept."""
    loss: int
    """Embeddings of the whole batch, the matrix of similarities and its gradient."""
    checkpoint: int
    """Copies that are written while training goes on; on a GPU they are in main memory and count as 0 here."""
    workspace: int
    """Memory that kernels need inside themselves, gradients on their way, and holes in the allocator's memory."""

    @property
    def peak(self) -> int:
        """All parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Forecast:
    """The time and memory that a run will take."""

    fingerprint: str
    steps: int
    examples: int
    tokens: int
    """Real tokens of all steps."""
    encoded_tokens: int
    """With padding; the same as ``tokens`` where texts are packed end to end."""
    sampled: bool
    """Whether the encoded tokens were counted on a sample of the steps."""
    packing: str
    """``varlen``, ``block`` or ``padded``."""
    kept_graphs: float
    """The share of steps that keep the graph of all their chunks; the others encode twice."""
    memory: Memory
    chunk_activations: int
    """Bytes of activations by the measured chunks, also where ``memory`` is that of whole steps."""
    available: int
    """Bytes that the rank could have beside what it held when this was made; 0 where the system does not say."""
    seconds: float
    """Of the steps; evaluation, export and the last checkpoint's writing come on top."""
    cpu_seconds: float
    """The same in seconds of the process's CPUs; 0 where no whole steps were measured."""
    measured: str
    """The source of the time: ``steps`` (a dry run) or ``chunks`` (the start of the run)."""
    parameters: int
    trained: int
    micro_batch_tokens: int
    graph_tokens: int
    checkpoint_bytes: int
    reduced_a_step: int
    """Bytes of the gradient that a rank sends into the sum, a step: the mean."""
    reductions: int
    """The most times that the gradient is reduced in a step: more than one for ZeRO 2 and 3."""
    busy: float
    """The mean tokens of a rank over those of the rank with the most."""
    device: str
    backend: str
    world_size: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """For ``forecast.json``."""
        memory = {**dataclasses.asdict(self.memory), "peak": self.memory.peak}
        return {"version": VERSION, **dataclasses.asdict(self), "memory": memory}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Forecast:
        """The forecast that :meth:`to_json` wrote; :class:`KeyError` and :class:`TypeError` for anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        memory = Memory(**{key: value for key, value in values["memory"].items() if key != "peak"})
        return cls(**{**{key: value for key, value in values.items() if key in names}, "memory": memory})


@dataclass(frozen=True)
class Outlook:
    """All that is known of a run before its first step."""

    budget: Budget
    profile: Profile
    planned: PlanCosts
    forecast: Forecast


def foresee(engine: Engine, plans: Sequence[Plan], *, fingerprint: str, held: int) -> Outlook:
    """Measure a few chunks, choose the budget and forecast the run; ``held`` bytes are in use now. *Collective*."""
    profile = measure_profile(engine, plans)
    budget = choose_budget(engine, plans, profile)
    planned = plan_costs(engine, budget, profile, plans)
    forecast = predict(engine, plans, planned, budget, profile, fingerprint=fingerprint, held=held)
    return Outlook(budget, profile, planned, forecast)


def predict(
    engine: Engine,
    plans: Sequence[Plan],
    planned: PlanCosts,
    budget: Budget,
    profile: Profile,
    *,
    fingerprint: str,
    held: int,
) -> Forecast:
    """The forecast from the cost of chunks; ``held`` bytes are in use now, weights included. *Collective*."""
    total, costs, state = total_steps(plans, engine.config.max_steps), planned.costs, profile.state
    scale = total / max(1, len(costs))
    real = np.concatenate([plan.tokens() for plan in plans])[:total]
    memory = _memory(engine, profile, [*costs, *(cost for _, cost in planned.heavy)], held, total)
    seconds = sum(cost.seconds for cost in costs) * scale + _update_seconds(engine) * total
    by_chunk = engine.backend.name in ("zero2", "zero3")
    # A graph that is kept is gone through once, unless that would add gradients in half precision.
    apart = engine.backend.kept_graphs != "joined"
    passes = [cost.chunks if by_chunk and (apart or not cost.keeps) else 1 for cost in costs]
    several = engine.launch.world_size > 1
    return Forecast(
        fingerprint=fingerprint,
        steps=total,
        examples=round(sum(cost.examples for cost in costs) * scale),
        tokens=int(real.sum()),
        encoded_tokens=round(sum(c.tokens for c in costs) / max(1, sum(c.real for c in costs)) * float(real.sum())),
        sampled=len(planned.steps) < total,
        packing=engine.packing or "padded",
        kept_graphs=float(np.mean([cost.keeps for cost in costs])),
        memory=memory,
        chunk_activations=memory.activations,
        available=profile.available,
        seconds=slowest([seconds], engine.backend.device)[0],
        cpu_seconds=0.0,
        measured="chunks",
        parameters=state.parameters,
        trained=state.trained,
        micro_batch_tokens=budget.micro_batch_tokens,
        graph_tokens=budget.graph_tokens,
        checkpoint_bytes=state.checkpoint,
        reduced_a_step=round(state.trained_bytes * float(np.mean(passes))) if several else 0,
        reductions=max(passes) if several else 0,
        busy=busy_share([load for cost in costs for load in cost.loads]),
        device=str(engine.backend.device),
        backend=engine.backend.name,
        world_size=engine.launch.world_size,
        threads=torch.get_num_threads(),
    )


def _memory(engine: Engine, profile: Profile, costs: Sequence[StepCost], held: int, steps: int) -> Memory:
    state, kind = profile.state, engine.backend.device.type
    graph = max((cost.kept for cost in costs if cost.keeps), default=0.0)
    # The graphs of chunks each bring the gradient of the largest parameter, which are added up as they come.
    passing = 3.0 * state.largest if graph else 0.0
    activations = max(graph, *(cost.chunk for cost in costs))
    weights, loss = min(state.weights, held), max(cost.loss for cost in costs)
    workspace = int(_LIBRARIES[kind] + passing + (HEAP[kind] - 1) * (activations + loss))
    checkpoint = 0
    if kind == "cpu" and overlaps(engine.config, steps):
        # Copies that are written while the next steps run come on top of all.
        checkpoint = state.checkpoint
    elif kind == "cpu":
        # Those of the last step, or of one that waits for the writing, take the bytes that are left from activations, but
        # for the large ones; the memory that chunks freed piece by piece is too fragmented to hold copies.
        left = int(activations) + int(loss) + workspace if graph else 0
        checkpoint = max(state.checkpoint_large, state.checkpoint - left)
    return Memory(
        base=held - weights if kind == "cpu" else 0,
        weights=weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=int(activations),
        loss=int(loss),
        checkpoint=checkpoint,
        workspace=workspace,
    )


def overlaps(config: TrainingConfig, steps: int) -> bool:
    """Whether checkpoints are written while later steps run."""
    return config.checkpoints.background and steps > config.checkpoints.every_steps


def slowest(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The most of each number over all ranks; *collective*."""
    return [-number for number in min_over_ranks([-number for number in numbers], device)]


def _update_seconds(engine: Engine) -> float:
    """About how long clipping and the optimiser take: eight times as long as reading all trained parameters once."""
    if engine.backend.name not in ("single", "ddp"):
        return 0.0
    parameters = [p.detach() for p in engine.backend_parameters()]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        float(square_sum(parameters))
        times.append(time.perf_counter() - began)
    return 8 * min(times)


@dataclass(frozen=True)
class Trial:
    """Steps that were run for a forecast."""

    forecast: Forecast
    """With the time, and on a CPU the memory, that the steps took."""
    steps: int
    out_of_memory: bool
    finite: bool
    """Whether all losses and gradients were finite numbers."""
    still: bool = False
    """Whether all gradients were exactly 0."""


def run_trial(engine: Engine, outlook: Outlook, *, held: int, seed: int, limit_seconds: float) -> Trial:
    """Run the heaviest, the lightest and a few steps between with a learning rate of zero; *collective*.

    The weights stay as they are; the optimiser's state does not, so the engine is of no further use. No step begins
    that by the forecast would pass ``limit_seconds`` in all. ``held`` is what was in use when the engine was built.
    """
    device, planned, forecast = engine.backend.device, outlook.planned, outlook.forecast
    rates = [0.0] * len(engine.backend.optimizer.param_groups)
    reset_peak(device)
    began = time.monotonic()
    done: list[tuple[StepCost, float, float]] = []
    finite, still, whole, ran = True, True, False, 0
    early = overlaps(engine.config, forecast.steps)
    copies: list[Tensor] | None = None
    for batch, cost in track(_chosen(planned), "Trial steps"):
        # The first one finds nothing warm; then the heaviest, which memory is about.
        spent = slowest([time.monotonic() - began], device)[0]
        if ran and spent + slowest([cost.seconds], device)[0] > limit_seconds:
            break
        start, cpu_start = time.perf_counter(), time.process_time()
        result, _, _ = batch_gradient(engine, outlook.budget, batch, seed=seed, step=0, watch=ran % 2 == 0)
        if result.word.out_of_memory:
            return Trial(forecast, ran, out_of_memory=True, finite=finite)
        norm = engine.backend.update(rates, engine.config.max_gradient_norm, result.word.used)
        if result.batch is not None:
            similarities(result.batch)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        finite, still = finite and math.isfinite(result.loss) and math.isfinite(norm), still and norm == 0
        if ran:
            done.append((cost, seconds, cpu))
        ran += 1
        whole = whole or batch is planned.heavy[0][0]
        if early and ran == 4:
            copies = _checkpoint(engine)
    if copies is None:
        copies = _checkpoint(engine)
    del copies
    if len(done) < 3:
        return Trial(forecast, ran, out_of_memory=False, finite=finite, still=still)
    # Seconds by the chunks' profile -> seconds as measured.
    scale = forecast.steps / len(planned.costs)

    def total(points: list[tuple[float, float, float]]) -> float:
        line = _through(points)
        return slowest([sum(line(cost.seconds, 0.0) for cost in planned.costs) * scale], device)[0]

    seconds = total([(cost.seconds, 0.0, slowest([each], device)[0]) for cost, each, _ in done])
    cpu = total([(cost.seconds, 0.0, each) for cost, _, each in done])
    measured_forecast = replace(forecast, seconds=seconds, cpu_seconds=cpu, measured="steps")
    if whole:
        growth = slowest([float(peak_bytes(device) - held)], device)[0]
        beside = outlook.profile.state.checkpoint if early and device.type == "cpu" else 0
        measured_forecast = replace(measured_forecast, memory=_measured(forecast.memory, growth, beside))
    return Trial(measured_forecast, ran, out_of_memory=False, finite=finite, still=still)


def _chosen(planned: PlanCosts) -> list[tuple[Batch, StepCost]]:
    """The median step, the heaviest, the lightest, the one with the longest examples, and a few between."""
    order = sorted(range(len(planned.steps)), key=lambda i: planned.costs[i].tokens)

    def at(share: float) -> tuple[Batch, StepCost]:
        index = order[round(share * (len(order) - 1))]
        plan, step = planned.steps[index]
        return plan.batch(step), planned.costs[index]

    heavy = planned.heavy
    return [at(0.5), heavy[0], at(0.0), heavy[-1], at(0.5), at(0.75), at(0.25), heavy[0]]


def _through(points: Sequence[tuple[float, float, float]]) -> LinearCost:
    """The line through the measured seconds, in the middle of them: what is fixed, and what grows with the work."""
    raised = fit_line(points)
    middle = float(np.median([value / max(raised(*point), 1e-12) for *point, value in points]))
    return LinearCost(raised.fixed * middle, raised.per_token * middle, 0.0)


def _checkpoint(engine: Engine) -> list[Tensor]:
    """The copies that a checkpoint makes, on rank 0; *collective*."""
    copies = []
    for tensors in (engine.backend.model_tensors(), engine.backend.optimizer_tensors()):
        for _, tensor in tensors:
            if engine.launch.is_main:
                copies.append(tensor.to("cpu", copy=True))
    return copies


def _measured(parts: Memory, growth: float, checkpoint: int) -> Memory:
    """The parts of memory so that they add up to what was measured above what was held."""
    known = parts.gradients + parts.optimizer + parts.activations + parts.loss
    rest = int(growth * DRIFT) - known
    copies = min(checkpoint, max(0, rest))
    return replace(
        parts,
        checkpoint=copies,
        workspace=max(0, rest - copies),
        activations=max(0, parts.activations + min(0, rest)),
    )


@dataclass(frozen=True)
class Expected:
    """The forecast of a run when it begins."""

    forecast: Forecast | None
    """That of a dry run if there was one, else that made at the start; none where a run goes on that has none."""
    at_start: Forecast | None
    cpu_began: float


def load_trackers(config: TrainingConfig) -> None:
    """Import what trackers will, so that it counts as the process before it trains."""
    for tracker in config.trackers:
        tracker.preload()


def begin_forecast(
    engine: Engine, plans: Sequence[Plan], run: Path, *, fingerprint: str, budget: Budget | None
) -> tuple[Budget, Expected]:
    """The budget and the forecast of a run; ``budget`` is that of the checkpoint it goes on from. *Collective*.

    A few chunks are measured where the run begins; their time gives way to that of a dry run of the same training.
    """
    config, device = engine.config, engine.backend.device
    if engine.launch.is_main:
        load_trackers(config)
    reset_peak(device)
    held = held_bytes(device)
    if budget is not None:
        tell_busy(engine, budget, plans)
        return budget, Expected(read_forecast(run, engine), None, time.process_time())
    outlook = foresee(engine, plans, fingerprint=fingerprint, held=held)
    tell_busy(engine, outlook.budget, plans)
    earlier, forecast = read_forecast(run, engine), outlook.forecast
    if earlier is not None and _comparable(earlier, forecast):
        forecast = replace(earlier, memory=replace(earlier.memory, base=forecast.memory.base))
    if engine.launch.is_main:
        write_json(run / FILE, forecast.to_json())
    return outlook.budget, Expected(forecast, outlook.forecast, time.process_time())


_SAME = (
    "fingerprint",
    "device",
    "backend",
    "world_size",
    "threads",
    "packing",
    "kept_graphs",
    "micro_batch_tokens",
    "graph_tokens",
)


def _comparable(earlier: Forecast, now: Forecast) -> bool:
    # Settings that the fingerprint leaves out (gradient checkpointing, precision) show in the activations.
    alike = abs(earlier.chunk_activations - now.chunk_activations) <= 0.1 * now.chunk_activations
    return alike and earlier.measured == "steps" and all(getattr(earlier, n) == getattr(now, n) for n in _SAME)


def read_forecast(run: Path, engine: Engine) -> Forecast | None:
    """The forecast in a run's folder, if there is one that can be read; *collective*: rank 0 reads."""
    values: Any = None
    if engine.launch.is_main and (run / FILE).is_file():
        with suppress(BadInputError):
            values = read_json(run / FILE, "forecast")
    values = broadcast_json(values, engine.backend.device)
    try:
        return Forecast.from_json(values) if isinstance(values, dict) and values.get("version") == VERSION else None
    except (KeyError, TypeError):
        return None


def end_forecast(expected: Expected, engine: Engine, run: Path, *, first: int, steps: int, seconds: float) -> None:
    """Log and note how the steps from ``first`` on came out; *collective*."""
    device, forecast = engine.backend.device, expected.forecast
    cpu = time.process_time() - expected.cpu_began
    peak = int(slowest([float(peak_bytes(device))], device)[0])
    if forecast is None or not engine.launch.is_main or steps <= first:
        return
    predicted = forecast.seconds * (steps - first) / max(1, forecast.steps)
    logger.info(
        "Predicted %s, %s; actual %s, %s%s",
        say_bytes(forecast.memory.peak),
        say_seconds(predicted),
        say_bytes(peak),
        say_seconds(seconds),
        f" (steps {first + 1} to {steps})" if first else "",
    )
    actual = {"first": first, "steps": steps, "peak": peak, "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
    actual["predicted_seconds"] = round(predicted, 3)
    start = expected.at_start
    early = None if start is None else {"peak": start.memory.peak, "seconds": round(start.seconds, 3)}
    write_json(run / FILE, {**forecast.to_json(), "at_start": early, "actual": actual})


def say_bytes(count: float) -> str:
    """In MB, or GB from one on (powers of ten)."""
    return f"{count / 1e9:,.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.0f} MB"


def say_seconds(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 600:
        return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


@dataclass(frozen=True)
class Machine:
    """The needs of a run beside memory, and what the machine has."""

    checkpoints: int
    """The most checkpoints that are on the disk at a time."""
    disk_needed: int
    """Bytes of these and of the saved model."""
    disk_free: int
    gpus: int
    processes: int
    """Ranks on this machine."""

    @classmethod
    def of(cls, forecast: Forecast, config: TrainingConfig, run: Path) -> Machine:
        """This machine, for a run in the folder ``run``."""
        copies = config.checkpoints.keep_last + 1 + int(config.evaluation is not None)
        count = min(copies, -(-forecast.steps // config.checkpoints.every_steps) + 1)
        needed = forecast.checkpoint_bytes * count + forecast.parameters * 4
        return cls(count, needed, free_disk(run), torch.cuda.device_count(), local_processes())


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    there = next(one for one in (folder.resolve(), *folder.resolve().parents) if one.exists())
    return shutil.disk_usage(there).free


def forecast_notices(forecast: Forecast, machine: Machine) -> Iterator[Notice]:
    """Notices of a forecast about this machine: memory, disk, devices, what is sent."""
    growth = forecast.memory.peak - forecast.memory.base - forecast.memory.weights
    if forecast.available and growth > forecast.available:
        yield Notice(
            "memory-short",
            f"the run needs {say_bytes(growth)} more memory on each device than it holds now, and "
            f"{say_bytes(forecast.available)} are available",
            "Lower training.max_length or training.micro_batch_tokens, use gradient_cache: always, gradient "
            "checkpointing, an adapter, or more devices with fsdp2 or zero3.",
            blocks=True,
        )
    if machine.disk_needed > machine.disk_free:
        yield Notice(
            "disk-short",
            f"checkpoints and the model need {say_bytes(machine.disk_needed)} on the disk, and "
            f"{say_bytes(machine.disk_free)} are free",
            "Make room, or lower training.checkpoints.keep_last.",
            blocks=True,
        )
    if forecast.reductions > 1:
        yield Notice(
            "gradient-sent-often",
            f"{forecast.backend} reduces the gradient once a chunk, up to {forecast.reductions} times a step: "
            f"{say_bytes(forecast.reduced_a_step)} a step and rank",
            "zero1, fsdp2 and ddp reduce once a step. Larger training.micro_batch_tokens make fewer chunks.",
        )
    if machine.gpus > machine.processes and forecast.device.startswith("cuda"):
        yield Notice(
            "gpus-idle",
            f"{machine.gpus} GPUs are here, and {machine.processes} are used",
            f"torchrun --nproc-per-node {machine.gpus} -m nearfield train RECIPE",
        )
    if machine.gpus and forecast.device == "cpu":
        yield Notice("gpu-idle", "a GPU is here, and the run trains on the CPU", "Set training.device=auto.")


def notices_of_start(forecast: Forecast, config: TrainingConfig, run: Path) -> list[Notice]:
    """The same for a run that begins whatever its forecast says: a budget that is too large is halved as it goes."""
    return [replace(notice, blocks=False) for notice in forecast_notices(forecast, Machine.of(forecast, config, run))]
