"""A table of models over tasks: means, Borda points and mean ranks with intervals, and confidence sets of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nearfield.errors import BadInputError
from nearfield.evaluation import statistics
from nearfield.evaluation.comparison import ModelRow, check_settings, chosen_keys, label_results
from nearfield.evaluation.results import read_scores
from nearfield.evaluation.scores import Key, ScoreNotice, TaskScores, joint_replicates, score_notices
from nearfield.evaluation.statistics import Floats

VERSION = 1


@dataclass(frozen=True)
class Value:
    """A figure of a model with its interval; null where tasks are missing, without ends where nothing can be drawn."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class BoardTask:
    """A column: a task, its type and main score, and whether its uncertainty is known."""

    name: str
    type: str
    metric: str
    uncertain: bool
    resampled: str | None = None
    """The parts of its error: so many units, in clusters or with what they share."""


@dataclass(frozen=True)
class BoardRow:
    """A model: its place by Borda points, its figures, its scores, and the ranks of its mean that the data allow.

    ``rank_low`` to ``rank_high`` is one of the simultaneous sets (null for a model without all tasks).
    """

    label: str
    name: str
    revision: str
    place: int
    borda: Value
    mean_task: Value
    mean_type: Value
    mean_rank: Value
    rank_low: int | None
    rank_high: int | None
    above: tuple[str, ...]
    """Models that this one is above beyond doubt."""
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Leaderboard:
    """Models in the order of their places."""

    tasks: tuple[BoardTask, ...]
    rows: tuple[BoardRow, ...]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    notices: tuple[ScoreNotice, ...] = ()
    """Notices for readers of the scores."""

    def to_json(self) -> dict[str, Any]:
        """The content of ``--json``."""
        return {"version": VERSION, **asdict(self)}


def leaderboard(
    results: Sequence[Path],
    labels: Sequence[str] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    samples: int = 2_000,
    level: float = 0.95,
    seed: int = 0,
) -> Leaderboard:
    """Rank the models of results folders over all tasks that any of them has (or over ``tasks``).

    A task's score is the mean over its subsets and splits; ``mean_task`` the plain mean over tasks, ``mean_type`` the
    mean over the means of task types; both are null for a model that lacks a task. Intervals come from ``samples``
    joint replicates of all models, in which models with the same units share their resamples.
    """
    check_settings(samples, samples, level)
    models = label_results(results, labels)
    read = {model.label: read_scores(Path(model.path)) for model in models}
    columns, notes = _columns(read, tasks)
    names = [model.label for model in models]
    scores, replicates, uncertain = _matrix(read, names, columns, samples, seed)
    board_tasks = tuple(
        BoardTask(task, of.task_type, of.metric, bool(known), of.resampled)
        for (task, (_, of)), known in zip(columns.items(), uncertain, strict=True)
    )
    dependent = _dependent(read, columns)
    notes += dependent
    if dependent:
        # Where the error of one task cannot be told, that of a mean over tasks cannot either.
        replicates = np.full_like(replicates, np.nan)
    certain = [task.name for task in board_tasks if not task.uncertain]
    if certain and not dependent:
        notes.append(f"no interval can be given on {', '.join(certain)}: there the scores are taken as exact")
    rows = _rows(models, board_tasks, scores, replicates, level, ranked=not dependent)
    for row in rows:
        absent = [task.name for task in board_tasks if task.name not in row.scores]
        undefined = {task: why for task in absent if (why := _undefined(read[row.label], columns[task][0]))}
        notes += [
            f"{row.label} has no score on {task} ({why}): it has no means, and earns no points there"
            for task, why in undefined.items()
        ]
        missing = [task for task in absent if task not in undefined]
        if missing:
            notes.append(f"{row.label} lacks {', '.join(missing)}: it has no means, and earns no points there")
    notes += [
        f"{task.name}: {task.resampled}"
        for task, of in zip(board_tasks, columns.values(), strict=True)
        if of[1].sharing
    ]
    order = sorted(rows, key=lambda row: (row.place, -(row.mean_task.value or 0.0), row.label))
    settings = {"samples": samples, "level": level, "seed": seed}
    shown = [key for keys, _ in columns.values() for key in keys]
    return Leaderboard(board_tasks, tuple(order), tuple(notes), settings, score_notices(read, shown))


