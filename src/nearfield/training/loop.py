"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from nearfield.batching.plan import Batch, Plan, total_steps
from nearfield.batching.planner import Rows
from nearfield.data.tokens import TokenCache
from nearfield.errors import BadInputError, NonFiniteError, StoppedError
from nearfield.files import write_json
from nearfield.objectives.infonce import ContrastiveBatch, LossSum
from nearfield.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from nearfield.training.chunks import cut_chunks, padded_tokens, pool_batch
from nearfield.training.config import TrainingConfig
from nearfield.training.metrics import MetricsLog, TrainingProgress
from nearfield.training.optimizers import make_optimizer
from nearfield.training.schedule import rate_factor
from nearfield.training.step import Features, Padding, StepResult, chunk_features, run_step
from nearfield.training.stopping import StopRequest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.training")

DEFAULT_CHUNK_TOKENS = {"cpu": 512, "cuda": 16_384}

Objective = Callable[[ContrastiveBatch], LossSum]


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


@dataclass(frozen=True)
class TrainingResult:
    """How a run went."""

    steps: int
    resumed_from: int
    examples: int
    """Examples of the steps that this call ran."""
    last_loss: float | None
    seconds: float
    """Seconds of the steps that this call ran."""
    device: str
    precision: str


def train(
    config: TrainingConfig,
    objective: Objective,
    model: SentenceTransformer,
    inputs: TrainingInputs,
    run: Path,
    *,
    seed: int,
    fingerprint: str,
) -> TrainingResult:
    """Train ``model`` in place on the plans, from the newest checkpoint in ``run/checkpoints`` if there is one.

    The steps, and on a CPU every bit of the weights, are those of a run that was never interrupted.

    Raises :class:`StoppedError` after a checkpoint when a signal asks to stop, and :class:`NonFiniteError` after a
    checkpoint of the last good state when a loss or gradient is not finite.
    """
    steps = total_steps(inputs.plans, config.max_steps)
    if steps == 0:
        raise BadInputError(
            "the plan has no steps", where=str(run / "plan"), hint="Is batch_size larger than the data?"
        )
    accelerator = _accelerator(config)
    try:
        with torch.random.fork_rng(), StopRequest() as stop:
            return _train(config, objective, model, inputs, run, seed, fingerprint, steps, accelerator, stop)
    finally:
        # Accelerate keeps its state for the whole process, so a second run with another precision would be refused.
        AcceleratorState._reset_state(reset_partial_state=True)


def _train(
    config: TrainingConfig,
    objective: Objective,
    model: SentenceTransformer,
    inputs: TrainingInputs,
    run: Path,
    seed: int,
    fingerprint: str,
    steps: int,
    accelerator: Accelerator,
    stop: StopRequest,
) -> TrainingResult:
    device = accelerator.device
    model.to(device)
    model.train(config.dropout)
    optimizer = make_optimizer(model.named_parameters(), config, device)
    checkpoints = run / "checkpoints"
    identity = {"fingerprint": fingerprint, "plans": list(inputs.plan_hashes), "seed": seed}
    checkpoint = newest_checkpoint(checkpoints, lambda found: _check_identity(found, identity))
    first = checkpoint.step if checkpoint else 0
    budget = config.chunk_tokens or DEFAULT_CHUNK_TOKENS[device.type]
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer)
        budget = int(checkpoint.state["chunk_tokens"])
        logger.info("Resuming from step %d of %d (%s)", first, steps, checkpoint.path.name)
    forward: Callable[[Features], dict[str, Tensor]] = accelerator.prepare(model)

    def encode(features: Features) -> Tensor:
        with accelerator.autocast():
            # sentence-transformers writes its results into the features; a second encoding needs them clean.
            return forward(dict(features))["sentence_embedding"]

    def save(step: int) -> Path:
        state = {**identity, "chunk_tokens": budget}
        return save_checkpoint(checkpoints, step, model, optimizer, state, config.checkpoints.keep_last)

    tokenizer = model.tokenizer
    padding = Padding(tokenizer.pad_token_id or 0, tokenizer.padding_side, device)
    by_prompt = leaves_prompt_out(model)
    examples, loss_value, start = 0, None, time.monotonic()
    log = MetricsLog(run, first, config.tensorboard)
    try:
        with TrainingProgress(first, steps) as progress:
            for step in range(first, steps):
                began = time.monotonic()
                epoch, batch = batch_of_step(inputs.plans, step)
                pool = pool_batch(batch)
                lengths = _pool_lengths(inputs.tokens, pool.items, pool.prompts)
                chunks = cut_chunks(lengths, budget, pool.prompts if by_prompt else None)
                padded = padded_tokens(lengths, chunks)
                rate = config.learning_rate * rate_factor(config.schedule, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                optimizer.zero_grad(set_to_none=True)
                result = run_step(
                    encode,
                    objective,
                    accelerator.backward,
                    pool,
                    [chunk_features(pool, chunk, inputs.tokens, padding) for chunk in chunks],
                    chunks,
                    [inputs.known_positives(int(query)) for query in batch.query],
                    seed=seed,
                    step=step,
                    keep_graph=config.gradient_cache == "never"
                    or (config.gradient_cache == "auto" and padded <= config.graph_tokens),
                )
                loss_value = float(result.loss.total.detach()) / result.loss.denominator
                norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm or float("inf")))
                if not (np.isfinite(loss_value) and np.isfinite(norm)):
                    save(step)
                    _stop_non_finite(run, step, batch, result, inputs, loss_value, norm)
                optimizer.step()
                done = step + 1
                examples += len(batch.query)
                if done % config.log_every == 0 or done == steps:
                    similarities = watch(result, pool.owner, pool.is_positive)
                    log.write(
                        {
                            "step": done,
                            "epoch": epoch,
                            "loss": loss_value,
                            "learning_rate": rate,
                            "gradient_norm": norm,
                            "rows": len(batch.query),
                            "tokens": int(lengths.sum()),
                            "padded_tokens": padded,
                            "seconds": round(time.monotonic() - began, 4),
                            **similarities,
                        }
                    )
                progress.update(done, loss_value, len(batch.query))
                if stop.received and done < steps:
                    path = save(done)
                    raise StoppedError(
                        f"stopped by {stop.received} after step {done} of {steps}",
                        where=str(path),
                        hint="The same command goes on from this checkpoint.",
                    )
                if done % config.checkpoints.every_steps == 0 or done == steps:
                    save(done)
    finally:
        log.close()
    model.eval()
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    return TrainingResult(steps, first, examples, loss_value, time.monotonic() - start, str(device), precision)


