"""Signs that a training learns nothing: batches that teach nothing whatever the encoder gives, gradients of exactly 0, a loss
that stays at chance, embeddings of zeros, and numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nearfield.arrays import Rows
from nearfield.batching.plan import Batch, Plan
from nearfield.errors import BadInputError, NonFiniteError, Notice
from nearfield.files import write_json
from nearfield.objectives.batch import ContrastiveBatch, Objective
from nearfield.objectives.diagnostics import watched_rows
from nearfield.provenance import derive_seed
from nearfield.training.chunks import TextPool, TrainingData, contrastive_batch, cut_batch, split_batch
from nearfield.training.launch import broadcast_notices
from nearfield.training.step import Part, StepMade, StepResult

if TYPE_CHECKING:
    from nearfield.training.engine import Engine
    from nearfield.training.trainer import TrainingInputs


STEPS = 10
"""Steps at the start of a run whose gradients may all be 0 before it is stopped."""
LOOKS = 24
"""Steps of a run whose loss is held against chance, at most."""
LEAST = 12
"""Looks that a verdict wants."""
NEAR = 0.02
"""A loss is at chance where it is less than this share below what embeddings that are all alike give."""


class GradientWatch(Part):
    """Stops a run whose first gradients are all exactly 0, those of batches of every source among them."""

    def __init__(self, first: int, sources: Sequence[int]) -> None:
        """``first`` steps are done of those whose batches have these ``sources``."""
        self._left = list(sources[first:]) if first < STEPS else []
        self._wanted = set(self._left)
        self._seen = 0

    def after_step(self, made: StepMade) -> None:
        self.see(made.norm)

    def see(self, norm: float) -> None:
        """Take the norm of a step's gradient, the same on all ranks.

        Raises:
            BadInputError: It and all before it are 0, and there were enough.
        """
        if norm or not self._left:
            self._left = []
            return
        self._wanted.discard(self._left.pop(0))
        self._seen += 1
        if not self._left or (self._seen >= STEPS and not self._wanted):
            raise BadInputError(
                f"the gradient of the first {self._seen} steps is exactly 0: nothing is learnt",
                where="training",
                hint="Are all parameters frozen, all weights 0, all negatives masked, or all margins kept already?",
            )


@dataclass
class ChanceWatch(Part):
    """Holds the loss of some steps against that of embeddings which are all alike."""

    steps: int
    """Of the run."""
    shares: list[float] = field(default_factory=list)
    """Loss over chance, in the order of steps."""

    def after_step(self, made: StepMade) -> None:
        if self.wants(made.done - 1):
            self.see(self.trainer.engine, made.result)

    def end(self) -> None:
        self.trainer.inputs.tell(broadcast_notices(self.notices, self.trainer.device))

    def wants(self, step: int) -> bool:
        """Whether the step is looked at."""
        every = max(1, self.steps // LOOKS)
        return step % every == 0

    def see(self, engine: Engine, result: StepResult) -> None:
        """Look at a step; *collective*, though rank 0 alone computes."""
        objective, batch = engine.objective, result.batch
        if not objective.contrasts or engine.ring or batch is None:
            return
        with engine.backend.whole([p for p in objective.parameters() if p.requires_grad]):
            if engine.launch.is_main and (chance := loss_of_chance(objective, batch)) > 0:
                self.shares.append(result.loss / chance)

    def notices(self) -> Iterator[Notice]:
        """Whether the loss was at chance all the time."""
        if len(self.shares) < LEAST:
            return
        half = len(self.shares) // 2
        begin, end = (sum(part) / len(part) for part in (self.shares[:half], self.shares[-half:]))
        if min(begin, end) > 1 - NEAR:
            yield Notice(
                "loss-at-chance",
                f"the loss was at chance and did not move: {begin:.1%} of what texts that are all alike give in the first half "
                f"of the steps that were looked at, {end:.1%} in the last",
                "Do queries and positives belong together? Is the learning rate too low, or so high that all embeddings "
                "became alike?",
            )


@torch.no_grad()
def loss_of_chance(objective: Objective, batch: ContrastiveBatch) -> float:
    """The mean loss of a batch whose embeddings are all alike, of its watched rows; 0 where these count nothing."""
    rows = watched_rows(batch)
    alike = [torch.ones_like(side) for side in (batch.queries, batch.documents)]
    losses = objective.forward(replace(batch, queries=alike[0], documents=alike[1], rows=rows, ring=None)).rows
    counted = float(len(rows)) if batch.weights is None else float(batch.weights[rows].sum())
    return float(losses.sum()) / counted if counted else 0.0


class ZeroVectors(Part):
    """Counts the embeddings that are zero in every dimension, and tells of them once."""

    def __init__(self, device: torch.device, tell: Callable[[Sequence[Notice]], None]) -> None:
        self.device, self._tell, self.told = device, tell, False
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = 0

    def after_step(self, made: StepMade) -> None:
        self.look(made.result.batch)
        if made.line is not None:
            self.say(made.done)

    def look(self, batch: ContrastiveBatch | None) -> None:
        """Take in the embeddings of a step, of this rank's part alone where parts are passed round; waits for no device."""
        if batch is None or self.told:
            return
        for embeddings in (batch.queries, batch.documents):
            self._count += (embeddings == 0).all(dim=1).sum()
            self._seen += len(embeddings)

    def say(self, step: int) -> None:
        """Tell of those so far where there are some; *collective*, rank 0 decides."""
        if self.told:
            return
        notices = broadcast_notices(lambda: self._notices(step), self.device)
        if notices:
            self.told = True
            self._tell(notices)

    def _notices(self, step: int) -> list[Notice]:
        count = int(self._count)
        if not count:
            return []
        what = (
            f"{count:,} of {self._seen:,} embeddings of the steps up to {step:,} are zero: nothing is learnt from them"
        )
        return [Notice("zero-vectors", what, "Look for texts without a token that is pooled, such as empty ones.")]


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


