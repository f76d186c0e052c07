"""What the training loop follows and feeds on.

What happens when memory runs out: a smaller budget, in place or in the last checkpoint.

The gradient of a planned batch.

The training loop, to be read from top to bottom. Every rank runs it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nearfield.arrays import Rows
from nearfield.batching.plan import Batch, Plan, total_steps
from nearfield.errors import BadInputError, OutOfMemoryStopError, StoppedError
from nearfield.notices import Notice
from nearfield.objectives.objective import Objective
from nearfield.objectives.watching import similarities
from nearfield.training.changing_negatives import NegativeInputs, open_negatives
from nearfield.training.checkpoint import CheckpointWriter, amend_state, checkpoint_paths, newest_checkpoint, resume
from nearfield.training.chunks import CUT_RULE, Feed, split_batch
from nearfield.training.config import TrainingConfig
from nearfield.training.diagnostics import ChanceWatch, GradientWatch, ZeroVectors, non_finite_error
from nearfield.training.engine import Engine, build_engine, pick_device, pick_precision
from nearfield.training.evaluating import Evaluate, Evaluations, InterruptedEvaluationError
from nearfield.training.exchange import any_rank, broadcast_notices
from nearfield.training.forecast import begin_forecast, end_forecast
from nearfield.training.forecast_notices import notices_of_start
from nearfield.training.launch import Launch, RankDiedError, StopRequest
from nearfield.training.memory import Budget, keeps_graph
from nearfield.training.optimizers import optimizer_of, rate_factor
from nearfield.training.step import StepResult, is_out_of_memory, mean_result, run_step
from nearfield.training.tracking import Trackers, TrainingProgress, used_memory

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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


logger = logging.getLogger("nearfield.training")


@contextlib.contextmanager
def stops_for_memory(doing: str, budget: Budget) -> Iterator[None]:
    """Where memory runs out in what cannot be repeated, end the run so that it goes on with a smaller budget.

    Ranks may wait in a collective that this one will never join, or parameters may be half updated: only the last
    checkpoint is sound.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryStopError(
            f"memory ran out in {doing} with {budget.micro_batch_tokens} tokens at a time",
            hint="`nearfield train --resume` with the same launcher goes on from the last checkpoint with half as many.",
        ) from error


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


def batch_gradient(
    engine: Engine,
    config: TrainingConfig,
    budget: Budget,
    batch: Batch,
    inputs: TrainingInputs,
    *,
    seed: int,
    step: int,
    stop: StopRequest,
    watch: bool = False,
    progress: float = 0.0,
) -> tuple[StepResult, int, int]:
    """Leave the gradient of a planned batch in the backend; the tokens of the batch, real and as encoded.

    With ``watch`` this process looks at how the learning goes: of the last part, where there are several.
    """
    engine.backend.begin()
    parts = split_batch(batch, config.averaged_batches)
    results: list[StepResult] = []
    chunks = tokens = encoded = 0
    for number, part in enumerate(parts):
        work, lengths = engine.work(part, inputs.known_positives, budget.cut, first_number=chunks)
        chunks, tokens, encoded = chunks + len(work.chunks), tokens + int(lengths.sum()), encoded + sum(work.tokens)
        # Where chunks hold no collectives the step itself says that memory ran out, and is repeated.
        in_place = engine.retries_in_place
        with contextlib.nullcontext() if in_place else stops_for_memory(f"step {step + 1}", budget):
            result = run_step(
                engine.backend,
                engine.objective,
                work,
                engine.make_features(work.pool, seed, step),
                dimension=engine.columns,
                seed=seed,
                step=step,
                keep_graph=keeps_graph(config, budget, work, engine.backend),
                weight=1 / len(parts),
                final=number == len(parts) - 1,
                stop=lambda: stop.received is not None,
                catch_out_of_memory=in_place,
                progress=progress,
                watch=watch and number == len(parts) - 1,
            )
        results.append(replace(result, first_query=sum(len(before.query) for before in parts[:number])))
        if result.word.out_of_memory:
            break
    return mean_result(results), tokens, encoded