def _accelerator(config: TrainingConfig) -> Accelerator:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadInputError("training.device is cuda, but no CUDA device is here", hint="Use training.device=auto.")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    native_bf16 = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if bf16 else "no")
    if accelerator.num_processes > 1:
        raise BadInputError(
            f"training runs in one process, and the launcher started {accelerator.num_processes}",
            hint="Start it with `nearfield train RECIPE`.",
        )
    return accelerator


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


def _pool_lengths(tokens: TokenCache, items: Rows, prompts: Rows) -> Rows:
    lengths = np.zeros(len(items), dtype=np.int64)
    for prompt in np.unique(prompts):
        mine = prompts == prompt
        lengths[mine] = tokens.tables[int(prompt)].lengths(items[mine])
    return lengths


def leaves_prompt_out(model: nn.Module) -> bool:
    """Whether a pooling of the model skips the prompt's tokens, so that a chunk must have one prompt."""
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())


def watch(result: StepResult, owner: Rows, is_positive: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, float]:
    """Mean cosine of queries with their positives, and with the hardest other document of the batch."""
    queries = nn.functional.normalize(result.queries, dim=-1)
    documents = nn.functional.normalize(result.documents, dim=-1)
    similarity = (queries @ documents.T).cpu().numpy()
    own = owner[None, :] == np.arange(len(queries))[:, None]
    positive = own & is_positive[None, :]
    return {
        "positive_similarity": float(similarity[positive].mean()),
        "hardest_negative_similarity": float(np.where(positive, -1.0, similarity).max(axis=1).mean()),
    }


def _stop_non_finite(
    run: Path, step: int, batch: Batch, result: StepResult, inputs: TrainingInputs, loss: float, norm: float
) -> None:
    """Name the examples and stop; those whose own loss is not finite if there are some, else the whole batch."""
    bad = np.flatnonzero(~torch.isfinite(result.loss.rows).cpu().numpy())
    slots = bad if len(bad) else np.arange(len(batch.query))
    ids = inputs.item_ids(batch.query[slots])
    report = {
        "step": step + 1,
        "loss": str(loss),
        "gradient_norm": str(norm),
        "examples": batch.example[slots].tolist(),
        "queries": ids,
    }
    write_json(run / "non_finite.json", report)
    what = "the loss" if not np.isfinite(loss) else "the gradient"
    shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    raise NonFiniteError(
        f"{what} of step {step + 1} is not finite; queries {shown}",
        where=str(run / "non_finite.json"),
        hint=f"The state before that step is in checkpoints/step-{step:08d}. Lower the learning rate, or look at these examples.",
    )