def _rows(
    models: Sequence[ModelRow],
    tasks: Sequence[BoardTask],
    scores: Floats,
    replicates: Floats,
    level: float,
    *,
    ranked: bool,
) -> list[BoardRow]:
    """A row for each model from ``scores [models, tasks]`` and ``replicates [samples, models, tasks]``."""
    kinds = dict.fromkeys(task.type for task in tasks)
    types = [[i for i, task in enumerate(tasks) if task.type == kind] for kind in kinds]
    estimates, drawn = _figures(scores, types), _figures(replicates, types)
    places = statistics.places(estimates[0])
    complete = np.flatnonzero(~np.isnan(scores).any(axis=1))
    sets = None
    if len(complete) and ranked:
        sets = statistics.rank_sets(estimates[1][complete], drawn[1][:, complete], level)
    rows = []
    for i, model in enumerate(models):
        low = high = None
        above: tuple[str, ...] = ()
        if sets is not None and i in complete:
            at = int(np.searchsorted(complete, i))
            low, high = int(sets.low[at]), int(sets.high[at])
            above = tuple(models[complete[j]].label for j in np.flatnonzero(sets.above[at, :]))
        borda, mean_task, mean_type, mean_rank = (
            _value(one[i], many[:, i], level) for one, many in zip(estimates, drawn, strict=True)
        )
        task_scores = {task.name: float(scores[i, j]) for j, task in enumerate(tasks) if not np.isnan(scores[i, j])}
        rows.append(
            BoardRow(
                model.label,
                model.name,
                model.revision,
                int(places[i]),
                borda,
                mean_task,
                mean_type,
                mean_rank,
                low,
                high,
                above,
                task_scores,
            )
        )
    return rows


def _figures(table: Floats, types: Sequence[Sequence[int]]) -> tuple[Floats, Floats, Floats, Floats]:
    """Borda points, means over tasks and over types, mean ranks ``[..., models]`` of ``table [..., models, tasks]``."""
    by_type = np.stack([table[..., columns].mean(axis=-1) for columns in types]).mean(axis=0)
    return statistics.borda(table), table.mean(axis=-1), by_type, statistics.task_ranks(table).mean(axis=-1)


Columns = dict[str, tuple[list[Key], TaskScores]]


def _columns(read: Mapping[str, Mapping[Key, TaskScores]], tasks: Sequence[str] | None) -> tuple[Columns, list[str]]:
    """Task -> its subsets and splits and one of its scores; tasks that were scored on different data are left out."""
    keys = chosen_keys(read, tasks)
    columns: Columns = {}
    notes = []
    for task in dict.fromkeys(task for task, _, _ in keys):
        task_keys = [key for key in keys if key[0] == task]
        of_task = [scores[key] for scores in read.values() for key in task_keys if key in scores]
        if len({of.data_revision for of in of_task}) > 1 or len({of.metric for of in of_task}) > 1:
            notes.append(f"{task} is left out: the models were scored on different data or by different metrics")
            continue
        columns[task] = (task_keys, of_task[0])
    if not columns:
        raise BadInputError("the models have no task in common", hint="Score them on the same suite.")
    return columns, notes


def _matrix(
    read: Mapping[str, Mapping[Key, TaskScores]], names: Sequence[str], columns: Columns, samples: int, seed: int
) -> tuple[Floats, Floats, list[bool]]:
    """Scores ``[models, tasks]`` (NaN where missing), replicates ``[samples, models, tasks]``, and which tasks have replicates."""
    scores = np.full((len(names), len(columns)), np.nan)
    replicates = np.full((samples, len(names), len(columns)), np.nan)
    uncertain = []
    for column, (keys, _) in enumerate(columns.values()):
        drawn = {}
        for key in keys:
            of_key = {name: read[name][key] for name in names if key in read[name]}
            drawn[key] = dict(joint_replicates(key, of_key, samples, seed))
        uncertain.append(all(drawn[key] for key in keys))
        for row, name in enumerate(names):
            if all(key in read[name] for key in keys):
                task_scores = [read[name][key].score for key in keys]
                scores[row, column] = np.mean(task_scores)
                parts = [
                    np.asarray(drawn[key].get(name, np.full(samples, s)))
                    for key, s in zip(keys, task_scores, strict=True)
                ]
                replicates[:, row, column] = np.mean(parts, axis=0)
    return scores, replicates, uncertain


def _dependent(read: Mapping[str, Mapping[Key, TaskScores]], columns: Columns) -> list[str]:
    """The sentence about tasks one component of whose units is too large: no figure of the table has an interval then."""
    reasons: dict[str, str] = {}
    for task, (keys, _) in columns.items():
        for key in keys:
            for scores in read.values():
                reason = scores[key].reason if key in scores else None
                if reason is not None and statistics.is_too_large(reason):
                    reasons.setdefault(task, reason)
    return [f"{task}: {reason}; so the table has neither intervals nor ranks" for task, reason in reasons.items()]


def _undefined(scores: Mapping[Key, TaskScores], keys: Sequence[Key]) -> str | None:
    """Why a model that was scored under all these keys has no score; None where one is finite or missing."""
    if not all(key in scores for key in keys):
        return None
    return next((scores[key].reason for key in keys if not np.isfinite(scores[key].score)), None)


def _value(value: float, replicates: Floats, level: float) -> Value:
    if np.isnan(value):
        return Value(None)
    if np.isnan(replicates).all() or np.ptp(replicates) == 0:
        return Value(float(value))
    interval = statistics.percentile_interval(replicates, level)
    return Value(float(value), interval.low, interval.high)