BATCHES = 64
"""Batches of a source that are looked at, at most; the first that teaches something ends it."""
EXAMPLES = 128
"""Examples of a batch that are looked at first; all of it only where these teach nothing."""
NOTHING = 1e-9
"""Gradients of float64 below this are what rounding leaves of 0."""

_WHY = (
    "Explicit-only objectives want negatives, graded ones scores that differ, labelled ones labels that several texts have; "
    "masks may leave out every negative, weights may all be 0, and batches may be cut into single examples "
    "(training.averaged_batches)."
)


def teaching_notices(
    objective: Objective,
    data: TrainingData,
    plans: Sequence[Plan],
    names: Mapping[int, str],
    width: int,
    parts: int = 1,
) -> Iterator[Notice]:
    """Notices about data that no encoder of ``width`` could learn from; ``names`` are those of the sources by number.

    Each batch is cut into so many ``parts``, whose losses are averaged.
    """
    yield from _same_texts(data)
    if data.token_task is not None:
        return  # losses on tokens are the encoder's own
    probe = _Probe(objective.double(), data, width, sum(map(len, plans)), parts)
    batches = batches_by_source(plans)
    idle: list[int] = []
    for source, steps in batches.items():
        some = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, BATCHES).round().astype(int)).tolist()]
        if not any(probe.teaches(plans[epoch].batch(step), number, source) for epoch, step, number in some):
            idle.append(source)
    if len(idle) == len(batches):
        yield Notice(
            "nothing-to-learn",
            "the gradient of the loss is 0 whatever the encoder gives: nothing can be learnt from these batches",
            _WHY,
            blocks=True,
        )
        return
    for source in idle:
        what = f"{names[source]}: the gradient of the loss of its examples is 0 whatever the encoder gives"
        yield Notice("source-teaches-nothing", what, _WHY)


