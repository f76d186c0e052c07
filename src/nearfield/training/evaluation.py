"""Scoring the model while it is trained: on all ranks, without a trace in the training, and resumable.

The caller brings the scoring: a function that is handed an ``encode`` and returns scores by name. Every rank calls it
and takes part in every ``encode``, so that all hold all embeddings and do the same with them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nearfield.arrays import Rows
from nearfield.encoders.packing import Features
from nearfield.encoders.tokenize import prompt_tokens, token_ids
from nearfield.errors import BadInputError
from nearfield.training.chunks import Shares, chunk_tokens, cut_chunks, deal_chunks, turns_of
from nearfield.training.engine import Engine
from nearfield.training.launch import any_rank, broadcast_json
from nearfield.training.step import Part, encode_chunk, gather_embeddings
from nearfield.training.tracking import Trackers

if TYPE_CHECKING:
    from nearfield.training.config import TrainingEvaluationConfig

logger = logging.getLogger("nearfield.training")

Embeddings = npt.NDArray[np.float32]
EncodeTexts = Callable[[Sequence[str], str], Embeddings]
"""(texts, prompt) -> (n, d) embeddings of the texts with the prompt before each; *collective*."""
Evaluate = Callable[[EncodeTexts], Mapping[str, float]]
"""Scores by name, of the model that an ``encode`` belongs to; *collective*, the same on every rank."""

_CHUNKS_AT_A_TIME = 32
"""Chunks of a rank between two looks at whether to stop."""


class InterruptedEvaluationError(BaseException):
    """A signal came during an evaluation. No ``Exception``: what scores a task must not take it for a task's failure."""


def encode_texts(
    engine: Engine, texts: Sequence[str], prompt: str, budget: int, stop: Callable[[], bool] = lambda: False
) -> Embeddings:
    """(n, d) embeddings of texts by the module that is trained, in its mode; the same on every rank; *collective*.

    Chunks of at most ``budget`` tokens are cut from all texts, longest first, and dealt to ranks by their tokens, as in a step.
    Raises :class:`InterruptedEvaluationError` on all ranks when ``stop`` is true on any.
    """
    tokens = token_ids(engine.encoder, texts, prompt)
    return _encode(engine, tokens, prompt_tokens(engine.encoder, prompt), budget, stop)


def encode_items(engine: Engine, prompt: int, items: Rows, budget: int, stop: Callable[[], bool]) -> Embeddings:
    """(n, d) embeddings of items of the token cache with the prompt of this number; else as :func:`encode_texts`."""
    table = engine.data.tokens.tables[prompt]
    tokens = [table.of(int(item)) for item in items]
    return _encode(engine, tokens, table.prompt_length, budget, stop, items)


def _encode(
    engine: Engine,
    tokens: Sequence[Any],
    prompt_length: int,
    budget: int,
    stop: Callable[[], bool],
    items: Rows | None = None,
) -> Embeddings:
    backend, launch = engine.backend, engine.launch

    def features(chunk: Rows) -> Features:
        rows = [tokens[i] for i in chunk]
        return (
            engine.features(rows, prompt_length)
            if items is None
            else engine.item_features(items[chunk], rows, prompt_length)
        )

    lengths = np.asarray([len(row) for row in tokens], dtype=np.int64)
    apart = np.zeros(len(tokens), dtype=np.int64) if items is None else engine.go_apart(tokens).astype(np.int64)
    chunks = cut_chunks(lengths, budget, padded=engine.padded, ranks=launch.world_size, kinds=apart)
    vectors = np.empty((len(tokens), engine.dimension), dtype=np.float32)
    for start in range(0, len(chunks), _CHUNKS_AT_A_TIME * launch.world_size):
        if any_rank(stop(), backend.device):
            raise InterruptedEvaluationError
        part = chunks[start : start + _CHUNKS_AT_A_TIME * launch.world_size]
        kinds = [int(apart[chunk[0]]) for chunk in part] if engine.level else None
        shares = deal_chunks([chunk_tokens(lengths, c, padded=engine.padded) for c in part], launch.world_size, kinds)
        # Where forwards are collective every rank runs as many; what the missing ones give is thrown away.
        turns = turns_of(shares, launch.rank, kinds, level=engine.level)
        mine = torch.zeros((0, engine.dimension), device=backend.device)
        with torch.no_grad():
            parts = [encode_chunk(backend, features(part[turn.chunk])) for turn in turns]
        if shares[launch.rank]:
            mine = torch.cat([part for turn, part in zip(turns, parts, strict=True) if turn.own])
        places = np.cumsum([0, *map(len, part)])
        rows = [np.concatenate([np.arange(0), *(np.arange(places[n], places[n + 1]) for n in s)]) for s in shares]
        everyone = gather_embeddings(mine.float(), Shares(rows, launch.rank))
        vectors[np.concatenate(part)] = everyone.cpu().numpy()
    return vectors


