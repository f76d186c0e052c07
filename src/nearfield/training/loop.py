"""The training loop, to be read from top to bottom. Every rank runs it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from nearfield.batching.plan import Batch, Plan, total_steps
from nearfield.batching.planner import Rows
from nearfield.data.tokens import TokenCache
from nearfield.errors import BadInputError, NonFiniteError, OutOfMemoryStopError, StoppedError
from nearfield.files import write_json
from nearfield.objectives.infonce import ContrastiveBatch
from nearfield.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    amend_state,
    checkpoint_paths,
    newest_checkpoint,
    read_tensors,
)
from nearfield.training.chunks import split_batch
from nearfield.training.communication import any_rank, broadcast_json
from nearfield.training.config import TrainingConfig
from nearfield.training.engine import Engine, build_engine, pick_device, pick_precision
from nearfield.training.evaluating import Evaluate, Evaluations, InterruptedEvaluationError
from nearfield.training.forecast import begin_forecast, end_forecast
from nearfield.training.launch import Launch, RankDiedError
from nearfield.training.memory import Budget, keeps_graph
from nearfield.training.metrics import TrainingProgress, used_memory
from nearfield.training.optimizers import make_optimizer
from nearfield.training.schedule import rate_factor
from nearfield.training.step import StepResult, is_out_of_memory, mean_result, run_step
from nearfield.training.stopping import StopRequest
from nearfield.training.trackers import Trackers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.training")

_WATCHED_QUERIES = 512


@dataclass(frozen=True)
class TrainingInputs:
    """What the loop follows and feeds on."""

    plans: Sequence[Plan]
    """One an epoch."""
    plan_hashes: Sequence[str]
    tokens: TokenCache
    known_positives: Callable[[int], Rows]
    """Query item row -> its known positive item rows."""
    item_ids: Callable[[Rows], list[str]]
    """Item rows -> their ids in hex, for messages."""
    evaluate: Evaluate | None = None
    """What scores the model during the training, where the configuration asks for it."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What trackers show beside the figures: the run's name and settings."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run went."""

    steps: int
    """Steps done."""
    resumed_from: int
    examples: int
    """Examples of the steps that this call ran."""
    last_loss: float | None
    seconds: float
    """Seconds of the steps that this call ran."""
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
    objective: nn.Module,
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
    shrink = _ShrinkBudget(run / "checkpoints", writes=launch.is_main)
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
    objective: nn.Module,
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
    identity = {"fingerprint": fingerprint, "plans": list(inputs.plan_hashes), "seed": seed}

    def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
        return make_optimizer(parameters, config, device, no_decay=lambda name: name.startswith("objective."))

    engine = build_engine(config, model, objective, optimizer_of, inputs.tokens, device, launch)
    backend = engine.backend
    saved = _resume(engine, checkpoints, identity, steps)
    first = int(saved["step"]) if saved is not None else 0
    kept = None if saved is None else Budget.from_json(saved)
    budget, outlook = begin_forecast(
        config, engine, inputs.plans, inputs.known_positives, run, fingerprint=fingerprint, budget=kept
    )
    evaluations = Evaluations(
        config.evaluation,
        inputs.evaluate,
        engine,
        epochs=[len(plan) for plan in inputs.plans],
        steps=steps,
        keep_last=config.checkpoints.keep_last,
        saved=saved,
    )
    writer = CheckpointWriter(
        checkpoints, config.checkpoints.keep_last, background=config.checkpoints.background, writes=launch.is_main
    )

    def save(step: int) -> Path:
        state = {**identity, "world_size": launch.world_size, "backend": backend.name, **budget.to_json()}
        state |= evaluations.saved()
        writer.protected = evaluations.protected()
        return writer.save(step, backend.model_tensors(), backend.optimizer_tensors(), state)

    def save_and_wait(step: int) -> Path:
        """A checkpoint that is on the disk before any rank leaves: launchers end all ranks soon after the first."""
        path = save(step)
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
            return evaluations.run(done, budget.micro_batch_tokens, trackers, lambda: stop.received is not None)
        except InterruptedEvaluationError:
            leave(done)

    if not backend.retries_in_place and not checkpoint_paths(checkpoints):
        # Memory that runs out ends the ranks: the smaller budget needs a checkpoint to live in.
        save(first)
    factors = [group.get("factor", 1.0) for group in backend.optimizer.param_groups]
    examples, loss_value, start = 0, None, time.monotonic()
    trackers = Trackers(
        config.trackers,
        run,
        first,
        evaluated=evaluations.state.evaluated,
        about=inputs.about,
        writes=launch.is_main,
    )
    done = first
    with writer, trackers, TrainingProgress(first, steps) as progress:
        if evaluations.due(first) and evaluate(first):
            save(first)
        for step in range(first, steps):
            if evaluations.exhausted:
                break
            began = time.monotonic()
            epoch, batch = batch_of_step(inputs.plans, step)
            rate = config.learning_rate * rate_factor(config.schedule, step, steps)
            while True:
                result, tokens, padded = batch_gradient(
                    engine, config, budget, batch, inputs, seed=seed, step=step, stop=stop
                )
                if not result.word.out_of_memory:
                    break
                budget = _halve(budget, step)
            norm = math.nan
            if math.isfinite(result.loss):
                norm = backend.update([rate * f for f in factors], config.max_gradient_norm, result.word.used)
            if not math.isfinite(norm):
                save_and_wait(step)
                raise _non_finite(run, step, batch, result, inputs, objective, norm, writes=launch.is_main)
            loss_value = result.loss
            done = step + 1
            examples += len(batch.query)
            if done % config.log_every == 0 or done == steps:
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
                        **watch(result.batch),
                        **used_memory(device),
                    }
                )
            progress.update(done, loss_value, len(batch.query))
            if result.word.stop and done < steps:
                leave(done)
            wanted = evaluations.due(done) and evaluate(done)
            if wanted or done % config.checkpoints.every_steps == 0 or done == steps:
                save(done)
            writer.check()
        seconds = time.monotonic() - start - evaluations.seconds
        writer.wait()
    end_forecast(outlook, engine, run, first=first, steps=done, seconds=seconds)
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
) -> tuple[StepResult, int, int]:
    """Leave the gradient of a planned batch in the backend; the tokens of the batch, real and as encoded."""
    engine.backend.begin()
    parts = split_batch(batch, config.averaged_batches)
    results: list[StepResult] = []
    chunks = tokens = encoded = 0
    for number, part in enumerate(parts):
        work, lengths = engine.work(part, inputs.known_positives, budget.micro_batch_tokens, first_number=chunks)
        chunks, tokens, encoded = chunks + len(work.chunks), tokens + int(lengths.sum()), encoded + sum(work.tokens)
        try:
            result = run_step(
                engine.backend,
                engine.objective,
                work,
                engine.make_features(work.pool),
                dimension=engine.dimension,
                seed=seed,
                step=step,
                keep_graph=keeps_graph(config, budget, work),
                weight=1 / len(parts),
                final=number == len(parts) - 1,
                stop=lambda: stop.received is not None,
                catch_out_of_memory=engine.backend.retries_in_place,
            )
        except Exception as error:
            # Where chunks hold collectives, the other ranks wait in one that this rank will never join.
            if engine.backend.retries_in_place or not is_out_of_memory(error):
                raise
            raise OutOfMemoryStopError(
                f"memory ran out in step {step + 1} with {budget.micro_batch_tokens} tokens at a time",
                hint="`nearfield train --resume` with the same launcher goes on with half as many.",
            ) from error
        results.append(replace(result, first_query=sum(len(before.query) for before in parts[:number])))
        if result.word.out_of_memory:
            break
    return mean_result(results), tokens, encoded


def _halve(budget: Budget, step: int) -> Budget:
    smaller = budget.halved()
    if smaller is None:
        raise BadInputError(
            f"memory ran out in step {step + 1} with {budget.micro_batch_tokens} tokens at a time, and less is no use",
            where="encoder.max_length",
            hint="Lower encoder.max_length, use gradient checkpointing, an adapter, or more devices with fsdp2 or zero3.",
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


class _ShrinkBudget:
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


def _resume(engine: Engine, checkpoints: Path, identity: dict[str, Any], steps: int) -> dict[str, Any] | None:
    """Put the newest checkpoint into the engine and return its state; rank 0 reads, the others receive."""
    launch, device = engine.launch, engine.backend.device
    checkpoint: Checkpoint | None = None
    if launch.is_main:
        checkpoint = newest_checkpoint(checkpoints, lambda found: _check_identity(found, identity))
    state: dict[str, Any] | None = broadcast_json(None if checkpoint is None else checkpoint.state, device)
    if state is None:
        return None
    tensors = read_tensors(checkpoint) if checkpoint is not None else (None, None)
    try:
        engine.backend.load(*tensors)
    except (RuntimeError, KeyError) as error:
        where = str(checkpoint.path) if checkpoint is not None else str(checkpoints)
        reason = str(error).strip().splitlines()[0]
        raise BadInputError(f"this checkpoint does not fit the model: {reason}", where=where) from error
    if launch.is_main:
        logger.info("Resuming from step %d of %d", state["step"], steps)
        if state.get("world_size") != launch.world_size:
            logger.info(
                "The checkpoint was written by %s ranks, now there are %d: the batches and dropout masks are the same",
                state.get("world_size"),
                launch.world_size,
            )
    return state


def _check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    for key, value in identity.items():
        if checkpoint.state.get(key) != value:
            raise BadInputError(f"it belongs to another run (its {key} differs)", where=str(checkpoint.path))


def batch_of_step(plans: Sequence[Plan], step: int) -> tuple[int, Batch]:
    """The epoch and the batch of a step of the whole run."""
    for epoch, plan in enumerate(plans):
        if step < len(plan):
            return epoch, plan.batch(step)
        step -= len(plan)
    raise IndexError("the plans have fewer steps")


def watch(batch: ContrastiveBatch | None) -> dict[str, float]:
    """Mean cosine of queries with their positives, and with the hardest other document; of at most 512 queries."""
    assert batch is not None
    rows = torch.linspace(0, len(batch.queries) - 1, min(_WATCHED_QUERIES, len(batch.queries))).round().long()
    rows = rows.to(batch.queries.device)
    queries = nn.functional.normalize(batch.queries[rows], dim=-1)
    documents = nn.functional.normalize(batch.documents, dim=-1)
    similarity = queries @ documents.T
    positive = (batch.owner[None, :] == rows[:, None]) & batch.is_positive[None, :]
    hardest: Tensor = similarity.masked_fill(positive, -1.0).max(dim=1).values
    return {
        "positive_similarity": float(similarity[positive].mean()),
        "hardest_negative_similarity": float(hardest.mean()),
    }


def _non_finite(
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
