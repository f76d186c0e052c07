"""Compare models by the scores of single units: intervals, paired tests and one plain sentence for each pair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.errors import BadInputError
from nearfield.evaluation import statistics
from nearfield.evaluation.config import UNITS_SUFFIX
from nearfield.evaluation.statistics import Floats, Interval
from nearfield.evaluation.units import read_units
from nearfield.files import read_json
from nearfield.randomness import derive_seed

VERSION = 1
_ROUNDING = 1e-5
"""mteb rounds retrieval scores to five decimals; a unit file's mean must agree with its main score this closely."""


@dataclass(frozen=True)
class ModelRow:
    """A compared model: the label in the table, and where its results are."""

    label: str
    name: str
    revision: str
    path: str


@dataclass(frozen=True)
class ScoreRow:
    """A model's score on a subset and split of a task; ``low`` and ``high`` are null where ``reason`` says why."""

    task: str
    subset: str
    split: str
    metric: str
    model: str
    score: float
    low: float | None
    high: float | None
    units: int | None
    clusters: int | None
    reason: str | None


@dataclass(frozen=True)
class DifferenceRow:
    """A model against the baseline on the same units. ``verdict``: better, worse, not separable, or not tested."""

    task: str
    subset: str
    split: str
    metric: str
    model: str
    baseline: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    units: int | None
    clusters: int | None
    verdict: str
    sentence: str
    reason: str | None


@dataclass(frozen=True)
class Comparison:
    """Scores with intervals, and differences to the baseline with paired tests."""

    models: tuple[ModelRow, ...]
    baseline: str
    scores: tuple[ScoreRow, ...]
    differences: tuple[DifferenceRow, ...]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What ``comparison.json`` holds: only JSON types."""
        return {
            "version": VERSION,
            "baseline": self.baseline,
            "settings": self.settings,
            "models": [asdict(row) for row in self.models],
            "scores": [asdict(row) for row in self.scores],
            "differences": [asdict(row) for row in self.differences],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, path: Path) -> Comparison:
        """Read a ``comparison.json``."""
        value = read_json(path, "comparison")
        try:
            return cls(
                models=tuple(ModelRow(**row) for row in value["models"]),
                baseline=value["baseline"],
                scores=tuple(ScoreRow(**row) for row in value["scores"]),
                differences=tuple(DifferenceRow(**row) for row in value["differences"]),
                notes=tuple(value["notes"]),
                settings=value["settings"],
            )
        except (KeyError, TypeError) as error:
            raise BadInputError(f"this is no comparison of version {VERSION} ({error})", where=str(path)) from error


@dataclass(frozen=True)
class _TaskScores:
    """One model's main score on one subset and split, and the units that it is made of (None where there are none)."""

    metric: str
    score: float
    data_revision: str
    reason: str | None
    ids: tuple[str, ...] = ()
    clusters: tuple[str | None, ...] = ()
    values: Floats | None = None
    gold: Floats | None = None


Key = tuple[str, str, str]


