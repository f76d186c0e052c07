"""A few real steps that change nothing: how long they take, and how much memory they leave in use."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nearfield.console import track
from nearfield.objectives.diagnostics import similarities
from nearfield.training.forecast import Forecast, Memory, PlanCosts, StepCost, overlaps, peak_bytes, reset_peak, slowest
from nearfield.training.memory import Budget, LinearCost, Profile, fit_line
from nearfield.training.trainer import batch_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nearfield.batching.plan import Batch
    from nearfield.training.engine import Engine

logger = logging.getLogger("nearfield.training")

DRIFT = 1.03
"""A long run finds the allocator's memory more torn than a few steps do."""


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


def run_trial(
    engine: Engine,
    planned: PlanCosts,
    budget: Budget,
    profile: Profile,
    forecast: Forecast,
    *,
    held: int,
    seed: int,
    limit_seconds: float,
) -> Trial:
    """Run the heaviest, the lightest and a few steps between with a learning rate of zero; *collective*.

    The weights stay as they are; the optimiser's state does not, so the engine is of no further use. No step begins
    that by the forecast would pass ``limit_seconds`` in all. ``held`` is what was in use when the engine was built.
    """
    device, factors = engine.backend.device, engine.backend.optimizer.param_groups
    reset_peak(device)
    began = time.monotonic()
    done: list[tuple[StepCost, float, float]] = []
    finite, still, ran = True, True, 0
    whole = False
    early = overlaps(engine.config, forecast.steps)
    copies: list[Tensor] | None = None
    for batch, cost in track(_chosen(planned), "Trial steps"):
        # The first one finds nothing warm; then the heaviest, which memory is about.
        spent = slowest([time.monotonic() - began], device)[0]
        if ran and spent + slowest([cost.seconds], device)[0] > limit_seconds:
            break
        start, cpu_start = time.perf_counter(), time.process_time()
        result, _, _ = batch_gradient(engine, budget, batch, seed=seed, step=0, watch=ran % 2 == 0)
        if result.word.out_of_memory:
            return Trial(forecast, ran, out_of_memory=True, finite=finite)
        norm = engine.backend.update([0.0] * len(factors), engine.config.max_gradient_norm, result.word.used)
        if result.batch is not None:
            similarities(result.batch)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        finite, still = finite and math.isfinite(result.loss) and math.isfinite(norm), still and norm == 0
        if ran:
            done.append((cost, seconds, cpu))
        ran += 1
        whole = whole or batch is planned.heavy_batches[0]
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
    found = dataclasses.replace(forecast, seconds=seconds, cpu_seconds=cpu, measured="steps")
    if whole:
        growth = slowest([float(peak_bytes(device) - held)], device)[0]
        beside = profile.state.checkpoint if early and device.type == "cpu" else 0
        found = dataclasses.replace(found, memory=_measured(forecast.memory, growth, beside))
    return Trial(found, ran, out_of_memory=False, finite=finite, still=still)


def _chosen(planned: PlanCosts) -> list[tuple[Batch, StepCost]]:
    """The median step, the heaviest, the lightest, the one with the longest examples, and a few between."""
    order = sorted(range(len(planned.steps)), key=lambda i: planned.costs[i].tokens)

    def at(share: float) -> tuple[Batch, StepCost]:
        index = order[round(share * (len(order) - 1))]
        plan, step = planned.steps[index]
        return plan.batch(step), planned.costs[index]

    heavy = list(zip(planned.heavy_batches, planned.heavy, strict=True))
    return [at(0.5), heavy[0], at(0.0), heavy[-1], at(0.5), at(0.75), at(0.25), heavy[0]]


def _through(points: Sequence[tuple[float, float, float]]) -> LinearCost:
    """The line through the measured seconds, in the middle of them: what is fixed, and what grows with the work."""
    raised = fit_line(points)
    factors = [value / max(raised(*point[:2]), 1e-12) for *point, value in points]
    middle = float(np.median(factors))
    return LinearCost(raised.fixed * middle, raised.per_token * middle, 0.0)


def _checkpoint(engine: Engine) -> list[Tensor]:
    """The copies that a checkpoint makes, on rank 0; *collective*."""
    kept = []
    for tensors in (engine.backend.model_tensors(), engine.backend.optimizer_tensors()):
        for _, tensor in tensors:
            if engine.launch.is_main:
                kept.append(tensor.to("cpu", copy=True))
    return kept


def _measured(parts: Memory, growth: float, checkpoint: int) -> Memory:
    """The parts of memory so that they add up to what was measured above what was held."""
    known = parts.gradients + parts.optimizer + parts.activations + parts.loss
    rest = int(growth * DRIFT) - known
    copies = min(checkpoint, max(0, rest))
    return dataclasses.replace(
        parts,
        checkpoint=copies,
        workspace=max(0, rest - copies),
        activations=max(0, parts.activations + min(0, rest)),
    )
