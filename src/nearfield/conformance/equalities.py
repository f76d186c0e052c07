"""The equalities. Each compares with a plain reference and says by how much it is off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfield.batching.plan import SEVERAL_SOURCES
from nearfield.conformance.counting import CountTraffic, padded_bytes
from nearfield.conformance.objectives import OBJECTIVES, SEVERAL, VIEWS, WEIGHTED
from nearfield.conformance.precision import precision_lines
from nearfield.conformance.problem import CPU, Problem, difference
from nearfield.conformance.steps import count_differences, decoupled_adam, next_loss, one_step, whole
from nearfield.objectives.config import InfoNCEConfig, ObjectiveSettings
from nearfield.objectives.infonce import can_ring
from nearfield.objectives.more_kinds import CAROLConfig
from nearfield.training import step as step_module
from nearfield.training.chunks import split_batch
from nearfield.training.engine import Engine
from nearfield.training.launch import Launch
from nearfield.training.step import Work, run_step


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    backend: str
    ranks: int
    check: str
    value: float
    """What was found: a relative difference, or what ``unit`` says."""
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

    def __init__(self, backend: str, launch: Launch, make: Callable[[ObjectiveSettings, int], Problem]) -> None:
        self.backend = backend
        self.launch = launch
        self.make = make
        """(objective, queries) -> problem, in the precision of the backend."""
        self.tolerance = 1e-5 if backend.startswith("zero") else 1e-10

    def line(self, check: str, value: float, limit: float | None = None, **more: Any) -> Line:
        """A line of this backend."""
        return Line(
            self.backend, self.launch.world_size, check, value, self.tolerance if limit is None else limit, **more
        )

    def run(self) -> Iterator[Line]:
        """All checks in order."""
        yield from self.chunks()
        yield from self.rows()
        yield self.unequal_shares()
        yield from self.dropout()
        yield from self.packing()
        yield from self.pictures()
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
        problem: Problem,
        budget: int,
        *,
        keep_graph: bool,
        reference: tuple[float, dict[str, Tensor]] | None = None,
        deal: Callable[[Work], Work] = lambda work: work,
        packing: str = "never",
        exchange: str = "gather",
    ) -> float:
        """How far a step without dropout is from the reference, in its loss and its gradient."""
        loss, gradient = reference or problem.reference()
        engine = problem.engine(self.launch, self.backend, dropout=False, packing=packing, exchange=exchange)
        result, ours = problem.gradient(engine, deal(problem.work(engine, budget)), keep_graph=keep_graph)
        return max(difference(ours, gradient), abs(result.loss - loss) / abs(loss))

    def _dropout_difference(self, problem: Problem) -> float:
        """How far a step with dropout, and with deleted tokens where the objective deletes some, is from one process's."""
        if isinstance(problem.objective, CAROLConfig):
            problem = replace(problem, objective=problem.objective.model_copy(update={"delete": 0.3}))
        alone = problem.engine(Launch(), "single", dropout=True)
        expected, gradient = problem.gradient(alone, problem.work(alone, 60), keep_graph=True)
        engine = problem.engine(self.launch, self.backend, dropout=True)
        result, ours = problem.gradient(engine, problem.work(engine, 60), keep_graph=True)
        return max(difference(ours, gradient), abs(result.loss - expected.loss) / abs(expected.loss))

    def problem(self, name: str, queries: int) -> Problem:
        """A problem with one of the objectives."""
        found = self.make(OBJECTIVES[name], queries)
        if name in (SEVERAL, VIEWS):
            sources = np.arange(queries) % 2
            return replace(found, batch=replace(found.batch, source=SEVERAL_SOURCES, sources=sources))
        return replace(found, weights=np.linspace(0.0, 2.0, queries)) if name == WEIGHTED else found

    def objectives(self) -> list[str]:
        """The objectives that this backend takes: a matrix that embeddings and head share is not sharded."""
        whole = self.backend in ("single", "ddp")
        return [name for name, config in OBJECTIVES.items() if whole or config.token_task is None]

    def chunks(self) -> Iterator[Line]:
        """Any chunks, kept or cached = one padded forward, for every objective."""
        for name in self.objectives():
            problem = self.problem(name, 8)
            reference = problem.reference()
            every = name == "infonce"
            worst = max(
                self._difference(problem, budget, keep_graph=keep, reference=reference)
                for budget in ((16, 60, 10**6) if every else (60,))
                for keep in (True, False)
            )
            which = "chunks of one text, of some, of all" if every else "chunks"
            yield self.line(f"{which}, kept and cached = one padded forward ({name})", worst)

    def rows(self) -> Iterator[Line]:
        """Batches that do not divide evenly over ranks."""
        for queries in (5, 2):
            problem = self.make(OBJECTIVES["infonce, both directions"], queries)
            value = self._difference(problem, 40, keep_graph=False)
            yield self.line(f"a batch of {queries} queries = the same in one process", value)

    def unequal_shares(self) -> Line:
        """One rank with one chunk, the last with all others."""
        problem = self.make(OBJECTIVES["infonce"], 8)

        def deal(work: Work) -> Work:
            shares: list[list[int]] = [[] for _ in work.shares]
            shares[0] = [0]
            shares[-1] = sorted({*shares[-1], *range(1, len(work.chunks))})
            return replace(work, shares=shares)

        worst = max(self._difference(problem, 48, keep_graph=keep, deal=deal) for keep in (True, False))
        return self.line("ranks with 1 and with all other chunks = one process", worst)

    def ring(self) -> Line:
        """Parts that are passed round, for every objective that can, and where a rank has no row."""
        contrastive = {name: one for name, one in OBJECTIVES.items() if isinstance(one, InfoNCEConfig)}
        able = {name: config for name, config in contrastive.items() if can_ring(config) and not config.queue}
        problems = [self.problem(name, 8) for name in able] + [
            self.problem("infonce, both directions", n) for n in (5, 2)
        ]
        worst = max(self._difference(problem, 60, keep_graph=False, exchange="ring") for problem in problems)
        return self.line("parts passed round in a ring = one process, for all objectives that can", worst)

    def dropout(self) -> Iterator[Line]:
        """Masks depend on (seed, step, chunk) alone."""
        worst = max(self._dropout_difference(self.problem(name, 8)) for name in self.objectives())
        yield self.line("dropout on: any number of ranks = one, for every objective", worst)
        problem = self.make(OBJECTIVES["infonce"], 8)
        found: dict[bool, dict[str, Tensor]] = {}
        for keep in (True, False):
            engine = problem.engine(self.launch, self.backend, dropout=True)
            _, found[keep] = problem.gradient(engine, problem.work(engine, 60), keep_graph=keep)
        yield self.line(
            "dropout on: two passes (cached) = one pass that keeps its graph", difference(found[False], found[True])
        )
        without = problem.reference()[1]
        yield self.line("dropout on differs from off", difference(found[True], without), 1e-3, at_least=True)
        count = itertools.count()
        seed_chunk = step_module.seed_chunk
        step_module.seed_chunk = lambda seed, step, chunk: seed_chunk(seed, 1000 + next(count), chunk)
        try:
            engine = problem.engine(self.launch, self.backend, dropout=True)
            _, broken = problem.gradient(engine, problem.work(engine, 60), keep_graph=False)
        finally:
            step_module.seed_chunk = seed_chunk
        yield self.line("a broken replay of dropout is noticed", difference(broken, found[True]), 1e-3, at_least=True)

    def packing(self) -> Iterator[Line]:
        """Texts end to end = padded texts."""
        problem = self.make(OBJECTIVES["infonce"], 8)
        engine = problem.engine(self.launch, self.backend, dropout=False, packing="auto")
        if engine.packing is None:
            raise AssertionError("the tiny BERT must be packed")
        worst = max(self._difference(problem, 60, keep_graph=keep, packing="auto") for keep in (True, False))
        yield self.line("packed = padded", worst)

    def pictures(self) -> Iterator[Line]:
        """Two towers: chunks of pictures and chunks of texts = one forward of each. One tower: chunks of both = one of all."""
        plain = self.make(OBJECTIVES["infonce, both directions"], 8)
        problem = plain.with_pictures()
        for each, check in (
            (problem, "pictures and texts in chunks of their own = one forward of each"),
            (
                plain.in_clip(),
                "pictures and texts of a CLIP folder, which has a scalar parameter = one forward of each",
            ),
            (plain.in_one_tower(), "pictures and texts in one tower, in chunks that mix them = one forward of all"),
        ):
            reference = each.reference()
            worst = max(
                self._difference(each, budget, keep_graph=keep, reference=reference)
                for budget in ((60,) if each.clip else (16, 60, 10**6))
                for keep in (True, False)
            )
            yield self.line(check, worst)
        alone = problem.engine(Launch(), "single", dropout=True)
        _, gradient = problem.gradient(alone, problem.work(alone, 60), keep_graph=True)
        engine = problem.engine(self.launch, self.backend, dropout=True)
        _, found = problem.gradient(engine, problem.work(engine, 60), keep_graph=False)
        yield self.line("pictures, dropout on: any number of ranks, cached = one", difference(found, gradient))
        # A step without pictures behind one with them: their tower has no part in it, and may keep nothing of the one before.
        texts = replace(problem, tokens=plain.tokens)
        engine = problem.engine(self.launch, self.backend, dropout=False)
        one_step(engine, problem, 60, step=0, rate=0.0)
        engine = replace(engine, feed=replace(engine.feed, tokens=plain.tokens))
        _, found = texts.gradient(engine, texts.work(engine, 60), keep_graph=False)
        yield self.line(
            "a step without pictures, after one with them = the same alone", difference(found, texts.reference()[1])
        )

    def figures(self) -> Line:
        """What is told of the learning, with masks, weights and a learnt temperature."""
        objective = OBJECTIVES["infonce, score mask, hardness, focal"].model_copy(update={"learn_temperature": True})
        problem = self.make(objective, 8)
        alone = problem.engine(Launch(), "single", dropout=True)
        expected = problem.gradient(alone, problem.work(alone, 60), keep_graph=True, watch=True)[0].figures
        engine = problem.engine(self.launch, self.backend, dropout=True)
        found = problem.gradient(engine, problem.work(engine, 60), keep_graph=False, watch=True)[0].figures
        assert found.keys() == expected.keys() and "masked_score" in found
        worst = max(abs(found[name] - value) / max(abs(value), 1e-3) for name, value in expected.items())
        # An effective rank is the root of what float32 rounds.
        return self.line("figures of the learning = those of one process", worst, max(self.tolerance, 1e-8))

    def averaging(self) -> Line:
        """Averaged batches, which must be asked for = the mean of the references of their parts."""
        problem = self.make(OBJECTIVES["infonce, learnt temperature"], 8)
        parts = [replace(problem, batch=part) for part in split_batch(problem.batch, 2)]
        references = [part.reference()[1] for part in parts]
        expected = {name: (references[0][name] + references[1][name]) / 2 for name in references[0]}
        engine = problem.engine(self.launch, self.backend, dropout=False)
        engine.backend.begin()
        for number, part in enumerate(parts):
            work = part.work(engine, 60)
            run_step(
                engine.backend,
                engine.objective,
                work,
                engine.make_features(work.pool, 5, 3),
                dimension=engine.columns,
                seed=5,
                step=3,
                keep_graph=False,
                weight=1 / 2,
                final=number == 1,
            )
        return self.line(
            "two batches averaged = the mean of their gradients", difference(engine.backend.gradients(), expected)
        )

    def clipping(self) -> Line:
        """A step of plain SGD = the reference gradient clipped by its global norm."""
        problem = self.make(OBJECTIVES["infonce, learnt temperature"], 8)
        _, gradient = problem.reference()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        limit = norm / 3
        engine = problem.engine(self.launch, self.backend, dropout=False, max_norm=limit)
        before = whole(engine.backend.model_tensors())
        found = one_step(engine, problem, 60, max_norm=limit, step=3)
        after = whole(engine.backend.model_tensors())
        moved = {name: before[name] - after[name] for name in gradient}
        expected = {name: g * (limit / (norm + 1e-6)) for name, g in gradient.items()}
        return self.line(
            "clipping by the true global norm",
            max(difference(moved, expected), abs(found - norm) / norm),
            max(self.tolerance, 1e-6),
        )

    def resume(self) -> Iterator[Line]:
        """Three steps of AdamW = one step, all state through main memory into a new engine, two more."""
        problem = self.make(OBJECTIVES["infonce, learnt temperature"], 8)

        def adamw(launch: Launch, backend: str) -> Engine:
            return problem.engine(launch, backend, dropout=True, rate=1e-3, optimizer=decoupled_adam)

        straight = adamw(self.launch, self.backend)
        for step in range(3):
            one_step(straight, problem, 60, step=step, rate=1e-3)
        first = adamw(self.launch, self.backend)
        one_step(first, problem, 60, step=0, rate=1e-3)
        state = whole(first.backend.model_tensors()), whole(first.backend.optimizer_tensors())
        second = adamw(self.launch, self.backend)
        second.backend.load(*(state if self.launch.is_main else (None, None)))
        for step in (1, 2):
            one_step(second, problem, 60, step=step, rate=1e-3)
        differs = count_differences(straight.backend, second.backend)
        yield self.line("resumed = uninterrupted, to the bit", differs, 0, unit="tensors that differ")
        if self.launch.world_size > 1:
            loss = next_loss(second, problem, step=3)
            alone = adamw(Launch(), "single")
            state = whole(second.backend.model_tensors()), whole(second.backend.optimizer_tensors())
            alone.backend.load(*state)
            value = abs(next_loss(alone, problem, step=3) - loss) / loss
            yield self.line("resumed on one rank: the next loss", value, 1e-5)

    def traffic(self) -> Line:
        """Bytes that gradient reductions move, in units of the trained parameters' bytes."""
        problem = self.make(OBJECTIVES["infonce"], 8)
        engine = problem.engine(self.launch, self.backend, dropout=False)
        work = problem.work(engine, 24)
        one_step(engine, problem, 24, step=0)
        with CountTraffic() as count:
            one_step(engine, problem, 24, step=1)
        shares = work.pool_shares()
        embeddings = len(shares.rows) * shares.longest * engine.columns * torch.finfo(problem.dtype).bits // 8
        small = 8 * (3 + len(engine.backend.used())) + 64
        # What is left after the embeddings' gradient (once) and small words (control, norms) is parameter gradient.
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


__all__ = ["CPU", "OBJECTIVES", "Line", "Suite"]