def compare(
    results: Sequence[Path],
    labels: Sequence[str] | None = None,
    *,
    baseline: str | None = None,
    tasks: Sequence[str] | None = None,
    samples: int = 10_000,
    permutations: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two or more results folders (``<org>__<model>/<revision>``) on the tasks that they share.

    ``baseline`` is a label (the first by default); every other model is tested against it. ``samples`` bootstrap
    resamples give the central ``level`` of each score and difference, ``permutations`` the p-values, which are
    Holm-adjusted over all tests of the comparison. The same inputs and ``seed`` give the same numbers.
    """
    if len(results) < 2:
        raise BadInputError("a comparison needs two models or more", where="compare")
    _check_settings(samples, permutations, level)
    models = _models(results, labels)
    names = [model.label for model in models]
    base = names[0] if baseline is None else baseline
    if base not in names:
        raise BadInputError(f"the baseline {base!r} is not among the models", hint=f"Models: {', '.join(names)}.")
    read = {model.label: _read_all(Path(model.path)) for model in models}
    keys, notes = _shared(read, names, tasks)
    scores: list[ScoreRow] = []
    raw: list[DifferenceRow] = []
    for key in keys:
        of_key = {name: read[name][key] for name in names if key in read[name]}
        task_scores, task_differences = _compare_task(key, of_key, base, samples, permutations, level, seed)
        scores += task_scores
        raw += task_differences
    settings = {"samples": samples, "permutations": permutations, "level": level, "seed": seed}
    return Comparison(tuple(models), base, tuple(scores), tuple(_adjusted(raw, level)), tuple(notes), settings)


def _check_settings(samples: int, permutations: int, level: float) -> None:
    for name, value in (("samples", samples), ("permutations", permutations)):
        if value < 100:
            raise BadInputError(f"{name} must be at least 100; it is {value}", where=name)
    if not 0.5 <= level < 1:
        raise BadInputError(f"the level must be from 0.5 to below 1; it is {level}", where="level")


def _models(results: Sequence[Path], labels: Sequence[str] | None) -> list[ModelRow]:
    if labels is not None and len(labels) != len(results):
        raise BadInputError(f"{len(results)} results but {len(labels)} labels", where="labels")
    rows = []
    for i, path in enumerate(results):
        if not path.is_dir():
            raise BadInputError(
                "this results folder does not exist", where=str(path), hint="Make it with nearfield eval."
            )
        if not any(path.glob(f"*{UNITS_SUFFIX}")):
            raise BadInputError(
                "this folder holds no scores of single units",
                where=str(path),
                hint="Give a folder <results>/<org>__<model>/<revision> that nearfield eval has written.",
            )
        meta = read_json(path / "model_meta.json", "model description")
        if not isinstance(meta, dict) or not isinstance(meta.get("name"), str):
            raise BadInputError("this model description has no 'name'", where=str(path / "model_meta.json"))
        name, revision = meta["name"], str(meta.get("revision"))
        rows.append(ModelRow(labels[i] if labels is not None else name, name, revision, str(path)))
    if labels is None and len({row.label for row in rows}) < len(rows):
        rows = [ModelRow(f"{row.name}@{row.revision[:8]}", row.name, row.revision, row.path) for row in rows]
    twice = next((row.label for row in rows if [r.label for r in rows].count(row.label) > 1), None)
    if twice is not None:
        raise BadInputError(f"two of the models bear the label {twice!r}", hint="Give them different labels.")
    return rows


def _read_all(folder: Path) -> dict[Key, _TaskScores]:
    found: dict[Key, _TaskScores] = {}
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
            if reason is not None:
                found[task, subset, split] = _TaskScores(metric, score, revision, reason)
                continue
            found[task, subset, split] = _units_of(rows, metric, score, revision, file)
    return found


def _units_of(rows: pa.Table, metric: str, score: float, revision: str, file: Path) -> _TaskScores:
    gold = rows.filter(pc.equal(rows["metric"], "gold"))
    of_metric = rows.filter(pc.equal(rows["metric"], "prediction" if gold.num_rows else metric))
    ids = tuple(of_metric["id"].to_pylist())
    values = of_metric["value"].to_numpy().astype(np.float64)
    gold_values = gold["value"].to_numpy().astype(np.float64) if gold.num_rows else None
    if not ids or len(set(ids)) != len(ids) or (gold_values is not None and tuple(gold["id"].to_pylist()) != ids):
        raise BadInputError("the units of this file are incomplete or stand twice", where=str(file))
    again = float(values.mean()) if gold_values is None else statistics.spearman(gold_values, values)
    if not math.isclose(again, score, abs_tol=_ROUNDING):
        raise BadInputError(
            f"the units give a score of {again:.6f}, but the task's main score is {score:.6f}",
            where=str(file),
            hint="The files are not of one evaluation; score the task again with --overwrite.",
        )
    return _TaskScores(metric, score, revision, None, ids, tuple(of_metric["cluster"].to_pylist()), values, gold_values)


def _shared(
    read: dict[str, dict[Key, _TaskScores]], names: Sequence[str], tasks: Sequence[str] | None
) -> tuple[list[Key], list[str]]:
    keys = sorted({key for found in read.values() for key in found})
    if tasks is not None:
        known = sorted({task for task, _, _ in keys})
        for task in tasks:
            if task not in known:
                raise BadInputError(f"no model has results on {task!r}", hint=f"Tasks: {', '.join(known)}.")
        keys = [key for key in keys if key[0] in set(tasks)]
    notes = []
    for key in keys:
        without = [name for name in names if key not in read[name]]
        if without:
            notes.append(f"{_title(key)}: no result of {', '.join(without)}")
    shared = [key for key in keys if sum(key in read[name] for name in names) >= 2]
    if not shared:
        raise BadInputError("the models share no task", hint="Score them on the same suite.")
    return shared, notes


def _compare_task(
    key: Key, found: dict[str, _TaskScores], base: str, samples: int, permutations: int, level: float, seed: int
) -> tuple[list[ScoreRow], list[DifferenceRow]]:
    task, subset, split = key
    resamples = dict(_resamples(key, found, samples, seed))
    scores, differences = [], []
    for name, of in found.items():
        interval = statistics.percentile_interval(resamples[name], level) if name in resamples else None
        units, clusters = _sizes(of)
        low, high = _ends(interval)
        scores.append(ScoreRow(task, subset, split, of.metric, name, of.score, low, high, units, clusters, of.reason))
    if base not in found:
        return scores, []
    reference = found[base]
    for name, of in found.items():
        if name == base:
            continue
        reason = _not_paired(reference, of)
        interval, p = None, None
        difference = of.score - reference.score
        if reason is None:
            interval = statistics.percentile_interval(resamples[name] - resamples[base], level)
            p = _p_value(key, reference, of, permutations, seed, name)
        units, clusters = _sizes(of) if reason is None else (None, None)
        low, high = _ends(interval)
        row = DifferenceRow(
            task, subset, split, of.metric, name, base, difference, low, high, p, None, units, clusters, "", "", reason
        )
        differences.append(row)
    return scores, differences


def _resamples(key: Key, found: dict[str, _TaskScores], samples: int, seed: int) -> Iterator[tuple[str, Floats]]:
    """Resampled scores of each model with units; models with the same units share every resample."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, of in found.items():
        if of.reason is None:
            groups.setdefault((of.data_revision, of.ids, of.clusters), []).append(name)
    for members in groups.values():
        first = found[members[0]]
        values = np.stack([_values(found[name]) for name in members], axis=1)
        clusters = statistics.cluster_numbers(first.clusters, first.ids)
        rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "bootstrap", *key)))
        if first.gold is None:
            drawn = statistics.bootstrap_means(values, clusters, samples, rng)
        else:
            drawn = statistics.bootstrap_spearman(first.gold, values, clusters, samples, rng)
        for i, name in enumerate(members):
            yield name, drawn[:, i]


