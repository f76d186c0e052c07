"""What each step of a plan asks of a rank: tokens, and by a profile of chunks the bytes and the seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nearfield.training.busy import Load, sampled_steps
from nearfield.training.chunks import split_batch
from nearfield.training.measure import chunk_size
from nearfield.training.memory import Budget, Profile, heavy_batches, keeps_graph, share_costs

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.batching.plan import Batch, Plan
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine

_SAMPLED_STEPS = 200


@dataclass(frozen=True)
class StepCost:
    """What one step of the plan asks of the rank with the most work."""

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


def step_cost(
    engine: Engine, config: TrainingConfig, budget: Budget, profile: Profile, batch: Batch, known: Callable[[int], Rows]
) -> StepCost:
    """Cut a batch as the loop will, and add up its chunks."""
    parts = [
        _part_cost(engine, config, budget, profile, part, known) for part in split_batch(batch, config.averaged_batches)
    ]
    if len(parts) == 1:
        return parts[0]
    return StepCost(
        tokens=sum(part.tokens for part in parts),
        real=sum(part.real for part in parts),
        examples=sum(part.examples for part in parts),
        keeps=all(part.keeps for part in parts),
        kept=max(part.kept for part in parts),
        chunk=max(part.chunk for part in parts),
        chunks=sum(part.chunks for part in parts),
        loss=max(part.loss for part in parts),
        seconds=sum(part.seconds for part in parts),
        loads=tuple(load for part in parts for load in part.loads),
    )


def _part_cost(
    engine: Engine, config: TrainingConfig, budget: Budget, profile: Profile, batch: Batch, known: Callable[[int], Rows]
) -> StepCost:
    work, lengths = engine.work(batch, known, budget.cut)
    keeps = keeps_graph(config, budget, work, engine.backend)
    shares = share_costs(work, lengths, profile.kept, padded=engine.padded)
    sizes = [chunk_size(lengths[chunk], padded=engine.padded) for chunk in work.chunks]
    held = len(work.pool.items) / (engine.launch.world_size if engine.ring else 1)
    each = profile.seconds + (0.0 if keeps else profile.forward_seconds)
    return StepCost(
        tokens=sum(work.tokens),
        real=int(lengths.sum()),
        examples=len(batch.query),
        keeps=keeps,
        kept=max(kept for _, kept in shares),
        chunk=max(profile.peak(*size) for size in sizes),
        chunks=work.rounds,
        loss=profile.loss(batch) + 4.0 * 4 * held * engine.dimension,
        seconds=work.heaviest * each,
        loads=(Load.of(work, lengths),),
    )


@dataclass(frozen=True)
class PlanCosts:
    """What the steps of a run ask."""

    steps: list[tuple[Plan, int]]
    """All of them, or a sample that is spread evenly."""
    costs: list[StepCost]
    """Of each of ``steps``."""
    heavy_batches: list[Batch]
    heavy: list[StepCost]
    """Of each of ``heavy_batches``."""


def plan_costs(
    engine: Engine,
    config: TrainingConfig,
    budget: Budget,
    profile: Profile,
    plans: Sequence[Plan],
    known: Callable[[int], Rows],
) -> PlanCosts:
    """Cut the batches of a run, or a sample of them and the heaviest."""
    steps, heavy = sampled_steps(plans, config.max_steps, _SAMPLED_STEPS), heavy_batches(plans, config.max_steps)
    costs = [step_cost(engine, config, budget, profile, plan.batch(step), known) for plan, step in steps]
    return PlanCosts(steps, costs, heavy, [step_cost(engine, config, budget, profile, b, known) for b in heavy])
