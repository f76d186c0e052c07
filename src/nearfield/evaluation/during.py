"""Scores of a model while it is trained: mteb's own tasks over an ``encode`` that is handed in, nothing written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.results import TaskResult
from numpy.typing import NDArray

from nearfield.encoders.encode import Bools, Encoder
from nearfield.errors import BadInputError, Said, listening, say
from nearfield.evaluation.config import OpenStore, SuiteConfig, open_suite
from nearfield.evaluation.encoder import TaskEncoder, TrainedPrompts, prompt_notices
from nearfield.evaluation.scoring import mean_over_splits, score_task, scores_by_split
from nearfield.evaluation.tasks import parts_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.arrays import Rows

logger = logging.getLogger("nearfield.evaluation")

MEAN = "mean"
EncodePrompted = Callable[[Sequence[str], str], NDArray[np.float32]]
"""(texts, prompt) -> (n, d) embeddings of the texts with the prompt before each."""


class HandedEncoder(Encoder):
    """Encodes by a function: the model's own weights may lie anywhere."""

    encode_texts: EncodePrompted | None = None

    def by_chunks(
        self,
        texts: Sequence[str],
        prompt: str = "",
        role: str | None = None,
        *,
        says: str | None = None,
        done: Bools | None = None,
    ) -> Iterator[tuple[Rows, NDArray[np.float32]]]:
        """All texts in one chunk; the function cuts them as it needs."""
        assert self.encode_texts is not None
        if texts:
            yield np.arange(len(texts)), self.encode_texts(texts, prompt)


class DuringTraining:
    """A suite, opened and checked once, that scores a model as often as wanted.

    A call returns the mean of the tasks' main scores under ``mean``, each task's main score under its name, and the
    ``metric`` if that is another one, as ``<task>.<metric>``. Where a task has several subsets or splits, their mean.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        suite: SuiteConfig | Path,
        *,
        name: str,
        metric: str,
        contract: TrainedPrompts | None,
        open_store: OpenStore | None = None,
    ) -> None:
        """``model`` has the prompts that it will be saved with; ``contract`` says which are trained (None: all pass).

        Raises :class:`BadInputError` for a suite that cannot be run on it, and for a metric that no task has.
        """
        self.tasks = open_suite(suite, open_store=open_store)
        self.handed = HandedEncoder(model)
        self.encoder = TaskEncoder(model, name=name, revision="in-training", encoder=self.handed)
        parts = [part for task in self.tasks for part in parts_of(task.task)]
        for part in parts:
            if "text" not in part.metadata.modalities or len(part.metadata.modalities) > 1:
                raise BadInputError(
                    f"the task {part.metadata.name} is not one of text alone",
                    where="training.evaluation.suite",
                    hint="Score it after the training, under 'evaluation'.",
                )
        hint = "State the prompt under prompts.types, or set training.evaluation.prompts=as-is."
        prompt_notices(self.encoder, contract, parts, where="training.evaluation.suite", hint=hint)
        self.extra = self._find(metric)
        self.said = Said()
        """The notices of the scores so far: logged once, however often the model is scored."""

    def _find(self, metric: str) -> tuple[str, str] | None:
        """The task and its metric, if it is not the main score that decides."""
        names = [task.name for task in self.tasks]
        if metric == MEAN or metric in names:
            return None
        for name in names:
            if metric.startswith(f"{name}."):
                return name, metric.removeprefix(f"{name}.")
        raise BadInputError(
            f"no task of the suite gives the metric {metric!r}",
            where="training.evaluation.metric",
            hint=f"Use 'mean', or one of {', '.join(names)}, or <task>.<metric>.",
        )

    def __call__(self, encode: EncodePrompted) -> dict[str, float]:
        self.handed.encode_texts = encode
        scores, extras = {}, {}
        try:
            for task in self.tasks:
                with listening(self.said), self.said.about(task.name):
                    result = self._score(task.task)
                main = _means(result, "main_score")
                assert main is not None
                scores[task.name] = main
                if self.extra is not None and self.extra[0] == task.name:
                    extras[".".join(self.extra)] = self._extra(result, self.extra[1])
        finally:
            self.handed.encode_texts = None
        return {MEAN: sum(scores.values()) / len(scores), **scores, **extras}

    def _score(self, task: Any) -> TaskResult:
        if isinstance(task, AbsTaskAggregate):
            return task.combine_task_results([self._score(part) for part in task.metadata.tasks])
        try:
            result = score_task(self.encoder, task)
            for notice in self.encoder.zeros.notices():
                say(notice)
        finally:
            self.encoder.forget()
            if task.data_loaded:
                task.unload_data()
        return result

    def _extra(self, result: TaskResult, metric: str) -> float:
        value = _means(result, metric)
        if value is None:
            entries = [entry for of_split in result.scores.values() for entry in of_split]
            known = sorted({k for entry in entries for k, v in entry.items() if isinstance(v, int | float)})
            raise BadInputError(
                f"the task {result.task_name} has no metric {metric!r}",
                where="training.evaluation.metric",
                hint=f"Metrics: {', '.join(known)}.",
            )
        return value


def _means(result: TaskResult, metric: str) -> float | None:
    """A metric's mean over splits, then over subsets; None where one of them has no number."""
    by_split = scores_by_split(result, metric)
    if any(len(scores) < len(result.scores[split]) for split, scores in by_split.items()):
        return None
    by_subset = mean_over_splits(by_split)
    return sum(by_subset.values()) / len(by_subset)