def _p_value(key: Key, reference: _TaskScores, of: _TaskScores, permutations: int, seed: int, name: str) -> float:
    clusters = statistics.cluster_numbers(of.clusters, of.ids)
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "permutation", *key)))
    if of.gold is None:
        return statistics.sign_flip_p(_values(of) - _values(reference), clusters, permutations, rng)
    return statistics.swap_p(of.gold, _values(reference), _values(of), clusters, permutations, rng)


def _values(of: _TaskScores) -> Floats:
    assert of.values is not None
    return of.values


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def _sizes(of: _TaskScores) -> tuple[int | None, int | None]:
    if of.values is None:
        return None, None
    return len(of.ids), int(statistics.cluster_numbers(of.clusters, of.ids).max()) + 1


def _not_paired(first: _TaskScores, second: _TaskScores) -> str | None:
    if first.data_revision != second.data_revision:
        return "the two were scored on different data"
    if first.metric != second.metric:
        return f"the two were scored by different metrics ({first.metric}, {second.metric})"
    if first.reason is not None or second.reason is not None:
        return first.reason or second.reason
    if first.ids != second.ids or first.clusters != second.clusters:
        return "the two have scores of different units"
    if first.gold is not None and not np.array_equal(first.gold, second.gold if second.gold is not None else []):
        return "the two have different gold scores"
    return None


def _title(key: Key) -> str:
    task, subset, split = key
    return task + (f" ({subset})" if subset != "default" else "") + (f" [{split}]" if split != "test" else "")


def _adjusted(rows: Sequence[DifferenceRow], level: float) -> Iterator[DifferenceRow]:
    adjusted = iter(statistics.holm([row.p for row in rows if row.p is not None]))
    tests = sum(row.p is not None for row in rows)
    for row in rows:
        p = next(adjusted) if row.p is not None else None
        verdict = _verdict(row, p, level)
        values = {**asdict(row), "p_adjusted": p, "verdict": verdict}
        yield DifferenceRow(**{**values, "sentence": _sentence(row, p, verdict, tests)})


def _verdict(row: DifferenceRow, p: float | None, level: float) -> str:
    if p is None or row.low is None or row.high is None:
        return "not tested"
    if p <= 1 - level and (row.low > 0 or row.high < 0):
        return "better" if row.difference > 0 else "worse"
    return "not separable"


def _sentence(row: DifferenceRow, p: float | None, verdict: str, tests: int) -> str:
    title = _title((row.task, row.subset, row.split))
    if p is None or row.low is None or row.high is None or row.p is None:
        return f"{row.model} and {row.baseline} on {title}: {row.difference:+.4f}, not tested ({row.reason})."
    word = {"better": "is better than", "worse": "is worse than", "not separable": "is not separable from"}[verdict]
    p_text = f"p = {_p(row.p)}" + (f", {_p(p)} after Holm's adjustment for {tests} tests" if tests > 1 else "")
    numbers = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}], {p_text}"
    return f"{row.model} {word} {row.baseline} on {title}: {numbers}."


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00005 else f"{value:.1e}"
