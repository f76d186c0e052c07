"""Compare ways to train, not single models: paired differences between runs of the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from nearfield.errors import BadInputError
from nearfield.evaluation import statistics
from nearfield.evaluation.comparison import title_of
from nearfield.evaluation.noticed import score_notices
from nearfield.evaluation.scores import Key, TaskScores, read_scores

VERSION = 1
SEEDS = 5
"""A verdict over methods needs at least this many seeds: an interval over three covers far less than it says."""
MEAN: Key = ("mean over tasks", "default", "test")


@dataclass(frozen=True)
class Method:
    """A way to train: a label, and the results folder of its run for each seed."""

    label: str
    runs: Mapping[int, Path]


@dataclass(frozen=True)
class MethodRow:
    """A method against the baseline on a task, seed by seed.

    ``verdict`` is better, worse, not separable, or too few seeds; then the interval and p are null. ``detects`` is the true
    difference that is found in 80 % of such comparisons.
    """

    task: str
    subset: str
    split: str
    metric: str
    method: str
    baseline: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    baseline_scores: tuple[float, ...]
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    detects: float | None
    verdict: str
    sentence: str


@dataclass(frozen=True)
class MethodComparison:
    """Differences between methods; ``notes`` tells what was left out."""

    baseline: str
    methods: tuple[str, ...]
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {"version": VERSION, "kind": "methods", **asdict(self)}


def paired_interval(differences: Sequence[float], level: float) -> tuple[float, float, float]:
    """Student's t interval of the mean of paired differences and the two-sided p of zero: ``(low, high, p)``."""
    values = np.asarray(differences, dtype=np.float64)
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    if error <= 1e-15:
        return mean, mean, 1.0 if abs(mean) <= 1e-15 else 0.0
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))


def detectable(differences: Sequence[float], level: float = 0.95, power: float = 0.8) -> float:
    """The true mean difference that a paired t-test of so many pairs finds with ``power``, by the spread of these."""
    count = len(differences)
    bar = float(stats.t.ppf((1 + level) / 2, count - 1))

    def missing(shift: float) -> float:
        # That it is found with the wrong sign is as good as impossible at any power worth asking for.
        return float(stats.nct.sf(bar, count - 1, shift)) - power

    enough = 1.0
    while missing(enough) < 0:
        enough *= 2
    error = float(np.std(differences, ddof=1) / np.sqrt(count))
    return float(optimize.brentq(missing, 0.0, enough)) * error


def compare_methods(
    methods: Sequence[Method],
    *,
    baseline: str | None = None,
    tasks: Sequence[str] | None = None,
    level: float = 0.95,
) -> MethodComparison:
    """Compare methods by their runs: for each task, the differences between runs of the same seed.

    Seeds that both methods have are paired. From five of them on there is a t interval over the seeds and a verdict
    (p-values adjusted by Holm); with fewer only the differences are shown.
    """
    if len(methods) < 2:
        raise BadInputError("a comparison needs two methods or more", where="compare")
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise BadInputError("two of the methods bear the same label", hint="Give them different --labels.")
    base = labels[0] if baseline is None else baseline
    if base not in labels:
        raise BadInputError(f"the baseline {base!r} is not among the methods", hint=f"Methods: {', '.join(labels)}.")
    read = {m.label: {seed: read_scores(folder) for seed, folder in m.runs.items()} for m in methods}
    rows: list[MethodRow] = []
    notes: list[str] = []
    for label in labels:
        if label == base:
            continue
        seeds = sorted(set(read[label]) & set(read[base]))
        if not seeds:
            raise BadInputError(f"{label} and {base} have no seed in common", hint="Train both with the same seeds.")
        left = sorted(set(read[label]) ^ set(read[base]))
        if left:
            notes.append(f"seeds without a partner are left out: {', '.join(map(str, left))} ({label}, {base})")
        rows += _rows(label, base, seeds, read[label], read[base], tasks)
    shown = {(row.task, row.subset, row.split) for row in rows}
    for label, runs in read.items():
        said = [notice for seed, of in runs.items() for notice in score_notices({label: of}, sorted(shown & set(of)))]
        notes += dict.fromkeys(notice.sentence for notice in said)
    return MethodComparison(base, tuple(labels), tuple(_judged(rows, level)), tuple(notes), {"level": level})


