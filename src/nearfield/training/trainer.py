"""The trainer, to be read from top to bottom. Every rank runs it.

:func:`train` opens the process group and a :class:`Trainer`. A step takes a batch of the plan, leaves the gradient of its loss
in the backend, and updates the weights. Evaluation, changing negatives, tracking and diagnostics are parts
(:class:`nearfield.training.step.Part`) that are called before, after and between steps. A checkpoint holds the state of the model,
of the optimiser, of the trainer and of its parts.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nearfield.arrays import Rows
from nearfield.batching.plan import Batch, Plan, total_steps
from nearfield.errors import BadInputError, Notice, OutOfMemoryStopError, StoppedError
from nearfield.objectives.batch import MemoryQueue, Objective
from nearfield.objectives.diagnostics import similarities
from nearfield.training.checkpoint import CheckpointWriter, amend_state, checkpoint_paths, newest_checkpoint, resume
from nearfield.training.chunks import CUT_RULE, Budget, TrainingData
from nearfield.training.diagnostics import ChanceWatch, GradientWatch, ZeroVectors, non_finite_error
from nearfield.training.engine import Engine, build_engine, pick_device, pick_precision
from nearfield.training.evaluation import Evaluate, Evaluations, InterruptedEvaluationError
from nearfield.training.forecast import begin_forecast, end_forecast, notices_of_start
from nearfield.training.launch import Launch, RankDiedError, StopRequest, any_rank, broadcast_notices
from nearfield.training.optimizers import optimizer_of, rate_factor
from nearfield.training.step import Part, StepMade, StepResult, batch_gradient, stops_for_memory
from nearfield.training.tracking import Trackers, TrainingProgress, used_memory

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.training.changing_negatives import NegativeInputs
    from nearfield.training.config import TrainingConfig

logger = logging.getLogger("nearfield.training")


@dataclass(frozen=True)
class TrainingInputs:
    """The plans of a training and the data that they name by rows."""

    plans: Sequence[Plan]
    """One an epoch."""
    plan_hashes: Sequence[str]
    data: TrainingData
    item_ids: Callable[[Rows], list[str]]
    """Item rows -> their ids in hex, for messages."""
    evaluate: Evaluate | None = None
    """Scores the model during the training, where the configuration asks for it."""
    negatives: NegativeInputs | None = None
    """The source of changing negatives; None where those of the plans stay."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The run's name and settings, shown by trackers beside the figures."""
    tell: Callable[[Sequence[Notice]], None] = lambda found: None
    """Takes what users of the training must know; every rank calls it with the same."""

    @property
    def epochs(self) -> list[int]:
        """The steps of each epoch."""
        return [len(plan) for plan in self.plans]

    @property
    def sources(self) -> list[int]:
        """The source of each step's batch."""
        return [source for plan in self.plans for source in plan.sources().tolist()]

    def batch_of_step(self, step: int) -> tuple[int, Batch]:
        """The epoch and the batch of a step of the whole run."""
        for epoch, plan in enumerate(self.plans):
            if step < len(plan):
                return epoch, plan.batch(step)
            step -= len(plan)
        raise IndexError("the plans have fewer steps")


@dataclass(frozen=True)
class TrainingResult:
    """How a run went."""

    steps: int
    """Steps done."""
    resumed_from: int
    examples: int
    """Examples of all steps, those before a resume counted."""
    last_loss: float | None
    """The loss of the last step; None where no step was made."""
    seconds: float
    """Seconds of all steps, those before a resume counted."""
    device: str
    precision: str
    backend: str
    world_size: int
    checkpoint: Path
    """The checkpoint that the model is to be made of."""
    stopped_early: bool = False
    """Whether evaluations without a gain ended the training."""
    best: tuple[int, float] | None = None
    """The step and score of the best evaluation."""


