"""The equalities. Each compares with a plain reference and says by how much it is off."""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfield.batching.plan import SEVERAL_SOURCES
from nearfield.conformance.cases import (
    CPU,
    OBJECTIVES,
    SEVERAL,
    VIEWS,
    WEIGHTED,
    Case,
    count_differences,
    decoupled_adam,
    difference,
    next_loss,
    one_step,
    whole,
)
from nearfield.methods.carol import CAROLConfig
from nearfield.objectives.config import InfoNCEConfig, ObjectiveSettings
from nearfield.objectives.infonce import can_ring
from nearfield.training import step as step_module
from nearfield.training.backends.replicated import Backend
from nearfield.training.checkpoint import CheckpointWriter, open_checkpoint, read_tensors
from nearfield.training.chunks import Work, split_batch
from nearfield.training.engine import Engine
from nearfield.training.launch import Launch
from nearfield.training.step import run_step

_REDUCTIONS = ("allreduce", "reduce_scatter", "reduce_")


@dataclass
class Traffic:
    """The collectives of a span of time: (operation, bytes of its larger side) each."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    def reductions(self) -> list[int]:
        """Bytes of each reduction: what a rank brings to it."""
        return [size for name, size in self.calls if any(part in name for part in _REDUCTIONS)]


class CountTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open, collectives of this process are noted in ``traffic``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sizes: list[int] = []
            _walk((args, kwargs or {}), sizes.append)
            self.traffic.calls.append((func.__name__, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def _walk(value: Any, note: Callable[[int], None]) -> None:
    if isinstance(value, Tensor):
        note(value.nbytes)
    elif isinstance(value, dict):
        for part in value.values():
            _walk(part, note)
    elif isinstance(value, list | tuple):
        for part in value:
            _walk(part, note)


def padded_bytes(backend: Backend, parameter: nn.Parameter) -> int:
    """Bytes of a parameter's gradient on the wire: shards of FSDP2 are equal, so rows are padded to the ranks."""
    rows = parameter.shape[0] if parameter.ndim else 1
    world = torch.distributed.get_world_size()
    if backend.name == "fsdp2":
        rows = -(-rows // world) * world
    width = math.prod(parameter.shape[1:])
    return rows * width * parameter.element_size()


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


def precision_lines(suite: Suite) -> Iterator[CheckLine]:
    """Gradients in bfloat16, and checkpoints in all precisions."""
    case = replace(suite.make(OBJECTIVES["infonce"], 12), dtype=torch.float32)
    yield from _against_float64(suite, case)
    if suite.backend not in ("single", "ddp"):
        expected = _each_in_float64(case, 16, inside=suite.backend == "zero3")
        value = _sum_error(suite, case, expected)
        yield suite.line("bfloat16: chunks are added in float32", value, SUM)
        yield from _by_files(suite, case, expected)
    yield from _checkpoints(suite)


def _against_float64(suite: Suite, case: Case) -> Iterator[CheckLine]:
    # Backends that shard hold a copy of the weights in bfloat16: their gradient is taken there.
    rounded = suite.backend not in ("single", "ddp")
    _, expected = replace(case, dtype=torch.float64, rounded=rounded).reference()
    gradients, half = {}, replace(case, precision="bf16-mixed")
    for budget in (16, 10**6):
        for keep in (True, False):
            engine = half.engine(suite.launch, suite.backend, dropout=False)
            _, gradients[budget, keep] = half.gradient(engine, half.work(engine, budget), keep_graph=keep)
    worst = max(difference(gradient, expected) for gradient in gradients.values())
    yield suite.line("bfloat16: many chunks and one, kept and cached = float64", worst, NOISE)
    few = gradients[10**6, True]
    yield suite.line("bfloat16: many chunks = one", max(difference(f, few) for f in gradients.values()), NOISE / 2)


def _each_in_float64(case: Case, budget: int, *, inside: bool) -> dict[str, Tensor]:
    """The gradients that single chunks have in one process in bfloat16, added in float64.

    ``inside``: states add their gradients inside modules first.
    """
    engine = replace(case, precision="bf16-pure").engine(Launch(), "single", dropout=False)
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
        case.gradient(engine, case.work(engine, budget), keep_graph=False)
    return sums


def _sum_error(suite: Suite, case: Case, expected: dict[str, Tensor]) -> float:
    """How far the sum of many chunks is from the sum in float64, whether graphs are kept or not."""
    worst, half = 0.0, replace(case, precision="bf16-mixed")
    for keep in (True, False):
        engine = half.engine(suite.launch, suite.backend, dropout=False)
        _, gradient = half.gradient(engine, half.work(engine, 16), keep_graph=keep)
        worst = max(worst, difference(gradient, expected))
    return worst


def _by_files(suite: Suite, case: Case, expected: dict[str, Tensor]) -> Iterator[CheckLine]:
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
                value = _sum_error(suite, case, expected)
                yield suite.line(f"bfloat16, {name}: chunks are added in float32", value, SUM)
                resumed = _resumed(suite, small)
                yield suite.line(
                    f"bf16-mixed, {name}: from a checkpoint = uninterrupted", resumed, 0, unit="tensors that differ"
                )
            lossy = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
            file.write_text(json.dumps({"zero_optimization": {"stage": stage}, **lossy}))
            value = _sum_error(suite, case, expected)
            yield suite.line("bfloat16: chunks that are added in bfloat16 are noticed", value, SUM, at_least=True)


def _checkpoints(suite: Suite) -> Iterator[CheckLine]:
    """Every precision, with an adapter and without, and a CLIP folder with its scalar."""
    plain = replace(suite.make(OBJECTIVES["infonce, learnt temperature"], 4), dtype=torch.float32)
    cases = {"all weights": plain, "an adapter": replace(plain, adapter=True), "a CLIP folder": plain.in_clip()}
    for precision in PRECISIONS:
        for name, case in cases.items():
            if suite.backend == "fsdp2" and case.adapter and precision == "bf16-pure":
                continue  # which is refused: parameters of two types
            differing = _resumed(suite, replace(case, precision=precision))
            yield suite.line(
                f"{precision}, {name}: from a checkpoint = uninterrupted", differing, 0, unit="tensors that differ"
            )


def _resumed(suite: Suite, case: Case) -> float:
    """Tensors that differ between three steps, and one step, a checkpoint on the disk, a new engine and two more."""

    def stepped(steps: Sequence[int], saved: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None) -> Any:
        engine = case.engine(suite.launch, suite.backend, dropout=True, optimizer=decoupled_adam)
        if saved is not None:
            engine.backend.load(*(saved if suite.launch.is_main else (None, None)))
        for step in steps:
            one_step(engine, case, 60, step=step, rate=1e-2)
        return engine.backend

    first = stepped([0])
    with tempfile.TemporaryDirectory(prefix="nearfield-conformance-") as folder:
        writer = CheckpointWriter(Path(folder), 1, background=False, writes=suite.launch.is_main)
        path = writer.save(1, first.model_tensors(), first.optimizer_tensors(), {})
        saved = read_tensors(open_checkpoint(path)) if suite.launch.is_main else ({}, {})
    return count_differences(stepped([0, 1, 2]), stepped([1, 2], saved))


@dataclass(frozen=True)
class CheckLine:
    """One line of the table."""

    backend: str
    ranks: int
    check: str
    value: float
    """The measured value: a relative difference, or in ``unit``."""
    limit: float
    at_least: bool = False
    """Whether the value must be at least the limit: a check that a fault is noticed."""
    unit: str = "relative difference"

    @property
    def passed(self) -> bool:
        """Whether the equality holds."""
        if math.isnan(self.value):
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """For the table that a worker hands back."""
        return asdict(self)


class Suite:
    """All checks of one backend; every rank runs it, the lines of rank 0 count."""

    def __init__(self, backend: str, launch: Launch, make: Callable[[ObjectiveSettings, int], Case]) -> None:
        self.backend = backend
        self.launch = launch
        self.make = make
        """(objective, queries) -> case, in the precision of the backend."""
        self.tolerance = 1e-5 if backend.startswith("zero") else 1e-10

    def line(self, check: str, value: float, limit: float | None = None, **more: Any) -> CheckLine:
        """A line of this backend."""
        return CheckLine(
            self.backend, self.launch.world_size, check, value, self.tolerance if limit is None else limit, **more
        )

    def run(self) -> Iterator[CheckLine]:
        """All checks in order."""
        yield from self.chunks()
        yield from self.rows()
        yield self.unequal_shares()
        yield from self.dropout()
        yield from self.packing()
        yield from self.images()
        yield self.figures()
        yield self.averaging()
        yield self.clipping()
        yield from self.resume()
        yield from precision_lines(self)
        if self.launch.world_size > 1:
            yield self.ring()
            yield self.traffic()

    def _difference(
        self,
        case: Case,
        budget: int,
        *,
        keep_graph: bool,
        reference: tuple[float, dict[str, Tensor]] | None = None,
        deal: Callable[[Work], Work] = lambda work: work,
        packing: str = "never",
        exchange: str = "gather",
    ) -> float:
        """How far a step without dropout is from the reference, in its loss and its gradient."""
        loss, gradient = reference or case.reference()
        engine = case.engine(self.launch, self.backend, dropout=False, packing=packing, exchange=exchange)
        result, ours = case.gradient(engine, deal(case.work(engine, budget)), keep_graph=keep_graph)
        return max(difference(ours, gradient), abs(result.loss - loss) / abs(loss))

    def _dropout_difference(self, case: Case) -> float:
        """How far a step with dropout, and with deleted tokens where the objective deletes some, is from one process's."""
        if isinstance(case.objective, CAROLConfig):
            case = replace(case, objective=case.objective.model_copy(update={"delete": 0.3}))
        alone = case.engine(Launch(), "single", dropout=True)
        expected, gradient = case.gradient(alone, case.work(alone, 60), keep_graph=True)
        engine = case.engine(self.launch, self.backend, dropout=True)
        result, ours = case.gradient(engine, case.work(engine, 60), keep_graph=True)
        return max(difference(ours, gradient), abs(result.loss - expected.loss) / abs(expected.loss))

    def case(self, name: str, queries: int) -> Case:
        """A case with one of the objectives."""
        made = self.make(OBJECTIVES[name], queries)
        if name in (SEVERAL, VIEWS):
            sources = np.arange(queries) % 2
            return replace(made, batch=replace(made.batch, source=SEVERAL_SOURCES, sources=sources))
        return replace(made, weights=np.linspace(0.0, 2.0, queries)) if name == WEIGHTED else made

    def objectives(self) -> list[str]:
        """The objectives that this backend takes: a matrix that embeddings and head share is not sharded."""
        whole = self.backend in ("single", "ddp")
        return [name for name, config in OBJECTIVES.items() if whole or config.token_task is None]

    def chunks(self) -> Iterator[CheckLine]:
        """Any chunks, kept or cached = one padded forward, for every objective."""
        for name in self.objectives():
            case = self.case(name, 8)
            reference = case.reference()
            every = name == "infonce"
            worst = max(
                self._difference(case, budget, keep_graph=keep, reference=reference)
                for budget in ((16, 60, 10**6) if every else (60,))
                for keep in (True, False)
            )
            which = "chunks of one text, of some, of all" if every else "chunks"
            yield self.line(f"{which}, kept and cached = one padded forward ({name})", worst)

    def rows(self) -> Iterator[CheckLine]:
        """Batches that do not divide evenly over ranks."""
        for queries in (5, 2):
            case = self.make(OBJECTIVES["infonce, both directions"], queries)
            value = self._difference(case, 40, keep_graph=False)
            yield self.line(f"a batch of {queries} queries = the same in one process", value)

    def unequal_shares(self) -> CheckLine:
        """One rank with one chunk, the last with all others."""
        case = self.make(OBJECTIVES["infonce"], 8)

        def deal(work: Work) -> Work:
            shares: list[list[int]] = [[] for _ in work.shares]
            shares[0] = [0]
            shares[-1] = sorted({*shares[-1], *range(1, len(work.chunks))})
            return replace(work, shares=shares)

        worst = max(self._difference(case, 48, keep_graph=keep, deal=deal) for keep in (True, False))
        return self.line("ranks with 1 and with all other chunks = one process", worst)

    def ring(self) -> CheckLine:
        """Parts that are passed round, for every objective that can, and where a rank has no row."""
        contrastive = {name: one for name, one in OBJECTIVES.items() if isinstance(one, InfoNCEConfig)}
        able = {name: config for name, config in contrastive.items() if can_ring(config) and not config.queue}
        cases = [self.case(name, 8) for name in able] + [self.case("infonce, both directions", n) for n in (5, 2)]
        worst = max(self._difference(case, 60, keep_graph=False, exchange="ring") for case in cases)
        return self.line("parts passed round in a ring = one process, for all objectives that can", worst)

    def dropout(self) -> Iterator[CheckLine]:
        """Masks depend on (seed, step, chunk) alone."""
        worst = max(self._dropout_difference(self.case(name, 8)) for name in self.objectives())
        yield self.line("dropout on: any number of ranks = one, for every objective", worst)
        case = self.make(OBJECTIVES["infonce"], 8)
        gradients: dict[bool, dict[str, Tensor]] = {}
        for keep in (True, False):
            engine = case.engine(self.launch, self.backend, dropout=True)
            _, gradients[keep] = case.gradient(engine, case.work(engine, 60), keep_graph=keep)
        yield self.line(
            "dropout on: two passes (cached) = one pass that keeps its graph",
            difference(gradients[False], gradients[True]),
        )
        without = case.reference()[1]
        yield self.line("dropout on differs from off", difference(gradients[True], without), 1e-3, at_least=True)
        count = itertools.count()
        seed_chunk = step_module.seed_chunk
        step_module.seed_chunk = lambda seed, step, chunk: seed_chunk(seed, 1000 + next(count), chunk)
        try:
            engine = case.engine(self.launch, self.backend, dropout=True)
            _, broken = case.gradient(engine, case.work(engine, 60), keep_graph=False)
        finally:
            step_module.seed_chunk = seed_chunk
        yield self.line(
            "a broken replay of dropout is noticed", difference(broken, gradients[True]), 1e-3, at_least=True
        )

    def packing(self) -> Iterator[CheckLine]:
        """Texts end to end = padded texts."""
        case = self.make(OBJECTIVES["infonce"], 8)
        engine = case.engine(self.launch, self.backend, dropout=False, packing="auto")
        if engine.packing is None:
            raise AssertionError("the tiny BERT must be packed")
        worst = max(self._difference(case, 60, keep_graph=keep, packing="auto") for keep in (True, False))
        yield self.line("packed = padded", worst)

    def images(self) -> Iterator[CheckLine]:
        """Two towers: chunks of images and chunks of texts = one forward of each. One tower: chunks of both = one of all."""
        plain = self.make(OBJECTIVES["infonce, both directions"], 8)
        case = plain.with_images()
        for each, check in (
            (case, "images and texts in chunks of their own = one forward of each"),
            (
                plain.in_clip(),
                "images and texts of a CLIP folder, which has a scalar parameter = one forward of each",
            ),
            (
                plain.in_vision_language_model(),
                "images and texts in one tower, in chunks that mix them = one forward of all",
            ),
        ):
            reference = each.reference()
            worst = max(
                self._difference(each, budget, keep_graph=keep, reference=reference)
                for budget in ((60,) if each.clip else (16, 60, 10**6))
                for keep in (True, False)
            )
            yield self.line(check, worst)
        alone = case.engine(Launch(), "single", dropout=True)
        _, gradient = case.gradient(alone, case.work(alone, 60), keep_graph=True)
        engine = case.engine(self.launch, self.backend, dropout=True)
        _, chunked = case.gradient(engine, case.work(engine, 60), keep_graph=False)
        yield self.line("images, dropout on: any number of ranks, cached = one", difference(chunked, gradient))
        # A step without images behind one with them: their tower has no part in it, and may keep nothing of the one before.
        texts = replace(case, tokens=plain.tokens)
        engine = case.engine(self.launch, self.backend, dropout=False)
        one_step(engine, case, 60, step=0, rate=0.0)
        engine = replace(engine, data=replace(engine.data, tokens=plain.tokens))
        _, chunked = texts.gradient(engine, texts.work(engine, 60), keep_graph=False)
        yield self.line(
            "a step without images, after one with them = the same alone", difference(chunked, texts.reference()[1])
        )

    def figures(self) -> CheckLine:
        """The diagnostics of the learning, with masks, weights and a learnt temperature."""
        objective = OBJECTIVES["infonce, score mask, hardness, focal"].model_copy(update={"learn_temperature": True})
        case = self.make(objective, 8)
        alone = case.engine(Launch(), "single", dropout=True)
        expected = case.gradient(alone, case.work(alone, 60), keep_graph=True, watch=True)[0].figures
        engine = case.engine(self.launch, self.backend, dropout=True)
        figures = case.gradient(engine, case.work(engine, 60), keep_graph=False, watch=True)[0].figures
        assert figures.keys() == expected.keys() and "masked_score" in figures
        worst = max(abs(figures[name] - value) / max(abs(value), 1e-3) for name, value in expected.items())
        # An effective rank is the root of what float32 rounds.
        return self.line("figures of the learning = those of one process", worst, max(self.tolerance, 1e-8))

    def averaging(self) -> CheckLine:
        """Averaged batches, which must be asked for = the mean of the references of their parts."""
        case = self.make(OBJECTIVES["infonce, learnt temperature"], 8)
        parts = [replace(case, batch=part) for part in split_batch(case.batch, 2)]
        references = [part.reference()[1] for part in parts]
        expected = {name: (references[0][name] + references[1][name]) / 2 for name in references[0]}
        engine = case.engine(self.launch, self.backend, dropout=False)
        engine.backend.begin()
        for number, part in enumerate(parts):
            work = replace(part.work(engine, 60), weight=1 / 2, final=number == 1)
            run_step(engine, work, seed=5, step=3, keep_graph=False)
        return self.line(
            "two batches averaged = the mean of their gradients", difference(engine.backend.gradients(), expected)
        )

    def clipping(self) -> CheckLine:
        """A step of plain SGD = the reference gradient clipped by its global norm."""
        case = self.make(OBJECTIVES["infonce, learnt temperature"], 8)
        _, gradient = case.reference()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        limit = norm / 3
        engine = case.engine(self.launch, self.backend, dropout=False, max_norm=limit)
        before = whole(engine.backend.model_tensors())
        measured = one_step(engine, case, 60, max_norm=limit, step=3)
        after = whole(engine.backend.model_tensors())
        moved = {name: before[name] - after[name] for name in gradient}
        expected = {name: g * (limit / (norm + 1e-6)) for name, g in gradient.items()}
        return self.line(
            "clipping by the true global norm",
            max(difference(moved, expected), abs(measured - norm) / norm),
            max(self.tolerance, 1e-6),
        )

    def resume(self) -> Iterator[CheckLine]:
        """Three steps of AdamW = one step, all state through main memory into a new engine, two more."""
        case = self.make(OBJECTIVES["infonce, learnt temperature"], 8)

        def adamw(launch: Launch, backend: str) -> Engine:
            return case.engine(launch, backend, dropout=True, optimizer=decoupled_adam)

        straight = adamw(self.launch, self.backend)
        for step in range(3):
            one_step(straight, case, 60, step=step, rate=1e-3)
        first = adamw(self.launch, self.backend)
        one_step(first, case, 60, step=0, rate=1e-3)
        state = whole(first.backend.model_tensors()), whole(first.backend.optimizer_tensors())
        second = adamw(self.launch, self.backend)
        second.backend.load(*(state if self.launch.is_main else (None, None)))
        for step in (1, 2):
            one_step(second, case, 60, step=step, rate=1e-3)
        differs = count_differences(straight.backend, second.backend)
        yield self.line("resumed = uninterrupted, to the bit", differs, 0, unit="tensors that differ")
        if self.launch.world_size > 1:
            loss = next_loss(second, case, step=3)
            alone = adamw(Launch(), "single")
            state = whole(second.backend.model_tensors()), whole(second.backend.optimizer_tensors())
            alone.backend.load(*state)
            value = abs(next_loss(alone, case, step=3) - loss) / loss
            yield self.line("resumed on one rank: the next loss", value, 1e-5)

    def traffic(self) -> CheckLine:
        """Bytes that gradient reductions move, in units of the trained parameters' bytes."""
        case = self.make(OBJECTIVES["infonce"], 8)
        engine = case.engine(self.launch, self.backend, dropout=False)
        work = case.work(engine, 24)
        one_step(engine, case, 24, step=0)
        with CountTraffic() as count:
            one_step(engine, case, 24, step=1)
        shares = work.pool_shares()
        embeddings = len(shares.rows) * shares.longest * engine.columns * torch.finfo(case.dtype).bits // 8
        small = 8 * (3 + len(engine.backend.used())) + 64
        # Apart from the embeddings' gradient (once) and small words (control, norms), all traffic is parameter gradient.
        reductions = sorted(count.traffic.reductions())
        assert embeddings in reductions, f"no reduction of {embeddings} bytes among {reductions}"
        reductions.remove(embeddings)
        gradient = sum(size for size in reductions if size > small or engine.launch.world_size == 1)
        expected = sum(padded_bytes(engine.backend, p) for p in engine.backend_parameters())
        # ZeRO 2 and 3 keep a part of the gradient alone, so they reduce in every chunk's backward, by design.
        rounds = work.rounds if self.backend in ("zero2", "zero3") else 1
        times = gradient / expected
        return self.line(
            f"gradient bytes a step, {work.rounds} chunks a rank: {times:.3f} x the parameters ({rounds} by design)",
            abs(times / rounds - 1),
            1e-3,
        )


__all__ = ["CPU", "OBJECTIVES", "CheckLine", "Suite"]
