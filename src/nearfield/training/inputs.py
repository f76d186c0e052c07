"""What the training loop follows and feeds on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nearfield.batching.plan import Batch, Plan
from nearfield.batching.planner import Rows
from nearfield.notices import Notice
from nearfield.training.evaluating import Evaluate
from nearfield.training.feed import Feed
from nearfield.training.negatives import NegativeInputs


@dataclass(frozen=True)
class TrainingInputs:
    """What the loop follows and feeds on."""

    plans: Sequence[Plan]
    """One an epoch."""
    plan_hashes: Sequence[str]
    feed: Feed
    known_positives: Callable[[int], Rows]
    """Query item row -> its known positive item rows."""
    item_ids: Callable[[Rows], list[str]]
    """Item rows -> their ids in hex, for messages."""
    evaluate: Evaluate | None = None
    """What scores the model during the training, where the configuration asks for it."""
    negatives: NegativeInputs | None = None
    """What changing negatives are made of; None where those of the plans stay."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What trackers show beside the figures: the run's name and settings."""
    tell: Callable[[Sequence[Notice]], None] = lambda found: None
    """Takes what users of the training must know; every rank calls it with the same."""


def batch_of_step(plans: Sequence[Plan], step: int) -> tuple[int, Batch]:
    """The epoch and the batch of a step of the whole run."""
    for epoch, plan in enumerate(plans):
        if step < len(plan):
            return epoch, plan.batch(step)
        step -= len(plan)
    raise IndexError("the plans have fewer steps")
