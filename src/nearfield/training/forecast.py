"""What a run will take, said before it is paid for, and how it came out."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nearfield.batching.plan import total_steps
from nearfield.errors import BadInputError
from nearfield.files import read_json, write_json
from nearfield.training.busy import busy_share, tell_busy
from nearfield.training.costs import PlanCosts, StepCost, plan_costs
from nearfield.training.exchange import broadcast_json, min_over_ranks
from nearfield.training.machine import peak_resident_bytes, reset_peak_resident, resident_bytes
from nearfield.training.memory import HEAP, Budget, Profile, choose_budget, measure_profile

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.batching.plan import Plan
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine

logger = logging.getLogger("nearfield.training")

FILE = "forecast.json"
VERSION = 2
_LIBRARIES = {"cpu": 24 << 20, "cuda": 0}
"""What a process takes for its libraries' own buffers, files read and threads once it trains."""


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
    """What kernels need inside themselves, gradients on their way, and holes in the allocator's memory."""

    @property
    def peak(self) -> int:
        """All parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

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
    """What the time comes from: ``steps`` (a dry run) or ``chunks`` (the start of the run)."""
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
        """What :meth:`to_json` gave; :class:`KeyError` and :class:`TypeError` for anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        memory = Memory(**{key: value for key, value in values["memory"].items() if key != "peak"})
        return cls(**{**{key: value for key, value in values.items() if key in names}, "memory": memory})


def predict(
    config: TrainingConfig,
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
    total = total_steps(plans, config.max_steps)
    costs = planned.costs
    scale = total / max(1, len(costs))
    real = np.concatenate([plan.tokens() for plan in plans])[:total]
    state, device = profile.state, engine.backend.device
    memory = _memory(config, engine, profile, [*costs, *planned.heavy], held, total)
    update = update_seconds(engine)
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
        seconds=slowest([(sum(cost.seconds for cost in costs) * scale + update * total)], device)[0],
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
        device=str(device),
        backend=engine.backend.name,
        world_size=engine.launch.world_size,
        threads=torch.get_num_threads(),
    )


def _memory(
    config: TrainingConfig, engine: Engine, profile: Profile, costs: Sequence[StepCost], held: int, steps: int
) -> Memory:
    state, device = profile.state, engine.backend.device
    kept = max((cost.kept for cost in costs if cost.keeps), default=0.0)
    chunk = max(cost.chunk for cost in costs)
    # The graphs of chunks each bring the gradient of the largest parameter, which are added up as they come.
    passing = 3.0 * state.largest if kept else 0.0
    activations = max(kept, chunk)
    weights = min(state.weights, held)
    loss = max(cost.loss for cost in costs)
    parts = Memory(
        base=held - weights if device.type == "cpu" else 0,
        weights=weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=int(activations),
        loss=int(loss),
        checkpoint=0,
        workspace=int(_LIBRARIES[device.type] + passing + (HEAP[device.type] - 1) * (activations + loss)),
    )
    # What chunks gave back one by one is too torn to take copies in.
    left = parts.activations + parts.loss + parts.workspace if kept else 0
    return dataclasses.replace(parts, checkpoint=_checkpoint_room(config, engine, profile, left, steps))


def overlaps(config: TrainingConfig, steps: int) -> bool:
    """Whether checkpoints are written while later steps run."""
    return config.checkpoints.background and steps > config.checkpoints.every_steps


def _checkpoint_room(config: TrainingConfig, engine: Engine, profile: Profile, left: int, steps: int) -> int:
    """Main memory that checkpoints add to the peak of rank 0, if that is where training happens.

    Copies that are written while the next steps run come on top of all; those of the last step, or of one that waits
    for the writing, take the bytes that are ``left`` from activations, but for the large ones.
    """
    if engine.backend.device.type != "cpu":
        return 0
    if overlaps(config, steps):
        return profile.state.checkpoint
    return max(profile.state.checkpoint_large, profile.state.checkpoint - left)


