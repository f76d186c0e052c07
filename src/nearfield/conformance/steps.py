"""Steps of an engine as the loop makes them, and whether two engines are the same after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nearfield.conformance.problem import Problem
from nearfield.training.backends.base import Backend
from nearfield.training.engine import Engine
from nearfield.training.step import run_step


def whole(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of all tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def one_step(
    engine: Engine, problem: Problem, budget: int, *, step: int, max_norm: float | None = None, rate: float = 1.0
) -> float:
    """A step as the loop makes it; returns the gradient's norm."""
    engine.backend.begin()
    work = problem.work(engine, budget)
    result = run_step(
        engine.backend,
        engine.objective,
        work,
        engine.make_features(work.pool, 5, step),
        dimension=engine.columns,
        seed=5,
        step=step,
        keep_graph=False,
    )
    rates = [rate] * len(engine.backend.optimizer.param_groups)
    return engine.backend.update(rates, max_norm, result.word.used)


def next_loss(engine: Engine, problem: Problem, step: int) -> float:
    """The loss of one more step, without taking it."""
    return problem.gradient(engine, problem.work(engine, 60), keep_graph=True, step=step)[0].loss


def count_differences(one: Backend, other: Backend) -> float:
    """Tensors of the model and of the optimiser that differ in at least one bit; *collective*."""
    count = 0
    for tensors in (Backend.model_tensors, Backend.optimizer_tensors):
        name = tensors.__name__
        a, b = whole(getattr(one, name)()), whole(getattr(other, name)())
        count += len(a.keys() ^ b.keys())
        count += sum(not torch.equal(a[key], b[key]) for key in a.keys() & b.keys())
    return float(count)


def decoupled_adam(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW in two groups, as recipes have it."""
    big = [p for p in parameters if p.ndim >= 2]
    small = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW([{"params": big, "weight_decay": 0.01}, {"params": small, "weight_decay": 0.0}], lr=rate)
