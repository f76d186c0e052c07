"""A model's score on one task with the units that it is made of, and what can be drawn and tested from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.errors import BadInputError
from nearfield.evaluation import resampling, statistics
from nearfield.evaluation.config import UNITS_SUFFIX
from nearfield.evaluation.statistics import Floats, Ints
from nearfield.evaluation.unit_files import EXPERIMENT, read_units
from nearfield.notices import Notice, from_file

_ROUNDING = 1e-5
"""mteb rounds retrieval scores to five decimals; a unit file's mean must agree with its main score this closely."""

Key = tuple[str, str, str]
"""Task, subset, split."""
Kind = Literal["mean", "spearman", "precision", "f1", "crossed", "runs"]

SCOPES: dict[Kind, str] = {
    "mean": "other units of the same kind",
    "spearman": "other pairs of the same kind",
    "precision": "other pairs of the same kind",
    "f1": "other sentences among as many",
    "crossed": "other items and other training samples",
    "runs": "the task's own experiments (draws of documents and starts of k-means), not other documents",
}
"""What an interval speaks of."""


@dataclass(frozen=True)
class TaskScores:
    """One model's main score on one subset and split, and the units that it is made of (none where ``reason`` says why).

    ``values`` is ``[units]``, for ``crossed`` ``[runs, units]``; ``truth`` is what predictions are held against: gold
    scores (spearman), 0/1 labels (precision), the numbers of the right sentences (f1).
    """

    metric: str
    score: float
    data_revision: str
    reason: str | None
    kind: Kind = "mean"
    ids: tuple[str, ...] = ()
    clusters: tuple[str | None, ...] = ()
    values: Floats = field(default_factory=lambda: np.empty(0))
    truth: Floats | None = None
    task_type: str = ""
    notices: tuple[Notice, ...] = ()
    """What a reader of the score must know."""

    @property
    def numbers(self) -> Ints:
        """The cluster of each unit, numbered from 0."""
        return statistics.cluster_numbers(self.clusters, self.ids)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """How many units and clusters there are."""
        return (None, None) if self.reason is not None else (len(self.ids), int(self.numbers.max()) + 1)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the score's interval."""
        if self.kind == "crossed":
            return resampling.crossed_error(self.values, self.numbers).freedom
        return float(self.numbers.max())