def batches_by_source(plans: Sequence[Plan]) -> dict[int, list[tuple[int, int, int]]]:
    """Source -> (epoch, step, number of the step in the run) of the batches with examples of it."""
    batches: dict[int, list[tuple[int, int, int]]] = {}
    before = 0
    for epoch, plan in enumerate(plans):
        pairs = np.unique(np.stack([plan.column("source"), plan.column("step")], axis=1), axis=0)
        for source, step in pairs.tolist():
            batches.setdefault(source, []).append((epoch, step, before + step))
        before += len(plan)
    return batches


def _same_texts(data: TrainingData) -> Iterator[Notice]:
    """Prompts that leave no room for the text."""
    for table in data.tokens.tables:
        if data.images is not None or len(table.rows) < 2:
            continue
        first = table.of(int(table.rows[0]))
        if all(np.array_equal(table.of(int(row)), first) for row in table.rows):
            of = f" with the prompt {table.prompt[:80]!r}" if table.prompt else ""
            why = (
                "the prompt takes all that is read of a text"
                if table.prompt
                else "the tokenizer knows none of their words, or no more of them is read"
            )
            yield Notice(
                "texts-all-the-same",
                f"all {len(table.rows):,} texts{of} are the same {len(first)} tokens: {why}",
                "Shorten the prompt, or raise training.max_length."
                if table.prompt
                else "Use the tokenizer of the texts' language, or raise training.max_length.",
                blocks=True,
            )


class _Probe:
    """Batches of the plan with embeddings that nobody encoded."""

    def __init__(self, objective: Objective, data: TrainingData, width: int, steps: int, parts: int) -> None:
        self.objective, self.data, self.width, self.steps, self.parts = objective, data, width, steps, parts

    def teaches(self, batch: Batch, number: int, source: int) -> bool:
        """Whether some embeddings have a gradient, from the examples of a source in the batch."""
        for part in split_batch(batch, self.parts):
            sizes = sorted({min(EXAMPLES, len(part.query)), len(part.query)})
            if any(self._some(cut_batch(part, 0, size), number, source) for size in sizes):
                return True
        return False

    def _some(self, batch: Batch, number: int, source: int) -> bool:
        pool = self.data.pool(batch)
        if self.objective.wants_tokens:
            pool = self.data.with_query_tokens(pool)
        known = self.data.known(batch)
        texts = self._texts(pool)
        rows = None if batch.sources is None else torch.from_numpy(np.flatnonzero(batch.sources == source))
        for vectors in self._embeddings(pool, texts):
            leaf = vectors.requires_grad_()
            seen = contrastive_batch(pool, leaf[torch.from_numpy(texts)], known, draw=number, guide=self.data.guide)
            loss = self.objective.forward(replace(seen, rows=rows, progress=number / self.steps))
            (gradient,) = loss.gradients([leaf])
            if not bool((gradient.abs() <= NOTHING).all()):
                return True
        return False

    def _texts(self, pool: TextPool) -> Rows:
        """(n,) the number of what an encoder would see of each text of the pool."""
        places = np.arange(len(pool.items))
        rows = self.data.tokens_of(pool, places)
        shares = np.zeros(len(rows)) if pool.deleted is None else pool.deleted
        numbers: dict[tuple[object, ...], int] = {}
        # A image's tokens say nothing of it: there each item is another.
        items = pool.items if self.data.images is not None else np.zeros(len(rows), dtype=np.int64)
        keys = zip((row.tobytes() for row in rows), items.tolist(), shares.tolist(), strict=True)
        return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def _embeddings(self, pool: TextPool, texts: Rows) -> Iterator[Tensor]:
        """Unrelated ones; positives near their queries; all near each other."""
        draw = torch.Generator().manual_seed(derive_seed(0, "teaching"))
        count = int(texts.max(initial=-1)) + 1
        apart = torch.randn(count, self.width, generator=draw, dtype=torch.float64)
        yield apart.clone()
        near = apart.clone()
        positives = np.flatnonzero(pool.is_positive)
        near[texts[pool.documents[positives]]] += 2 * apart[texts[pool.queries[pool.owner[positives]]]]
        yield near
        yield apart[:1] + 0.1 * apart
