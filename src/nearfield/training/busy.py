"""How evenly the ranks of a run are at work, and what keeps them from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nearfield.batching.plan import total_steps
from nearfield.training.chunks import BUSY, split_batch

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.batching.plan import Plan
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine
    from nearfield.training.memory import Budget
    from nearfield.training.step import Work

logger = logging.getLogger("nearfield.training")

_SAMPLED_STEPS = 16


@dataclass(frozen=True)
class Load:
    """The tokens of a batch on the ranks; chunks that only fill up turns do not count."""

    mean: float
    heaviest: int
    long_text: bool
    """Whether one text alone takes more than all others would leave its rank."""
    few_texts: bool
    """Whether there are fewer texts than ranks."""

    @classmethod
    def of(cls, work: Work, lengths: Rows) -> Load:
        """The load of a batch whose texts have ``lengths`` (n,)."""
        ranks = len(work.shares)
        long = BUSY * ranks * int(lengths.max(initial=0)) > int(lengths.sum())
        return cls(sum(work.tokens) / ranks, work.heaviest, long, len(lengths) < ranks)


def busy_share(loads: Sequence[Load]) -> float:
    """The share of the time that a rank is at work on average, where tokens are time."""
    return sum(load.mean for load in loads) / max(1, sum(load.heaviest for load in loads))


def sampled_steps(plans: Sequence[Plan], max_steps: int | None, most: int) -> list[tuple[Plan, int]]:
    """All steps of a run, or ``most`` of them, spread evenly."""
    total = total_steps(plans, max_steps)
    steps = [(plan, step) for plan in plans for step in range(len(plan))][:total]
    if total <= most:
        return steps
    return [steps[i] for i in np.linspace(0, total - 1, most).round().astype(int)]


def measure_loads(
    engine: Engine, config: TrainingConfig, budget: Budget, plans: Sequence[Plan], known: Callable[[int], Rows]
) -> list[Load]:
    """The loads of some steps of a run."""
    return [
        Load.of(*engine.work(part, known, budget.cut))
        for plan, step in sampled_steps(plans, config.max_steps, _SAMPLED_STEPS)
        for part in split_batch(plan.batch(step), config.averaged_batches)
    ]


def say_busy(loads: Sequence[Load], budget: Budget, ranks: int) -> str:
    """A sentence on the busy share of a run of ``ranks``, with the reasons where it is below :data:`BUSY`."""
    share = busy_share(loads)
    said = f"Ranks are busy {share:.1%} of the time by their tokens"
    if share >= BUSY:
        return said
    idle = [load for load in loads if load.mean < BUSY * load.heaviest]
    reasons = []
    if any(load.long_text for load in idle):
        count = sum(load.long_text for load in idle)
        reasons.append(f"one long text forbids more in {count} of {len(loads)} batches looked at")
    if any(load.few_texts for load in idle):
        reasons.append("there are fewer texts in a batch than ranks")
    if budget.ranks != ranks:
        reasons.append(f"batches stay cut for the {budget.ranks} ranks that the run began with, and there are {ranks}")
    return f"{said}: {'; '.join(reasons) or 'texts cannot be dealt more evenly'}"


def tell_busy(
    engine: Engine, config: TrainingConfig, budget: Budget, plans: Sequence[Plan], known: Callable[[int], Rows]
) -> None:
    """Log the busy share of several ranks: as a warning where some idle."""
    ranks = engine.launch.world_size
    if ranks == 1 or not engine.launch.is_main:
        return
    loads = measure_loads(engine, config, budget, plans, known)
    logger.log(logging.INFO if busy_share(loads) >= BUSY else logging.WARNING, say_busy(loads, budget, ranks))