def _rows(
    label: str,
    base: str,
    seeds: Sequence[int],
    ours: Mapping[int, Mapping[Key, TaskScores]],
    theirs: Mapping[int, Mapping[Key, TaskScores]],
    tasks: Sequence[str] | None,
) -> list[MethodRow]:
    keys = sorted(set.intersection(*(set(of[seed]) for of in (ours, theirs) for seed in seeds)))
    if tasks is not None:
        keys = [key for key in keys if key[0] in set(tasks)]
    keys = [key for key in keys if len({of[seed][key].data_revision for of in (ours, theirs) for seed in seeds}) == 1]
    if not keys:
        raise BadInputError(f"{label} and {base} share no task on the same data", hint="Score both on the same suite.")
    found = [
        _row(
            key,
            ours[seeds[0]][key].metric,
            label,
            base,
            seeds,
            *([of[s][key].score for s in seeds] for of in (ours, theirs)),
        )
        for key in keys
    ]
    if len({key[0] for key in keys}) > 1:
        means = ([_mean_over_tasks(of[seed], keys) for seed in seeds] for of in (ours, theirs))
        found.append(_row(MEAN, "main scores", label, base, seeds, *means))
    return found


def _mean_over_tasks(scores: Mapping[Key, TaskScores], keys: Sequence[Key]) -> float:
    by_task: dict[str, list[float]] = {}
    for key in keys:
        by_task.setdefault(key[0], []).append(scores[key].score)
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def _row(
    key: Key, metric: str, label: str, base: str, seeds: Sequence[int], ours: list[float], theirs: list[float]
) -> MethodRow:
    difference = float(np.mean(ours) - np.mean(theirs))
    return MethodRow(
        *key,
        metric,
        label,
        base,
        tuple(seeds),
        tuple(ours),
        tuple(theirs),
        difference,
        None,
        None,
        None,
        None,
        None,
        "",
        "",
    )


def _judged(rows: Sequence[MethodRow], level: float) -> list[MethodRow]:
    tested = []
    for row in rows:
        if len(row.seeds) >= SEEDS:
            pairs = zip(row.scores, row.baseline_scores, strict=True)
            differences = [ours - theirs for ours, theirs in pairs]
            low, high, p = paired_interval(differences, level)
            row = replace(row, low=low, high=high, p=p, detects=detectable(differences, level))
        tested.append(row)
    adjusted = iter(statistics.holm([row.p for row in tested if row.p is not None]))
    judged = []
    for row in tested:
        row = replace(row, p_adjusted=next(adjusted) if row.p is not None else None)
        row = replace(row, verdict=_verdict(row, level))
        judged.append(replace(row, sentence=_sentence(row)))
    return judged


def _verdict(row: MethodRow, level: float) -> str:
    if row.p_adjusted is None or row.low is None or row.high is None:
        return "too few seeds"
    if row.p_adjusted <= 1 - level and (row.low > 0 or row.high < 0):
        return "better" if row.difference > 0 else "worse"
    return "not separable"


def _sentence(row: MethodRow) -> str:
    title = row.task if (row.task, row.subset, row.split) == MEAN else title_of((row.task, row.subset, row.split))
    if row.low is None or row.high is None or row.p_adjusted is None:
        pairs = zip(row.seeds, row.scores, row.baseline_scores, strict=True)
        points = ", ".join(f"{ours - theirs:+.4f} (seed {seed})" for seed, ours, theirs in pairs)
        return (
            f"The method {row.method} minus {row.baseline} on {title}: {points}. "
            f"No verdict: {len(row.seeds)} seeds, and {SEEDS} are needed."
        )
    word = {"better": "is better than", "worse": "is worse than", "not separable": "is not separable from"}[row.verdict]
    return (
        f"The method {row.method} {word} {row.baseline} on {title}, over {len(row.seeds)} trainings each: "
        f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}], p = {row.p_adjusted:.4f} after Holm's adjustment. "
        f"It speaks of other seeds on these queries; a true difference of {row.detects:.4f} is found in 80 % of such comparisons."
    )
