"""Equalities in bfloat16, and of checkpoints in every precision, with an adapter and without."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from nearfield.conformance.objectives import OBJECTIVES
from nearfield.conformance.problem import Problem, difference
from nearfield.conformance.steps import count_differences, decoupled_adam, one_step
from nearfield.training.checkpoint import CheckpointWriter, open_checkpoint, read_tensors
from nearfield.training.launch import Launch

if TYPE_CHECKING:
    from nearfield.conformance.equalities import Line, Suite

PRECISIONS = ("fp32", "bf16-mixed", "bf16-pure")
FILES: dict[str, dict[str, Any]] = {
    "a file of the user's own": {},
    "a file with the optimiser's state in main memory": {"offload_optimizer": {"device": "cpu"}},
}
"""DeepSpeed configurations that say no type of sums."""
NOISE = 0.1
"""How far a gradient in bfloat16 is from one in float64 at most, of its largest entry."""
SUM = 1e-4
"""How far a sum of many chunks is from the same in float64 at most; added in bfloat16 it is off by 0.033."""


class _Same(torch.autograd.Function):
    """The input itself, as a node of the graph: gradients of what uses it are added up before they go on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _add_inside_modules(model: nn.Module) -> None:
    """Add the gradients of a module's inputs inside the module first, as on ZeRO 3.

    DeepSpeed puts such a node before each module to learn when its backward is over. Where a state is read by several
    modules, sums of its gradient in bfloat16 are then rounded in another order: a single chunk is off by 0.014 of the largest entry.
    """

    same: Callable[[Tensor], Tensor] = _Same.apply

    def apart(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(same(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)

    for module in model.modules():
        module.register_forward_pre_hook(apart)


def precision_lines(suite: Suite) -> Iterator[Line]:
    """Gradients in bfloat16, and checkpoints in all precisions."""
    problem = replace(suite.make(OBJECTIVES["infonce"], 12), dtype=torch.float32)
    yield from _against_float64(suite, problem)
    if suite.backend not in ("single", "ddp"):
        expected = _each_in_float64(problem, 16, inside=suite.backend == "zero3")
        value = _sum_error(suite, problem, expected)
        yield suite.line("bfloat16: chunks are added in float32", value, SUM)
        yield from _by_files(suite, problem, expected)
    yield from _checkpoints(suite)


def _against_float64(suite: Suite, problem: Problem) -> Iterator[Line]:
    # Backends that shard hold a copy of the weights in bfloat16: their gradient is taken there.
    rounded = suite.backend not in ("single", "ddp")
    _, expected = replace(problem, dtype=torch.float64, rounded=rounded).reference()
    found, half = {}, replace(problem, precision="bf16-mixed")
    for budget in (16, 10**6):
        for keep in (True, False):
            engine = half.engine(suite.launch, suite.backend, dropout=False)
            _, found[budget, keep] = half.gradient(engine, half.work(engine, budget), keep_graph=keep)
    worst = max(difference(gradient, expected) for gradient in found.values())
    yield suite.line("bfloat16: many chunks and one, kept and cached = float64", worst, NOISE)
    few = found[10**6, True]
    yield suite.line("bfloat16: many chunks = one", max(difference(f, few) for f in found.values()), NOISE / 2)


def _each_in_float64(problem: Problem, budget: int, *, inside: bool) -> dict[str, Tensor]:
    """The gradients that single chunks have in one process in bfloat16, added in float64.

    ``inside``: states add their gradients inside modules first.
    """
    engine = replace(problem, precision="bf16-pure").engine(Launch(), "single", dropout=False)
    if inside:
        _add_inside_modules(engine.backend.module)
    named = {name: p for name, p in engine.backend.module.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}

    def backward(scalar: Tensor, last: bool, settle: bool = False) -> None:
        torch.autograd.backward(scalar)
        for name, parameter in named.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.double()
                parameter.grad = None

    with mock.patch.object(engine.backend, "backward", backward):
        problem.gradient(engine, problem.work(engine, budget), keep_graph=False)
    return sums


def _sum_error(suite: Suite, problem: Problem, expected: dict[str, Tensor]) -> float:
    """How far the sum of many chunks is from the sum in float64, whether graphs are kept or not."""
    worst, half = 0.0, replace(problem, precision="bf16-mixed")
    for keep in (True, False):
        engine = half.engine(suite.launch, suite.backend, dropout=False)
        _, found = half.gradient(engine, half.work(engine, 16), keep_graph=keep)
        worst = max(worst, difference(found, expected))
    return worst


def _by_files(suite: Suite, problem: Problem, expected: dict[str, Tensor]) -> Iterator[Line]:
    """The same for configurations of DeepSpeed that users bring."""
    if not suite.backend.startswith("zero"):
        return
    stage = int(suite.backend.removeprefix("zero"))
    with tempfile.TemporaryDirectory(prefix="nearfield-conformance-") as folder:
        file = Path(folder) / "deepspeed.json"
        with mock.patch.dict(os.environ, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}):
            small = replace(suite.make(OBJECTIVES["infonce"], 4), dtype=torch.float32, precision="bf16-mixed")
            for name, more in FILES.items():
                file.write_text(json.dumps({"zero_optimization": {"stage": stage, **more}}))
                value = _sum_error(suite, problem, expected)
                yield suite.line(f"bfloat16, {name}: chunks are added in float32", value, SUM)
                resumed = _resumed(suite, small)
                yield suite.line(
                    f"bf16-mixed, {name}: from a checkpoint = uninterrupted", resumed, 0, unit="tensors that differ"
                )
            lossy = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
            file.write_text(json.dumps({"zero_optimization": {"stage": stage}, **lossy}))
            value = _sum_error(suite, problem, expected)
            yield suite.line("bfloat16: chunks that are added in bfloat16 are noticed", value, SUM, at_least=True)


def _checkpoints(suite: Suite) -> Iterator[Line]:
    """Every precision, with an adapter and without, and a CLIP folder with its scalar."""
    plain = replace(suite.make(OBJECTIVES["infonce, learnt temperature"], 4), dtype=torch.float32)
    problems = {"all weights": plain, "an adapter": replace(plain, adapter=True), "a CLIP folder": plain.in_clip()}
    for precision in PRECISIONS:
        for name, problem in problems.items():
            if suite.backend == "fsdp2" and problem.adapter and precision == "bf16-pure":
                continue  # which is refused: parameters of two types
            found = _resumed(suite, replace(problem, precision=precision))
            yield suite.line(
                f"{precision}, {name}: from a checkpoint = uninterrupted", found, 0, unit="tensors that differ"
            )


def _resumed(suite: Suite, problem: Problem) -> float:
    """Tensors that differ between three steps, and one step, a checkpoint on the disk, a new engine and two more."""

    def stepped(steps: Sequence[int], saved: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None) -> Any:
        engine = problem.engine(suite.launch, suite.backend, dropout=True, rate=1e-2, optimizer=decoupled_adam)
        if saved is not None:
            engine.backend.load(*(saved if suite.launch.is_main else (None, None)))
        for step in steps:
            one_step(engine, problem, 60, step=step, rate=1e-2)
        return engine.backend

    first = stepped([0])
    with tempfile.TemporaryDirectory(prefix="nearfield-conformance-") as folder:
        writer = CheckpointWriter(Path(folder), 1, background=False, writes=suite.launch.is_main)
        path = writer.save(1, first.model_tensors(), first.optimizer_tensors(), {})
        saved = read_tensors(open_checkpoint(path)) if suite.launch.is_main else ({}, {})
    return count_differences(stepped([0, 1, 2]), stepped([1, 2], saved))