def slowest(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The most of each number over all ranks; *collective*."""
    return [-number for number in min_over_ranks([-number for number in numbers], device)]


def update_seconds(engine: Engine) -> float:
    """About how long clipping and the optimiser take: eight times as long as reading all trained parameters once."""
    parameters = [p.detach() for p in engine.backend.module.parameters() if p.requires_grad]
    if engine.backend.name not in ("single", "ddp"):
        return 0.0
    times = []
    for _ in range(3):
        began = time.perf_counter()
        norms = torch._foreach_norm(parameters)
        float(norms[0])
        times.append(time.perf_counter() - began)
    return 8 * min(times)


# What a run does with it.


def held_bytes(device: torch.device) -> int:
    """Memory in use on the device that trains: of this process on a CPU, of tensors on a GPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_bytes()


@dataclass(frozen=True)
class Outlook:
    """What a run expects when it begins."""

    forecast: Forecast | None
    """That of a dry run if there was one, else that made at the start; none where a run goes on that has none."""
    at_start: Forecast | None
    cpu_began: float


def load_trackers(config: TrainingConfig) -> None:
    """Import what trackers will, so that it counts as the process before it trains."""
    if any(tracker.kind == "tensorboard" for tracker in config.trackers):
        importlib.import_module("torch.utils.tensorboard")


def begin_forecast(
    config: TrainingConfig,
    engine: Engine,
    plans: Sequence[Plan],
    known_positives: Callable[[int], Rows],
    run: Path,
    *,
    fingerprint: str,
    budget: Budget | None,
) -> tuple[Budget, Outlook]:
    """The budget and the forecast of a run; ``budget`` is that of the checkpoint it goes on from. *Collective*.

    A few chunks are measured where the run begins; their time gives way to that of a dry run of the same training.
    """
    device = engine.backend.device
    if engine.launch.is_main:
        load_trackers(config)
    reset_peak(device)
    held = held_bytes(device)
    if budget is not None:
        tell_busy(engine, config, budget, plans, known_positives)
        return budget, Outlook(read_forecast(run, engine), None, time.process_time())
    profile = measure_profile(config, engine, plans, known_positives, timed=True)
    budget = choose_budget(config, engine, plans, known_positives, profile)
    tell_busy(engine, config, budget, plans, known_positives)
    costs = plan_costs(engine, config, budget, profile, plans, known_positives)
    forecast = predict(config, engine, plans, costs, budget, profile, fingerprint=fingerprint, held=held)
    earlier, at_start = read_forecast(run, engine), forecast
    if earlier is not None and _comparable(earlier, forecast):
        base = forecast.memory.base
        forecast = dataclasses.replace(earlier, memory=dataclasses.replace(earlier.memory, base=base))
    if engine.launch.is_main:
        write_json(run / FILE, forecast.to_json())
    return budget, Outlook(forecast, at_start, time.process_time())


def _comparable(earlier: Forecast, now: Forecast) -> bool:
    names = (
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
    # What the fingerprint leaves out (gradient checkpointing, precision) shows in the activations.
    alike = abs(earlier.chunk_activations - now.chunk_activations) <= 0.1 * now.chunk_activations
    return alike and earlier.measured == "steps" and all(getattr(earlier, n) == getattr(now, n) for n in names)


def read_forecast(run: Path, engine: Engine) -> Forecast | None:
    """The forecast in a run's folder, if there is one that can be read; *collective*: rank 0 reads."""
    values: Any = None
    if engine.launch.is_main and (run / FILE).is_file():
        try:
            values = read_json(run / FILE, "forecast")
        except BadInputError:
            values = None
    values = broadcast_json(values, engine.backend.device)
    try:
        return Forecast.from_json(values) if isinstance(values, dict) and values.get("version") == VERSION else None
    except (KeyError, TypeError):
        return None


def reset_peak(device: torch.device) -> None:
    """Let the peak of memory begin anew."""
    reset_peak_resident()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory since :func:`reset_peak`."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()


def end_forecast(outlook: Outlook, engine: Engine, run: Path, *, first: int, steps: int, seconds: float) -> None:
    """Log and note how the steps from ``first`` on came out; *collective*."""
    device, forecast = engine.backend.device, outlook.forecast
    cpu = time.process_time() - outlook.cpu_began
    peak = int(slowest([float(peak_bytes(device))], device)[0])
    if forecast is None or not engine.launch.is_main or steps <= first:
        return
    share = (steps - first) / max(1, forecast.steps)
    logger.info(
        "Predicted %s, %s; actual %s, %s%s",
        say_bytes(forecast.memory.peak),
        say_seconds(forecast.seconds * share),
        say_bytes(peak),
        say_seconds(seconds),
        f" (steps {first + 1} to {steps})" if first else "",
    )
    found = {"first": first, "steps": steps, "peak": peak, "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
    found["predicted_seconds"] = round(forecast.seconds * share, 3)
    start = outlook.at_start
    early = None if start is None else {"peak": start.memory.peak, "seconds": round(start.seconds, 3)}
    write_json(run / FILE, {**forecast.to_json(), "at_start": early, "actual": found})


def say_bytes(count: float) -> str:
    """In MB, or GB from one on (powers of ten)."""
    return f"{count / 1e9:,.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.0f} MB"


def say_seconds(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 600:
        return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
