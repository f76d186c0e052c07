"""A model's score on one task with the units that it is made of, what is computed from them, and what to know of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nearfield.errors import Notice
from nearfield.evaluation import statistics
from nearfield.evaluation.estimators import MEAN, CrossedMean, Estimator
from nearfield.evaluation.statistics import Floats, Interval, Ints
from nearfield.provenance import generator

Key = tuple[str, str, str]
"""Task, subset, split."""
NOTHING: Floats = np.empty(0)


def title_of(key: Key) -> str:
    """A key in words: the task, with its subset and split where they are not the usual ones."""
    task, subset, split = key
    return task + (f" ({subset})" if subset != "default" else "") + (f" [{split}]" if split != "test" else "")


@dataclass(frozen=True)
class TaskScores:
    """One model's main score on one subset and split, and the units that it is made of (none where ``reason`` says why).

    ``values`` is ``[units]``, for means over classifiers ``[runs, units]``; ``truth [units]`` is what predictions are held
    against: gold scores, 0/1 labels, the numbers of the right sentences.
    """

    metric: str
    score: float
    data_revision: str
    reason: str | None
    estimator: Estimator = MEAN
    ids: tuple[str, ...] = ()
    clusters: tuple[str | None, ...] = ()
    values: Floats = field(default_factory=lambda: NOTHING)
    truth: Floats = field(default_factory=lambda: NOTHING)
    task_type: str = ""
    notices: tuple[Notice, ...] = ()
    """Notices for readers of the score."""

    @property
    def numbers(self) -> Ints:
        """The cluster of each unit, numbered from 0."""
        return statistics.cluster_numbers(self.clusters, self.ids)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """How many units and clusters there are."""
        return (None, None) if self.reason is not None else (len(self.ids), int(self.numbers.max()) + 1)

    def own(self, replicates: Floats) -> Floats:
        """This score's own replicates from its column of :func:`joint_replicates`."""
        return self.estimator.rescaled(replicates, self.score, self.values, self.numbers)

    def interval(self, replicates: Floats, level: float) -> Interval:
        """The score's interval from its column of :func:`joint_replicates`."""
        freedom = self.estimator.freedom(self.values, self.numbers)
        return statistics.percentile_interval(self.own(replicates), level, freedom)


def joint_replicates(
    key: Key, scores: Mapping[str, TaskScores], samples: int, seed: int
) -> Iterator[tuple[str, Floats]]:
    """Replicates ``[samples]`` of the score of each model that has units; models with the same units share every resample."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, of in scores.items():
        if of.reason is None:
            same = (of.data_revision, of.estimator, of.ids, of.clusters, of.values.shape, of.truth.tobytes())
            groups.setdefault(same, []).append(name)
    for members in groups.values():
        first, rng = scores[members[0]], generator(seed, "bootstrap", *key)
        values = np.stack([scores[name].values for name in members], axis=-1)
        replicates = first.estimator.replicates(first.truth, values, first.numbers, samples, rng)
        for i, name in enumerate(members):
            yield name, replicates[:, i]


def score_interval(key: Key, of: TaskScores, samples: int, level: float, seed: int) -> Interval | None:
    """The interval of a single model's score; None where it has no units."""
    return next(
        (of.interval(replicates, level) for _, replicates in joint_replicates(key, {"": of}, samples, seed)), None
    )


def not_paired(first: TaskScores, second: TaskScores) -> str | None:
    """Why two models' scores cannot be tested against each other, or None."""
    if first.data_revision != second.data_revision:
        return "the two were scored on different data"
    if first.metric != second.metric:
        return f"the two were scored by different metrics ({first.metric}, {second.metric})"
    if first.reason is not None or second.reason is not None:
        return first.reason or second.reason
    if first.ids != second.ids or first.clusters != second.clusters or first.estimator != second.estimator:
        return "the two have scores of different units"
    if first.values.shape != second.values.shape:
        return "the two have scores of different experiments"
    if not np.array_equal(first.truth, second.truth):
        return "the two have different gold scores"
    return None


@dataclass(frozen=True)
class Effect:
    """How large a difference is: in standard deviations of the units' differences, and in units won, even and lost."""

    size: float | None = None
    won: int | None = None
    even: int | None = None
    lost: int | None = None

    @classmethod
    def of(cls, scores: TaskScores, reference: TaskScores) -> Effect:
        """The effect of a paired difference; without a mean over units there is none."""
        if not scores.estimator.is_mean:
            return cls()
        difference = scores.values - reference.values
        if isinstance(scores.estimator, CrossedMean):
            difference = difference.mean(axis=0)
        spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
        tolerance = 1e-9
        return cls(
            float(difference.mean()) / spread if spread > tolerance else None,
            int((difference > tolerance).sum()),
            int((np.abs(difference) <= tolerance).sum()),
            int((difference < -tolerance).sum()),
        )


MARK = " *"
"""The mark behind a score that has a notice."""
_NAMED = 6


@dataclass(frozen=True)
class ScoreNotice:
    """A notice of one model's scores on ``tasks``; ``everywhere`` if these are all that are shown of it."""

    model: str
    code: str
    what: str
    hint: str | None
    tasks: tuple[str, ...]
    everywhere: bool

    @property
    def sentence(self) -> str:
        """The notice in one line, as tables have it below them."""
        return f"* {self.model} on {tasks_in_words(self.tasks, self.everywhere)}: {self.what}"


def tasks_in_words(tasks: Sequence[str], everywhere: bool) -> str:
    """Names of tasks; of many only the first ones."""
    if everywhere and len(tasks) > 1:
        return "all tasks"
    more = f" and {len(tasks) - _NAMED} more" if len(tasks) > _NAMED else ""
    return ", ".join(tasks[:_NAMED]) + more


def score_notices(read: Mapping[str, Mapping[Key, TaskScores]], keys: Iterable[Key]) -> tuple[ScoreNotice, ...]:
    """The notices of each model's scores under these keys."""
    shown = list(keys)
    made = []
    for model, scores in read.items():
        model_keys = [key for key in shown if key in scores]
        tasks: dict[Notice, dict[str, None]] = {}
        for key in model_keys:
            for notice in scores[key].notices:
                tasks.setdefault(notice, {})[key[0]] = None
        scored = {key[0] for key in model_keys}
        made += [
            ScoreNotice(model, notice.code, notice.what, notice.hint, tuple(of), set(of) == scored)
            for notice, of in tasks.items()
        ]
    return tuple(made)


def noticed(notices: Iterable[ScoreNotice]) -> set[tuple[str, str]]:
    """Model and task of each score that has a notice."""
    return {(notice.model, task) for notice in notices for task in notice.tasks}
