"""A loss or a gradient that is not a number: which examples it came from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nearfield.batching.plan import Batch
from nearfield.errors import NonFiniteError
from nearfield.files import write_json
from nearfield.training.inputs import TrainingInputs
from nearfield.training.step import StepResult


def non_finite_error(
    run: Path,
    step: int,
    batch: Batch,
    result: StepResult,
    inputs: TrainingInputs,
    objective: nn.Module,
    norm: float,
    writes: bool,
) -> NonFiniteError:
    """Name the examples: those whose own loss is not finite if there are some, else the whole batch."""
    assert result.batch is not None
    with torch.no_grad():
        rows = objective(result.batch).rows
    bad = np.flatnonzero(~torch.isfinite(rows).cpu().numpy()) + result.first_query
    slots = bad if len(bad) else np.arange(len(batch.query))
    ids = inputs.item_ids(batch.query[slots])
    if writes:
        report = {
            "step": step + 1,
            "loss": str(result.loss),
            "gradient_norm": str(norm),
            "examples": batch.example[slots].tolist(),
            "queries": ids,
        }
        write_json(run / "non_finite.json", report)
    what = "the loss" if not math.isfinite(result.loss) else "the gradient"
    shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return NonFiniteError(
        f"{what} of step {step + 1} is not finite; queries {shown}",
        where=str(run / "non_finite.json"),
        hint=f"The state before that step is in checkpoints/step-{step:08d}. Lower the learning rate, or look at these examples.",
    )