@contextlib.contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts a module into evaluation mode; afterwards its parts' modes and all random generators are as they were."""
    modes = [(part, part.training) for part in module.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass(frozen=True)
class EvaluationState:
    """State of a checkpoint, so that a resumed run evaluates, keeps and stops as an uninterrupted one."""

    evaluated: int = -1
    """The step of the last evaluation."""
    best_step: int | None = None
    best_score: float | None = None
    without_gain: int = 0
    """Evaluations in a row without a gain."""

    def after(self, step: int, score: float, minimum_gain: float) -> EvaluationState:
        """The state after a model of ``step`` steps scored ``score``; a score that is not finite is no gain."""
        before = self.best_score
        better = math.isfinite(score) and (before is None or score > before)
        gain = better and (before is None or score > before + minimum_gain)
        best = replace(self, best_step=step, best_score=score) if better else self
        return replace(best, evaluated=step, without_gain=0 if gain else self.without_gain + 1)


class Evaluations(Part):
    """Scoring during the training: when, what the scores have said so far, and which checkpoints they ask to keep."""

    def __init__(
        self,
        config: TrainingEvaluationConfig,
        evaluate: Evaluate | None,
        engine: Engine,
        epochs: Sequence[int],
        steps: int,
    ) -> None:
        """``epochs`` are the steps of each epoch."""
        if evaluate is None:
            raise BadInputError("training.evaluation is set, but nothing was handed in that evaluates")
        self.config, self.engine = config, engine
        self._evaluate = evaluate
        self.steps = steps
        every = config.every_epochs or 1
        self._ends = set(np.cumsum(epochs)[every - 1 :: every].tolist())
        self.standing = EvaluationState()
        # The checkpoints that may be resumed from each name a best one, which must then be there.
        self._bests: list[int | None] = [None]
        self._keep = engine.config.checkpoints.keep_last + 1

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.standing = EvaluationState(**state.get("evaluation", {}))
        self._bests = [self.standing.best_step]

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.config.patience is not None and self.standing.without_gain >= self.config.patience

    @property
    def best(self) -> tuple[int, float] | None:
        """The step and the score of the best evaluation."""
        step, score = self.standing.best_step, self.standing.best_score
        return None if step is None or score is None else (step, score)

    @property
    def kept_step(self) -> int | None:
        """The step whose checkpoint the model is to be made of; None for the last one."""
        return self.standing.best_step if self.config.keep_best else None

    def due(self, done: int) -> bool:
        """Whether the model is to be scored after ``done`` steps and was not yet."""
        config = self.config
        if done <= self.standing.evaluated:
            return False
        if done == 0:
            return config.at_start
        at_step = config.every_steps is not None and done % config.every_steps == 0
        at_epoch = config.every_epochs is not None and done in self._ends
        return at_step or at_epoch or done == self.steps

    def pause(self, done: int) -> None:
        """Score the model where that is due; a stop leaves it to the resumed run."""
        if self.due(done):
            trainer = self.trainer
            with trainer.stops_for_memory(f"the evaluation after step {done}"):
                budget = trainer.budget.micro_batch_tokens
                trainer.wanted |= self.run(done, budget, trainer.tracking, trainer.stopped)

    def run(self, done: int, budget: int, trackers: Trackers, stop: Callable[[], bool]) -> bool:
        """Score the model; whether a checkpoint of this step is wanted. *Collective*.

        Raises :class:`InterruptedEvaluationError` on all ranks when ``stop`` is true on any; nothing is told then.
        """
        began = time.monotonic()

        def encode(texts: Sequence[str], prompt: str) -> Embeddings:
            return encode_texts(self.engine, texts, prompt, budget, stop)

        with undisturbed(self.engine.backend.module, self.engine.backend.device):
            scores = dict(self._evaluate(encode))
        if self.config.metric not in scores:
            raise BadInputError(
                f"the evaluation gives no score {self.config.metric!r}",
                where="training.evaluation.metric",
                hint=f"Scores: {', '.join(scores)}.",
            )
        # All ranks must decide alike by a score, even if ranks on unlike machines differ in a last bit.
        scores = broadcast_json(scores, self.engine.backend.device)
        seconds = time.monotonic() - began
        self.seconds += seconds
        told = {name: score if math.isfinite(score) else None for name, score in scores.items()}
        trackers.evaluation({"step": done, "scores": told, "seconds": round(seconds, 3)})
        before, score = self.standing, scores[self.config.metric]
        if done == 0:
            # Where it began, to compare with: the run is to give a trained model.
            self.standing = replace(before, evaluated=0)
        else:
            self.standing = before.after(done, score, self.config.minimum_gain)
        best = self.standing.best_step == done
        if self.engine.launch.is_main:
            logger.info(
                "Evaluation after step %d: %s %.4f%s (%.1f s)",
                done,
                self.config.metric,
                score,
                ", the best so far" if best else "",
                seconds,
            )
        return self.exhausted or (best and self.config.keep_best)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint that is written now."""
        self._bests = [*self._bests, self.standing.best_step][-self._keep :]
        return {"evaluation": asdict(self.standing)}

    def protected(self) -> set[int]:
        """The steps whose checkpoints must stay."""
        if not self.config.keep_best:
            return set()
        return {step for step in self._bests if step is not None}