logger = logging.getLogger("nearfield.training")


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
    steps = total_steps(inputs.plans, config.max_steps)
    if steps == 0:
        raise BadInputError(
            "the plan has no steps", where=str(run / "plan"), hint="Is batch_size larger than the data?"
        )
    device = pick_device(config, launch)
    shrink = ShrinkBudget(run / "checkpoints", writes=launch.is_main)
    with StopRequest(launched=launch.world_size > 1) as stop, torch.random.fork_rng():
        try:
            with launch.process_group(device, config.collective_timeout, on_dead=shrink.when_dead):
                return _train(config, objective, model, inputs, run, seed, fingerprint, steps, device, launch, stop)
        except OutOfMemoryStopError:
            shrink()
            raise
        except RankDiedError as error:
            shrink.when_dead(error.exit_code)
            raise


def _train(
    config: TrainingConfig,
    objective: Objective,
    model: SentenceTransformer,
    inputs: TrainingInputs,
    run: Path,
    seed: int,
    fingerprint: str,
    steps: int,
    device: torch.device,
    launch: Launch,
    stop: StopRequest,
) -> TrainingResult:
    checkpoints = run / "checkpoints"
    identity = {
        "fingerprint": fingerprint,
        "plans": list(inputs.plan_hashes),
        "seed": seed,
        "cut_rule": CUT_RULE,
    }
    engine = build_engine(config, model, objective, optimizer_of(config, device), inputs.feed, device, launch)
    backend = engine.backend
    saved, extra = resume(engine, checkpoints, identity, steps)
    first = int(saved["step"]) if saved is not None else 0
    kept = None if saved is None else Budget.from_json(saved)
    budget, outlook = begin_forecast(
        config, engine, inputs.plans, inputs.known_positives, run, fingerprint=fingerprint, budget=kept
    )
    if outlook.at_start is not None:
        inputs.tell(broadcast_notices(partial(notices_of_start, outlook.at_start, config, run), device))
    evaluations = Evaluations(
        config.evaluation,
        inputs.evaluate,
        engine,
        epochs=[len(plan) for plan in inputs.plans],
        steps=steps,
        keep_last=config.checkpoints.keep_last,
        saved=saved,
    )
    negatives = open_negatives(
        inputs.negatives,
        inputs.known_positives,
        run,
        seed=seed,
        steps=steps,
        epochs=[len(plan) for plan in inputs.plans],
        averaged_batches=config.averaged_batches,
        device=device,
        writes=launch.is_main,
    )
    if engine.ring and negatives.looks_at_batches:
        raise BadInputError(
            "dynamic negatives look at the embeddings of whole batches, which a ring never brings together",
            where="training.exchange",
            hint="Use training.exchange=gather.",
        )
    if saved is not None:
        negatives.load(saved, extra)
    if saved is not None and engine.queue is not None:
        engine.queue.load(extra)
    writer = CheckpointWriter(
        checkpoints, config.checkpoints.keep_last, background=config.checkpoints.background, writes=launch.is_main
    )
    writer.newest = None if saved is None else first

    def told() -> dict[str, Any]:
        """The figures of the run so far."""
        seconds = before["seconds"]
        if start is not None:
            seconds += time.monotonic() - start - evaluations.seconds - negatives.seconds
        return {"examples": examples, "seconds": seconds, "loss": loss_value}

    def save(step: int) -> Path:
        state = {**identity, "world_size": launch.world_size, "backend": backend.name, **budget.to_json()}
        state |= {**evaluations.saved(), **negatives.saved(), **told()}
        writer.protected = evaluations.protected()
        queued = () if engine.queue is None else engine.queue.tensors()
        extra = itertools.chain(negatives.tensors(), queued)
        return writer.save(step, backend.model_tensors(), backend.optimizer_tensors(), state, extra)

    def save_and_wait(step: int) -> Path:
        """A checkpoint that is on the disk before any rank leaves: launchers end all ranks soon after the first."""
        # The checkpoint that the run came from, or just wrote, is this state already.
        path = writer.path(step) if step == writer.newest else save(step)
        writer.wait()
        any_rank(False, device, launch.world_size)
        return path

    def leave(done: int) -> NoReturn:
        path = save_and_wait(done)
        raise StoppedError(
            f"stopped by {stop.received or 'another rank'} after step {done} of {steps}",
            where=str(path),
            hint="The same command goes on from this checkpoint.",
        )

    def evaluate(done: int) -> bool:
        """Whether a checkpoint of this step is wanted; a stop leaves the evaluation to the resumed run."""
        try:
            with stops_for_memory(f"the evaluation after step {done}", budget):
                return evaluations.run(done, budget.micro_batch_tokens, trackers, lambda: stop.received is not None)
        except InterruptedEvaluationError:
            leave(done)

    def refresh(done: int) -> None:
        """Mine negatives anew where it is time; a stop leaves it to the resumed run."""
        if negatives.due(done):
            try:
                with stops_for_memory(f"mining after step {done}", budget):
                    negatives.refresh(engine, done, budget.micro_batch_tokens, lambda: stop.received is not None)
            except InterruptedEvaluationError:
                leave(done)

    before = {"examples": 0, "seconds": 0.0, "loss": None} | {
        key: saved[key] for key in ("examples", "seconds", "loss") if saved is not None and key in saved
    }
    examples, loss_value, start = int(before["examples"]), before["loss"], None
    if not engine.retries_in_place and not checkpoint_paths(checkpoints):
        # Memory that runs out ends the ranks: the smaller budget needs a checkpoint to live in.
        save(first)
    factors = [group.get("factor", 1.0) for group in backend.optimizer.param_groups]
    start = time.monotonic()
    trackers = Trackers(
        config.trackers,
        run,
        first,
        evaluated=evaluations.state.evaluated,
        about=inputs.about,
        writes=launch.is_main,
    )
    done, zeros = first, ZeroVectors(device, inputs.tell)
    gradients, chance = GradientWatch(first, steps), ChanceWatch(steps)
    with writer, trackers, TrainingProgress(first, steps) as progress:
        if evaluations.due(first) and evaluate(first):
            save(first)
        refresh(first)
        for step in range(first, steps):
            if evaluations.exhausted:
                break
            began = time.monotonic()
            epoch, planned = batch_of_step(inputs.plans, step)
            batch, figures = negatives.batch(planned, step)
            rate = config.learning_rate * rate_factor(config.schedule, step, steps)
            logged, watched = config.logs(step + 1, steps)
            while True:
                result, tokens, padded = batch_gradient(
                    engine,
                    config,
                    budget,
                    batch,
                    inputs,
                    seed=seed,
                    step=step,
                    stop=stop,
                    watch=watched and launch.is_main,
                    progress=step / steps,
                )
                if not result.word.out_of_memory:
                    break
                budget = halve_budget(budget, step)
            norm = math.nan
            if math.isfinite(result.loss):
                with stops_for_memory(f"the update of step {step + 1}", budget):
                    norm = backend.update([rate * f for f in factors], config.max_gradient_norm, result.word.used)
            if not math.isfinite(norm):
                save_and_wait(step)
                raise non_finite_error(run, step, batch, result, inputs, objective, norm, writes=launch.is_main)
            gradients.see(norm)
            if chance.wants(step):
                chance.see(engine, result)
            negatives.observe(batch, step, result)
            if engine.queue is not None and result.batch is not None:
                engine.queue.push(result.batch)
            loss_value = result.loss
            done = step + 1
            zeros.look(result.batch)
            examples += len(batch.query)
            if logged:
                zeros.say(done)
                trackers.step(
                    {
                        "step": done,
                        "epoch": epoch,
                        "loss": loss_value,
                        "learning_rate": rate,
                        "gradient_norm": norm,
                        "rows": len(batch.query),
                        "tokens": tokens,
                        "padded_tokens": padded,
                        "seconds": round(time.monotonic() - began, 4),
                        **(similarities(result.batch) if result.batch is not None and objective.contrasts else {}),
                        **result.figures,
                        **figures,
                        **used_memory(device),
                    }
                )
            progress.update(done, loss_value, len(batch.query))
            if result.word.stop and done < steps:
                leave(done)
            wanted = evaluations.due(done) and evaluate(done)
            refresh(done)
            if wanted or done % config.checkpoints.every_steps == 0 or done == steps:
                save(done)
            writer.check()
        seconds = told()["seconds"]
        writer.wait()
    inputs.tell(broadcast_notices(chance.notices, device))
    end_forecast(outlook, engine, run, first=first, steps=done, seconds=seconds - before["seconds"])
    best = evaluations.state
    return TrainingResult(
        done,
        first,
        examples,
        loss_value,
        seconds,
        str(device),
        pick_precision(config, device),
        backend.name,
        launch.world_size,
        checkpoints / f"step-{done if evaluations.kept_step is None else evaluations.kept_step:08d}",
        stopped_early=evaluations.exhausted and done < steps,
        best=None if best.best_step is None or best.best_score is None else (best.best_step, best.best_score),
    )