def train(
    config: TrainingConfig,
    objective: Objective,
    model: SentenceTransformer,
    inputs: TrainingInputs,
    run: Path,
    *,
    seed: int,
    fingerprint: str,
    launch: Launch | None = None,
) -> TrainingResult:
    """Train ``model`` on the plans, from the newest checkpoint in ``run/checkpoints`` if there is one.

    The steps, and on a CPU with the same number of ranks every bit of the weights, are those of a run that was never
    interrupted. The outcome is a checkpoint, the last or the best one: a sharded model is whole nowhere else.

    Raises :class:`StoppedError` after a checkpoint when a signal asks any rank to stop, :class:`NonFiniteError` after a
    checkpoint of the last good state when a loss or gradient is not finite, and :class:`OutOfMemoryStopError` where the
    ranks must start anew with the smaller budget that the last checkpoint now holds.
    """
    launch = launch or Launch()
    if total_steps(inputs.plans, config.max_steps) == 0:
        raise BadInputError(
            "the plan has no steps", where=str(run / "plan"), hint="Is batch_size larger than the data?"
        )
    device = pick_device(config, launch)
    shrink = ShrinkBudget(run / "checkpoints", writes=launch.is_main)
    with StopRequest(launched=launch.world_size > 1) as stop, torch.random.fork_rng():
        try:
            with launch.process_group(device, config.collective_timeout, on_dead=shrink.when_dead):
                optimizer = optimizer_of(config, device)
                engine = build_engine(config, model, objective, optimizer, inputs.data, device, launch)
                return Trainer(engine, inputs, run, seed, fingerprint, stop).train()
        except OutOfMemoryStopError:
            shrink()
            raise
        except RankDiedError as error:
            shrink.when_dead(error.exit_code)
            raise