def read_scores(folder: Path) -> dict[Key, TaskScores]:
    """All scores of a results folder ``<org>__<model>/<revision>`` that nearfield wrote."""
    found: dict[Key, TaskScores] = {}
    for file in sorted(folder.glob(f"*{UNITS_SUFFIX}")):
        task = file.name.removesuffix(UNITS_SUFFIX)
        table, metadata = read_units(folder, task)
        try:
            entries = [
                (split, subset, float(score))
                for split, of in metadata["main_scores"].items()
                for subset, score in of.items()
            ]
            metric, revision = str(metadata["main_score"]), str(metadata["dataset_revision"])
            reasons = dict(metadata["no_interval"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInputError("the metadata of this file are damaged", where=str(file)) from error
        for split, subset, score in entries:
            reason = reasons.get(f"{subset}/{split}")
            rows = table.filter(pc.and_(pc.equal(table["subset"], subset), pc.equal(table["split"], split)))
            if reason is None and rows.num_rows == 0:
                reason = "no scores of single units were kept"
            if reason is None and not math.isfinite(score):
                reason = "the score is not a number"
            scores = TaskScores(metric, score, revision, reason)
            if reason is None:
                scores = _independent(_with_units(rows, metric, score, revision, file))
            notices = (*from_file(metadata.get("notices")), *_unknown(metadata.get("version"), scores))
            found[task, subset, split] = replace(scores, task_type=str(metadata.get("task_type", "")), notices=notices)
    return found


def _independent(of: TaskScores) -> TaskScores:
    """The same without units where one component holds too many of them."""
    reason = None if of.kind == "runs" else statistics.too_large(np.bincount(of.numbers).tolist())
    return of if reason is None else TaskScores(of.metric, of.score, of.data_revision, reason)


_COMPONENTS_SINCE = 4
"""The version of results that keeps components of any size; earlier ones dropped large ones without a word."""


def _unknown(version: Any, of: TaskScores) -> list[Notice]:
    """What a reader of an earlier version's scores must know."""
    old = isinstance(version, int) and version < _COMPONENTS_SINCE
    if not old or of.reason is not None or of.kind not in ("mean", "spearman", "precision") or any(of.clusters):
        return []
    what = "scored by an earlier version, which took units for independent where many of them shared content"
    return [Notice("components-unknown", what, "Score the task again with --overwrite.")]


def _with_units(rows: pa.Table, metric: str, score: float, revision: str, file: Path) -> TaskScores:
    """The units of one subset and split; refused where they do not give the main score again."""
    present = set(rows["metric"].to_pylist())
    truth, experiments = None, sorted((name for name in present if name.startswith(EXPERIMENT)), key=_number)
    kind: Kind = "mean"
    if "gold" in present:
        kind, truth, ids, values = "spearman", "gold", *_column(rows, "prediction", file)
    elif "label" in present:
        kind, truth, ids, values = "precision", "label", *_column(rows, "prediction", file)
    elif "gold_match" in present and metric == "f1":
        kind, truth, ids, values = "f1", "gold_match", *_column(rows, "match", file)
    elif metric == "accuracy" and len(experiments) > 1:
        columns = [_column(rows, name, file) for name in experiments]
        kind, ids, values = "crossed", columns[0][0], np.stack([column for _, column in columns])
    else:
        ids, values = _column(rows, metric, file)
        if rows["unit"][0].as_py() == "experiment":
            kind = "runs"
    clusters = dict(zip(rows["id"].to_pylist(), rows["cluster"].to_pylist(), strict=True))
    held = None
    if truth is not None:
        truth_ids, held = _column(rows, truth, file)
        if truth_ids != ids:
            raise _incomplete(file)
    scores = TaskScores(metric, score, revision, None, kind, ids, tuple(clusters[i] for i in ids), values, held)
    again = _again(scores)
    if not math.isclose(again, score, abs_tol=_ROUNDING):
        raise BadInputError(
            f"the units give a score of {again:.6f}, but the task's main score is {score:.6f}",
            where=str(file),
            hint="The files are not of one evaluation; score the task again with --overwrite.",
        )
    return scores


def _number(name: str) -> int:
    return int(name.removeprefix(EXPERIMENT))


def _column(rows: pa.Table, metric: str, file: Path) -> tuple[tuple[str, ...], Floats]:
    kept = rows.filter(pc.equal(rows["metric"], metric))
    ids = tuple(kept["id"].to_pylist())
    if not ids or len(set(ids)) != len(ids):
        raise _incomplete(file)
    return ids, kept["value"].to_numpy().astype(np.float64)


def _incomplete(file: Path) -> BadInputError:
    return BadInputError("the units of this file are incomplete or stand twice", where=str(file))


def _again(of: TaskScores) -> float:
    if of.truth is None:
        return float(of.values.mean())
    if of.kind == "spearman":
        return statistics.spearman(of.truth, of.values)
    if of.kind == "precision":
        return resampling.average_precision(of.truth, of.values)
    return float(resampling.weighted_f1(np.ones((1, len(of.ids))), _whole(of.truth), _whole(of.values)[None])[0])


def _whole(values: Floats) -> Ints:
    return values.astype(np.int64)


def draws(group: Sequence[TaskScores], samples: int, rng: np.random.Generator) -> Floats:
    """Draws around the scores of models that were scored on the same units: ``[samples, models]``."""
    first = group[0]
    clusters = first.numbers
    values = np.stack([of.values for of in group], axis=-1)
    if first.kind == "spearman" and first.truth is not None:
        return statistics.bootstrap_spearman(first.truth, values, clusters, samples, rng)
    if first.kind == "precision" and first.truth is not None:
        return resampling.draws_precision(first.truth, values, clusters, samples, rng)
    if first.kind == "f1" and first.truth is not None:
        return resampling.draws_f1(_whole(first.truth), _whole(values), clusters, samples, rng)
    if first.kind == "crossed":
        return resampling.crossed_draws(values, clusters, samples, rng)
    return statistics.bootstrap_means(values, clusters, samples, rng)


def score_draws(of: TaskScores, drawn: Floats) -> Floats:
    """A model's own draws, those of :func:`draws`; without the interaction that they count twice."""
    if of.kind != "crossed":
        return drawn
    return of.score + resampling.crossed_error(of.values, of.numbers).scale * (drawn - of.score)


def difference_draws(of: TaskScores, reference: TaskScores, drawn: Floats) -> tuple[Floats, float]:
    """Draws of a difference from the difference of two models' draws, and their degrees of freedom."""
    if of.kind != "crossed":
        return drawn, of.freedom
    error = resampling.crossed_error(of.values - reference.values, of.numbers)
    centre = of.score - reference.score
    return centre + error.scale * (drawn - centre), error.freedom


def p_value(of: TaskScores, reference: TaskScores, permutations: int, rng: np.random.Generator) -> float:
    """Two-sided p of a paired test of two models on the same units, by a test that fits the score."""
    clusters = of.numbers
    if of.kind == "spearman" and of.truth is not None:
        return statistics.swap_p(of.truth, reference.values, of.values, clusters, permutations, rng)
    if of.kind == "precision" and of.truth is not None:
        return resampling.swap_precision_p(of.truth, reference.values, of.values, clusters, permutations, rng)
    if of.kind == "f1" and of.truth is not None:
        first, second = _whole(reference.values), _whole(of.values)
        return resampling.swap_f1_p(_whole(of.truth), first, second, clusters, permutations, rng)
    difference = of.values - reference.values
    if of.kind == "crossed":
        return resampling.crossed_error(difference, clusters).p(float(difference.mean()))
    return statistics.sign_flip_p(difference, clusters, permutations, rng)


@dataclass(frozen=True)
class Effect:
    """How large a difference is: in standard deviations of the units' differences, and in units won, even and lost."""

    size: float | None
    won: int | None
    even: int | None
    lost: int | None


def effect(of: TaskScores, reference: TaskScores) -> Effect:
    """The effect of a paired difference; without a mean over units there is none."""
    if of.kind not in ("mean", "crossed", "runs"):
        return Effect(None, None, None, None)
    difference = of.values - reference.values
    if of.kind == "crossed":
        difference = difference.mean(axis=0)
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    tolerance = 1e-9
    return Effect(
        float(difference.mean()) / spread if spread > tolerance else None,
        int((difference > tolerance).sum()),
        int((np.abs(difference) <= tolerance).sum()),
        int((difference < -tolerance).sum()),
    )


def not_paired(first: TaskScores, second: TaskScores) -> str | None:
    """Why two models' scores cannot be tested against each other, or None."""
    if first.data_revision != second.data_revision:
        return "the two were scored on different data"
    if first.metric != second.metric:
        return f"the two were scored by different metrics ({first.metric}, {second.metric})"
    if first.reason is not None or second.reason is not None:
        return first.reason or second.reason
    if first.ids != second.ids or first.clusters != second.clusters or first.kind != second.kind:
        return "the two have scores of different units"
    if first.values.shape != second.values.shape:
        return "the two have scores of different experiments"
    if first.truth is not None and second.truth is not None and not np.array_equal(first.truth, second.truth):
        return "the two have different gold scores"
    return None


def same_units(of: TaskScores) -> tuple[Any, ...]:
    """Models with the same value here share every resample."""
    truth = None if of.truth is None else of.truth.tobytes()
    return (of.data_revision, of.kind, of.ids, of.clusters, of.values.shape, truth)