class Trainer:
    """The training of an engine on planned batches: its steps, its parts, and its state."""

    def __init__(
        self, engine: Engine, inputs: TrainingInputs, run: Path, seed: int, fingerprint: str, stop: StopRequest
    ) -> None:
        """Open the parts of the training, and go on from the newest checkpoint."""
        self.engine, self.inputs, self.run, self.seed, self.stop = engine, inputs, run, seed, stop
        self.config, self.launch, self.device = engine.config, engine.launch, engine.backend.device
        self.steps = total_steps(inputs.plans, self.config.max_steps)
        plans = list(inputs.plan_hashes)
        self.identity = {"fingerprint": fingerprint, "plans": plans, "seed": seed, "cut_rule": CUT_RULE}
        saved, tensors = resume(engine, run / "checkpoints", self.identity, self.steps)
        state = saved or {}
        self.first = self.done = int(state.get("step", 0))
        self.examples, self.loss = int(state.get("examples", 0)), state.get("loss")
        self._seconds_before = float(state.get("seconds", 0.0))
        self._began: float | None = None
        checkpoints = self.config.checkpoints
        self.writer = CheckpointWriter(
            run / "checkpoints", checkpoints.keep_last, background=checkpoints.background, writes=self.launch.is_main
        )
        self.writer.newest = None if saved is None else self.first
        self.wanted = False
        """Whether a part wants a checkpoint of this step."""
        self.budget, self.outlook = begin_forecast(
            engine,
            inputs.plans,
            run,
            fingerprint=fingerprint,
            budget=None if saved is None else Budget.from_json(saved),
        )
        if self.outlook.at_start is not None:
            notices = partial(notices_of_start, self.outlook.at_start, self.config, run)
            inputs.tell(broadcast_notices(notices, self.device))
        self.evaluations: Evaluations | None = None
        if self.config.evaluation is not None:
            self.evaluations = Evaluations(self.config.evaluation, inputs.evaluate, engine, inputs.epochs, self.steps)
        self.parts: list[Part] = [
            GradientWatch(self.first, inputs.sources[: self.steps]),
            ChanceWatch(self.steps),
            *([] if self.evaluations is None else [self.evaluations]),
            *([] if inputs.negatives is None else [inputs.negatives.config.build(inputs.negatives, self)]),
            *([] if engine.queue is None else [QueuedPositives(engine.queue)]),
            ZeroVectors(self.device, inputs.tell),
        ]
        for part in self.parts:
            part.begin(self)
            if saved is not None:
                part.load(saved, tensors)
        self.tracking = Trackers(
            self.config.trackers,
            run,
            self.first,
            evaluated=int(state.get("evaluation", {}).get("evaluated", -1)),
            about=inputs.about,
            writes=self.launch.is_main,
        )
        self.parts.append(self.tracking)

    def train(self) -> TrainingResult:
        """Make all steps that are left."""
        with self.writer, self.tracking, TrainingProgress(self.first, self.steps) as progress:
            if not self.engine.retries_in_place and not checkpoint_paths(self.writer.folder):
                # Memory that runs out ends the ranks: the smaller budget needs a checkpoint to live in.
                self.save()
            self._began = time.monotonic()
            self.pause()
            while self.done < self.steps and not self.exhausted:
                made = self.train_step()
                progress.update(self.done, made.result.loss, len(made.batch.query))
                if made.result.word.stop and self.done < self.steps:
                    self.leave()
                self.pause()
                self.writer.check()
            seconds = self.seconds()
            self.writer.wait()
        for part in self.parts:
            part.end()
        spent = seconds - self._seconds_before
        end_forecast(self.outlook, self.engine, self.run, first=self.first, steps=self.done, seconds=spent)
        return self.result(seconds)

    def train_step(self) -> StepMade:
        """Take the next batch, its gradient, and a step of the optimiser; then the parts look at it."""
        began, step = time.monotonic(), self.done
        epoch, batch = self.inputs.batch_of_step(step)
        figures: dict[str, int] = {}
        for part in self.parts:
            batch, more = part.batch(batch, step)
            figures |= more
        rate = self.config.learning_rate * rate_factor(self.config.schedule, step, self.steps)
        logged, watched = self.config.logs(step + 1, self.steps)
        result, tokens, padded = self.gradient(batch, watch=watched and self.launch.is_main)
        norm = self.update(result, rate)
        if not math.isfinite(norm):
            self.save_and_wait()
            objective, writes = self.engine.objective, self.launch.is_main
            raise non_finite_error(self.run, step, batch, result, self.inputs, objective, norm, writes=writes)
        self.done, self.loss, self.examples = step + 1, result.loss, self.examples + len(batch.query)
        line = None
        if logged:
            contrasts = result.batch is not None and self.engine.objective.contrasts
            line = {
                "step": self.done,
                "epoch": epoch,
                "loss": self.loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "rows": len(batch.query),
                "tokens": tokens,
                "padded_tokens": padded,
                "seconds": round(time.monotonic() - began, 4),
                **(similarities(result.batch) if contrasts and result.batch is not None else {}),
                **result.figures,
                **figures,
                **used_memory(self.device),
            }
        made = StepMade(self.done, batch, result, norm, line)
        for part in self.parts:
            part.after_step(made)
        return made

    def gradient(self, batch: Batch, *, watch: bool) -> tuple[StepResult, int, int]:
        """Leave the gradient of a batch in the backend, with a smaller budget where memory runs out."""
        step = self.done
        while True:
            result = batch_gradient(
                self.engine,
                self.budget,
                batch,
                seed=self.seed,
                step=step,
                stop=self.stopped,
                watch=watch,
                progress=step / self.steps,
            )
            if not result[0].word.out_of_memory:
                return result
            self.budget = halve_budget(self.budget, step)

    def update(self, result: StepResult, rate: float) -> float:
        """Step the optimiser; the norm of the gradient, not finite where the loss or it is not: then nothing has changed."""
        if not math.isfinite(result.loss):
            return math.nan
        backend = self.engine.backend
        rates = [rate * group.get("factor", 1.0) for group in backend.optimizer.param_groups]
        with self.stops_for_memory(f"the update of step {self.done + 1}"):
            return backend.update(rates, self.config.max_gradient_norm, result.word.used)

    def pause(self) -> None:
        """Between two steps, and before the first: evaluation, mining, a checkpoint. A stop leaves them to the resumed run."""
        self.wanted = False
        try:
            for part in self.parts:
                part.pause(self.done)
        except InterruptedEvaluationError:
            self.leave()
        due = self.done % self.config.checkpoints.every_steps == 0 or self.done == self.steps
        if self.wanted or (due and self.done > self.first):
            self.save()

    def leave(self) -> NoReturn:
        """Stop here, with a checkpoint."""
        path = self.save_and_wait()
        raise StoppedError(
            f"stopped by {self.stop.received or 'another rank'} after step {self.done} of {self.steps}",
            where=str(path),
            hint="The same command goes on from this checkpoint.",
        )

    @property
    def exhausted(self) -> bool:
        """Whether evaluations without a gain end the training."""
        return self.evaluations is not None and self.evaluations.exhausted

    def stopped(self) -> bool:
        """Whether a signal asks this rank to stop."""
        return self.stop.received is not None

    def stops_for_memory(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Where memory runs out in what cannot be repeated, end the run so that it goes on with a smaller budget."""
        return stops_for_memory(doing, self.budget)

    def save(self) -> Path:
        """A checkpoint of the model, the optimiser, the trainer and its parts."""
        state: dict[str, Any] = {
            **self.identity,
            "world_size": self.launch.world_size,
            "backend": self.engine.backend.name,
            **self.budget.to_json(),
        }
        for part in self.parts:
            state |= part.state()
        state |= {"examples": self.examples, "seconds": self.seconds(), "loss": self.loss}
        self.writer.protected = set() if self.evaluations is None else self.evaluations.protected()
        backend, extra = self.engine.backend, itertools.chain(*(part.tensors() for part in self.parts))
        return self.writer.save(self.done, backend.model_tensors(), backend.optimizer_tensors(), state, extra)

    def save_and_wait(self) -> Path:
        """A checkpoint that is on the disk before any rank leaves: launchers end all ranks soon after the first."""
        # The checkpoint that the run came from, or just wrote, is this state already.
        path = self.writer.path(self.done) if self.done == self.writer.newest else self.save()
        self.writer.wait()
        any_rank(False, self.device)
        return path

    def seconds(self) -> float:
        """Seconds of all steps so far, without the parts' work between them."""
        if self._began is None:
            return self._seconds_before
        return self._seconds_before + time.monotonic() - self._began - sum(part.seconds for part in self.parts)

    def result(self, seconds: float) -> TrainingResult:
        """How the run went."""
        best, best_step = (
            (None, None) if self.evaluations is None else (self.evaluations.best, self.evaluations.kept_step)
        )
        return TrainingResult(
            self.done,
            self.first,
            self.examples,
            self.loss,
            seconds,
            str(self.device),
            pick_precision(self.config, self.device),
            self.engine.backend.name,
            self.launch.world_size,
            self.writer.path(self.done if best_step is None else best_step),
            stopped_early=self.exhausted and self.done < self.steps,
            best=best,
        )


class QueuedPositives(Part):
    """Positives of earlier steps, for objectives that ask for them."""

    def __init__(self, queue: MemoryQueue) -> None:
        self.queue = queue

    def after_step(self, made: StepMade) -> None:
        if made.result.batch is not None:
            self.queue.push(made.result.batch)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        return self.queue.tensors()

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.queue.load(tensors)


def halve_budget(budget: Budget, step: int) -> Budget:
    """The budget that the step is repeated with; :class:`BadInputError` where less is no use."""
    smaller = budget.halved()
    if smaller is None:
        raise BadInputError(
            f"memory ran out in step {step + 1} with {budget.micro_batch_tokens} tokens at a time, and less is no use",
            where="training.max_length",
            hint="Lower training.max_length, use gradient checkpointing, an adapter, or more devices with fsdp2 or zero3.",
        )
    logger.warning(
        "Memory ran out in step %d: %d tokens at a time from now on (was %d)",
        step + 1,
        smaller.micro_batch_tokens,
        budget.micro_batch_tokens,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return smaller


class ShrinkBudget:
    """Halves the budget in the last checkpoint, once, where memory ran out on a backend that cannot repeat the step."""

    def __init__(self, checkpoints: Path, writes: bool) -> None:
        self.checkpoints = checkpoints
        self.writes = writes

    def when_dead(self, exit_code: int) -> None:
        """Act if a rank left because memory ran out."""
        if exit_code == OutOfMemoryStopError.exit_code:
            self()

    def __call__(self) -> None:
        paths = checkpoint_paths(self.checkpoints)
        if not self.writes or not paths:
            return
        self.writes = False
        path = newest_checkpoint(self.checkpoints)
        assert path is not None
        smaller = Budget.from_json(path.state).halved()
        if smaller is not None:
            amend_state(path.path, smaller.to_json())
            logger.warning("The budget in %s is now %d tokens at a time", path.path.name, smaller.micro_batch_tokens)
