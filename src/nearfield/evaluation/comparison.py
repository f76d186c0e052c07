"""Comparisons in tables whose rows end in one verdict and one plain sentence.

Models are compared by the scores of single units (:func:`compare`), ways to train by runs of the same seeds
(:func:`compare_methods`), and a model is set beside published scores, which have no units (:func:`compare_published`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nearfield.errors import BadInputError
from nearfield.evaluation import statistics
from nearfield.evaluation.results import UNITS_SUFFIX, read_published, read_scores
from nearfield.evaluation.scores import (
    Contrast,
    Effect,
    Key,
    ScoreNotice,
    TaskScores,
    joint_replicates,
    not_paired,
    score_interval,
    score_notices,
    title_of,
)
from nearfield.evaluation.statistics import Floats, Interval
from nearfield.files import read_json
from nearfield.provenance import generator

VERSION = 2
_WORDS = {"better": "is better than", "worse": "is worse than", "not separable": "is not separable from"}


@dataclass(frozen=True)
class TaskRow:
    """The head of a row: a subset and split of a task, and its main score."""

    task: str
    subset: str
    split: str
    metric: str

    @property
    def title(self) -> str:
        """The task in words."""
        return title_of((self.task, self.subset, self.split))


def verdict(difference: float, low: float, high: float, p_adjusted: float, level: float) -> str:
    """Better, worse, or not separable: the adjusted test and the interval must both say that there is a difference."""
    if p_adjusted <= 1 - level and (low > 0 or high < 0):
        return "better" if difference > 0 else "worse"
    return "not separable"


def check_settings(samples: int, permutations: int, level: float) -> None:
    """Raise :class:`BadInputError` for too few resamples or permutations, or a level that is none."""
    for name, value in (("samples", samples), ("permutations", permutations)):
        if value < 100:
            raise BadInputError(f"{name} must be at least 100; it is {value}", where=name)
    if not 0.5 <= level < 1:
        raise BadInputError(f"the level must be from 0.5 to below 1; it is {level}", where="level")


def _baseline(labels: Sequence[str], baseline: str | None, what: str) -> str:
    """The label that all others are compared with: the first, if none is named."""
    if len(labels) < 2:
        raise BadInputError(f"a comparison needs two {what} or more", where="compare")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise BadInputError(f"two of the {what} bear the label {twice!r}", hint="Give them different --labels.")
    if baseline is not None and baseline not in labels:
        raise BadInputError(
            f"the baseline {baseline!r} is not among the {what}", hint=f"{what.capitalize()}: {', '.join(labels)}."
        )
    return labels[0] if baseline is None else baseline


def _json_row(row: ScoreRow | DifferenceRow | PublishedRow) -> dict[str, Any]:
    """A row for JSON, which has no NaN: an undefined score is null, and the row's ``reason`` says why."""
    return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(row).items()}


def _undefined(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**row, name: float("nan") if row[name] is None else row[name]}


# Models


@dataclass(frozen=True)
class ModelRow:
    """A compared model: the label in the table, and where its results are."""

    label: str
    name: str
    revision: str
    path: str


@dataclass(frozen=True)
class ScoreRow(TaskRow):
    """A model's score on a subset and split of a task; ``low`` and ``high`` are null where ``reason`` says why."""

    model: str
    score: float
    low: float | None
    high: float | None
    units: int | None
    clusters: int | None
    reason: str | None
    scope: str | None = None
    """The quantity that the interval is about."""
    type: str | None = None
    """The task's type as mteb names it."""
    resampled: str | None = None
    """The parts of the error: so many units, in clusters or with what they share."""
    caution: str | None = None
    """Why the interval may not hold for scores of this shape."""


@dataclass(frozen=True)
class DifferenceRow(TaskRow):
    """A model against the baseline on the same units. ``verdict``: better, worse, not separable, or not tested.

    ``effect`` is the difference in standard deviations of the units' differences; ``won``, ``even`` and ``lost`` count
    units. ``p_equivalent`` (adjusted by Holm) and ``equivalent`` are of the test for equivalence within the margin.
    """

    model: str
    baseline: str
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    units: int | None = None
    clusters: int | None = None
    verdict: str = "not tested"
    sentence: str = ""
    reason: str | None = None
    effect: float | None = None
    won: int | None = None
    even: int | None = None
    lost: int | None = None
    p_equivalent: float | None = None
    equivalent: bool | None = None
    resampled: str | None = None
    caution: str | None = None


@dataclass(frozen=True)
class _Options:
    samples: int
    permutations: int
    level: float
    seed: int
    margin: float | None


@dataclass(frozen=True)
class ModelComparison:
    """Scores with intervals, and differences to the baseline with paired tests."""

    models: tuple[ModelRow, ...]
    baseline: str
    scores: tuple[ScoreRow, ...]
    differences: tuple[DifferenceRow, ...]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    notices: tuple[ScoreNotice, ...] = ()
    """Notices for readers of the scores."""

    def to_json(self) -> dict[str, Any]:
        """The content of ``comparison.json``: only JSON types."""
        return {
            "version": VERSION,
            "baseline": self.baseline,
            "settings": self.settings,
            "models": [asdict(row) for row in self.models],
            "scores": [_json_row(row) for row in self.scores],
            "differences": [_json_row(row) for row in self.differences],
            "notes": list(self.notes),
            "notices": [asdict(notice) for notice in self.notices],
        }

    @classmethod
    def from_json(cls, path: Path) -> ModelComparison:
        """Read a ``comparison.json``."""
        value = read_json(path, "comparison")
        try:
            return cls(
                models=tuple(ModelRow(**row) for row in value["models"]),
                baseline=value["baseline"],
                scores=tuple(ScoreRow(**_undefined(row, "score")) for row in value["scores"]),
                differences=tuple(DifferenceRow(**_undefined(row, "difference")) for row in value["differences"]),
                notes=tuple(value["notes"]),
                settings=value["settings"],
                notices=tuple(
                    ScoreNotice(**{**notice, "tasks": tuple(notice["tasks"])}) for notice in value.get("notices", ())
                ),
            )
        except (KeyError, TypeError) as error:
            raise BadInputError(f"this is no comparison of version {VERSION} ({error})", where=str(path)) from error


def compare(
    models: Sequence[Path] | Sequence[ModelRow],
    *,
    baseline: str | None = None,
    tasks: Sequence[str] | None = None,
    samples: int = 10_000,
    permutations: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    margin: float | None = None,
) -> ModelComparison:
    """Compare two or more results folders (``<org>__<model>/<revision>``) on the tasks that they share.

    ``models`` are the folders, or what :func:`label_results` makes of them, with labels of your own. ``baseline`` is a label (the first by default); every other model is tested against it. ``samples`` bootstrap
    resamples give the central ``level`` of each score and difference, ``permutations`` the p-values, which are
    Holm-adjusted over all tests of the comparison. ``margin`` (0.005 is half a point) asks for a test of equivalence
    within it as well. The same inputs and ``seed`` give the same numbers.
    """
    check_settings(samples, permutations, level)
    if margin is not None and not 0 < margin < 1:
        raise BadInputError(f"the margin must be between 0 and 100 points; it is {100 * margin:g}", where="margin")
    options = _Options(samples, permutations, level, seed, margin)
    folders = [model for model in models if not isinstance(model, ModelRow)]
    opened = label_results(folders) if folders else [model for model in models if isinstance(model, ModelRow)]
    names = [model.label for model in opened]
    base = _baseline(names, baseline, "models")
    read = {model.label: read_scores(Path(model.path)) for model in opened}
    keys, notes = _shared(read, names, tasks)
    rows: list[ScoreRow] = []
    differences: list[DifferenceRow] = []
    for key in keys:
        of_key = {name: read[name][key] for name in names if key in read[name]}
        replicates = dict(joint_replicates(key, of_key, samples, seed))
        for name, of in of_key.items():
            rows.append(_score_row(key, name, of, of.interval(replicates[name], level) if name in replicates else None))
            if base in of_key and name != base:
                differences.append(_difference(key, name, of, base, of_key[base], replicates, options))
    judged = tuple(_said(_judged(differences, level), options))
    return ModelComparison(
        tuple(opened), base, tuple(rows), judged, tuple(notes), asdict(options), score_notices(read, keys)
    )


def label_results(results: Sequence[Path], labels: Sequence[str] | None = None) -> list[ModelRow]:
    """The models of results folders, with the labels that tell them apart: those given, else names and revisions."""
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
        rows = [replace(row, label=f"{row.name}@{row.revision[:8]}") for row in rows]
    twice = next((row.label for row in rows if [r.label for r in rows].count(row.label) > 1), None)
    if twice is not None:
        raise BadInputError(f"two of the models bear the label {twice!r}", hint="Give them different labels.")
    return rows


def _shared(
    read: dict[str, dict[Key, TaskScores]], names: Sequence[str], tasks: Sequence[str] | None
) -> tuple[list[Key], list[str]]:
    """The keys that two models or more have, and notes on the models that lack one."""
    keys = chosen_keys(read, tasks)
    notes = []
    for key in keys:
        without = [name for name in names if key not in read[name]]
        if without:
            notes.append(f"{title_of(key)}: no result of {', '.join(without)}")
    shared = [key for key in keys if sum(key in read[name] for name in names) >= 2]
    if not shared:
        raise BadInputError("the models share no task", hint="Score them on the same suite.")
    return shared, notes


def chosen_keys(read: Mapping[str, Mapping[Key, TaskScores]], tasks: Sequence[str] | None) -> list[Key]:
    """All keys of some models' scores, in order, of the named tasks if there are names."""
    keys = sorted({key for scores in read.values() for key in scores})
    known = list(dict.fromkeys(task for task, _, _ in keys))
    for task in tasks or ():
        if task not in known:
            raise BadInputError(f"no model has results on {task!r}", hint=f"Tasks: {', '.join(known)}.")
    return keys if tasks is None else [key for key in keys if key[0] in set(tasks)]


def _score_row(key: Key, name: str, of: TaskScores, interval: Interval | None) -> ScoreRow:
    low, high, scope = (None, None, None) if interval is None else (interval.low, interval.high, of.estimator.scope)
    units, clusters = of.sizes
    kind = of.task_type or None
    more = (of.reason, scope, kind, of.resampled, of.caution)
    return ScoreRow(*key, of.metric, name, of.score, low, high, units, clusters, *more)


def _difference(
    key: Key,
    name: str,
    of: TaskScores,
    base: str,
    reference: TaskScores,
    replicates: Mapping[str, Floats],
    options: _Options,
) -> DifferenceRow:
    reason = not_paired(reference, of)
    difference = of.score - reference.score
    row = DifferenceRow(*key, of.metric, name, base, difference, reason=reason)
    if reason is not None:
        return row
    contrast = Contrast(of, reference, replicates[name] - replicates[base])
    interval = contrast.interval(options.level)
    rng = generator(options.seed, "permutation", *key)
    effect = Effect.of(of, reference)
    units, clusters = of.sizes
    return replace(
        row,
        low=interval.low,
        high=interval.high,
        p=contrast.p(options.permutations, rng),
        units=units,
        clusters=clusters,
        effect=effect.size,
        won=effect.won,
        even=effect.even,
        lost=effect.lost,
        p_equivalent=None if options.margin is None else contrast.equivalence_p(options.margin),
        resampled=of.resampled,
        caution=of.caution or reference.caution,
    )


Tested = TypeVar("Tested", "DifferenceRow", "MethodRow")


def _judged(rows: Sequence[Tested], level: float) -> list[Tested]:
    """The rows with p-values adjusted over all of them, and verdicts where there was a test."""
    adjusted = iter(statistics.holm([row.p for row in rows if row.p is not None]))
    judged = []
    for row in rows:
        if row.p is not None and row.low is not None and row.high is not None:
            p = next(adjusted)
            row = replace(row, p_adjusted=p, verdict=verdict(row.difference, row.low, row.high, p, level))
        judged.append(row)
    return judged


def _said(rows: Sequence[DifferenceRow], options: _Options) -> Iterator[DifferenceRow]:
    """Judged rows with the verdict on equivalence, and sentences."""
    equal = iter(statistics.holm([row.p_equivalent for row in rows if row.p_equivalent is not None]))
    tests = sum(row.p is not None for row in rows)
    for row in rows:
        if row.p_equivalent is not None:
            p = next(equal)
            row = replace(row, p_equivalent=p, equivalent=p <= 1 - options.level)
        yield replace(row, sentence=_sentence(row, tests, options.margin))


def _sentence(row: DifferenceRow, tests: int, margin: float | None) -> str:
    if row.p is None or row.p_adjusted is None:
        difference = "no difference" if np.isnan(row.difference) else f"{row.difference:+.4f}"
        return f"{row.model} and {row.baseline} on {row.title}: {difference}, not tested ({row.reason})."
    p_text = f"p = {_p(row.p)}"
    if tests > 1:
        p_text += f", {_p(row.p_adjusted)} after Holm's adjustment for {tests} tests"
    numbers = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}], {p_text}"
    said = f"{row.model} {_WORDS[row.verdict]} {row.baseline} on {row.title}: {numbers}."
    if margin is None or row.p_equivalent is None:
        return said
    points = f"{100 * margin:g} points"
    if row.equivalent:
        return f"{said} The two are equivalent within {points} (p = {_p(row.p_equivalent)})."
    return f"{said} Equivalence within {points} is not shown (p = {_p(row.p_equivalent)})."


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00005 else f"{value:.1e}"


# Ways to train

SEEDS = 5
"""A verdict over methods needs at least this many seeds: an interval over three covers far less than it says."""
MEAN_OVER_TASKS: Key = ("mean over tasks", "default", "test")


@dataclass(frozen=True)
class Method:
    """A way to train: a label, and the results folder of its run for each seed."""

    label: str
    runs: Mapping[int, Path]


@dataclass(frozen=True)
class MethodRow(TaskRow):
    """A method against the baseline on a task, seed by seed.

    ``verdict`` is better, worse, not separable, or too few seeds; then the interval and p are null. ``detects`` is the true
    difference that is found in 80 % of such comparisons.
    """

    method: str
    baseline: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    baseline_scores: tuple[float, ...]
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    detects: float | None = None
    verdict: str = "too few seeds"
    sentence: str = ""

    @property
    def differences(self) -> list[float]:
        """The method minus the baseline, for each seed."""
        return [ours - theirs for ours, theirs in zip(self.scores, self.baseline_scores, strict=True)]


@dataclass(frozen=True)
class MethodComparison:
    """Differences between methods; ``notes`` tells what was left out."""

    baseline: str
    methods: tuple[str, ...]
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of ``--json``."""
        return {"version": 1, "kind": "methods", **asdict(self)}


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
    labels = [method.label for method in methods]
    base = _baseline(labels, baseline, "methods")
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
        rows += _method_rows(label, base, seeds, read, tasks, level)
    shown = {(row.task, row.subset, row.split) for row in rows}
    for label, runs in read.items():
        said = [notice for seed, of in runs.items() for notice in score_notices({label: of}, sorted(shown & set(of)))]
        notes += dict.fromkeys(notice.sentence for notice in said)
    judged = tuple(replace(row, sentence=_method_sentence(row)) for row in _judged(rows, level))
    return MethodComparison(base, tuple(labels), judged, tuple(notes), {"level": level})


def _method_rows(
    label: str,
    base: str,
    seeds: Sequence[int],
    read: Mapping[str, Mapping[int, Mapping[Key, TaskScores]]],
    tasks: Sequence[str] | None,
    level: float,
) -> Iterator[MethodRow]:
    """A row for each task that all runs have on the same data, and one of the mean over several tasks."""
    ours, theirs = ([read[name][seed] for seed in seeds] for name in (label, base))
    keys = sorted(set.intersection(*(set(run) for run in (*ours, *theirs))))
    if tasks is not None:
        keys = [key for key in keys if key[0] in set(tasks)]
    keys = [key for key in keys if len({run[key].data_revision for run in (*ours, *theirs)}) == 1]
    if not keys:
        raise BadInputError(f"{label} and {base} share no task on the same data", hint="Score both on the same suite.")
    compared = [(key, ours[0][key].metric, _scores(ours, key), _scores(theirs, key)) for key in keys]
    if len({key[0] for key in keys}) > 1:
        means = [[_mean_over_tasks(run, keys) for run in side] for side in (ours, theirs)]
        compared.append((MEAN_OVER_TASKS, "main scores", means[0], means[1]))
    for key, metric, us, them in compared:
        difference = float(np.mean(us) - np.mean(them))
        row = MethodRow(*key, metric, label, base, tuple(seeds), tuple(us), tuple(them), difference)
        if len(seeds) >= SEEDS:
            low, high, p = statistics.paired_interval(row.differences, level)
            detects = statistics.detectable(row.differences, level)
            row = replace(row, low=low, high=high, p=p, detects=detects)
        yield row


def _scores(runs: Sequence[Mapping[Key, TaskScores]], key: Key) -> list[float]:
    return [run[key].score for run in runs]


def _mean_over_tasks(scores: Mapping[Key, TaskScores], keys: Sequence[Key]) -> float:
    by_task: dict[str, list[float]] = {}
    for key in keys:
        by_task.setdefault(key[0], []).append(scores[key].score)
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def _method_sentence(row: MethodRow) -> str:
    if row.p_adjusted is None:
        points = ", ".join(f"{d:+.4f} (seed {seed})" for d, seed in zip(row.differences, row.seeds, strict=True))
        return (
            f"The method {row.method} minus {row.baseline} on {row.title}: {points}. "
            f"No verdict: {len(row.seeds)} seeds, and {SEEDS} are needed."
        )
    return (
        f"The method {row.method} {_WORDS[row.verdict]} {row.baseline} on {row.title}, over {len(row.seeds)} trainings each: "
        f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}], p = {row.p_adjusted:.4f} after Holm's adjustment. "
        f"It speaks of other seeds on these queries; a true difference of {row.detects:.4f} is found in 80 % of such comparisons."
    )


# Published scores

CAVEAT = (
    "Published results have no scores of single queries, so nothing is paired: the intervals hold the uncertainty of ours "
    "only, and a published score outside of one is a hint, no test."
)
REPOSITORY = "mteb"


@dataclass(frozen=True)
class PublishedRow(TaskRow):
    """A score of ours beside a published one. ``position`` is above, below, inside (our interval) or no interval."""

    model: str
    score: float
    low: float | None
    high: float | None
    published_model: str
    published: float
    published_revision: str
    data_revision: str
    position: str
    sentence: str


@dataclass(frozen=True)
class Standing:
    """Rows for each task and published model, ours in its place among theirs for each task, and what to keep in mind."""

    model: str
    rows: tuple[PublishedRow, ...]
    places: dict[str, tuple[int, int]]
    """Task title -> (place of ours among all, number of all)."""
    notes: tuple[str, ...] = (CAVEAT,)

    def to_json(self) -> dict[str, Any]:
        """The content of ``--json``."""
        return {"version": 1, "kind": "published", **asdict(self), "rows": [_json_row(row) for row in self.rows]}


def published_folder(name: str) -> Path:
    """The folder of published results: a folder, or ``mteb`` for mteb's results repository, fetched if reachable."""
    if Path(name).is_dir():
        return Path(name)
    if name != REPOSITORY:
        raise BadInputError(
            "this folder of results does not exist",
            where=name,
            hint="Give a folder of mteb's result files, or 'mteb' for its results repository.",
        )
    from mteb.cache import ResultCache

    try:
        return Path(ResultCache().download_from_remote())
    except Exception as error:
        raise BadInputError(
            f"mteb's results repository cannot be reached ({str(error).splitlines()[0][:200]})",
            where="--against",
            hint="Clone https://github.com/embeddings-benchmark/results where there is a network, and name that folder.",
        ) from error


def compare_published(
    results: Path, against: Path, *, label: str | None = None, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Standing:
    """Set the scores of a results folder beside those published below ``against``, task by task."""
    (model,) = label_results([results], None if label is None else [label])
    ours = read_scores(results)
    theirs = read_published(against, ours)
    resolved = results.resolve()
    if not theirs:
        raise BadInputError("there are no results of these tasks", where=str(against), hint="Name mteb's result files.")
    rows: list[PublishedRow] = []
    places: dict[str, tuple[int, int]] = {}
    for key, of in sorted(ours.items()):
        interval = score_interval(key, of, samples, level, seed)
        known = {name: scores[key] for name, scores in theirs.items() if key in scores}
        if resolved.is_relative_to(against.resolve()):
            known.pop(f"{model.name}@{resolved.name[:8]}", None)
        for name, (score, revision) in sorted(known.items(), key=lambda item: -item[1][0]):
            rows.append(_published_row(key, of, model.label, interval, name, score, revision))
        if known:
            places[title_of(key)] = (1 + sum(score > of.score for score, _ in known.values()), len(known) + 1)
    notes = [CAVEAT]
    if any(row.published_revision != row.data_revision for row in rows):
        notes.append("Some of the published scores are of another revision of the data than ours.")
    notes += [notice.sentence for notice in score_notices({model.label: ours}, sorted(ours))]
    return Standing(model.label, tuple(rows), places, tuple(notes))


def _published_row(
    key: Key, of: TaskScores, label: str, interval: Interval | None, name: str, score: float, revision: str
) -> PublishedRow:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    if low is None or high is None:
        position, where = "no interval", f"ours has no interval ({of.reason})"
    else:
        position, side = ("above", "below") if score < low else ("below", "above") if score > high else ("inside",) * 2
        where = f"{side} our interval [{low:.4f}, {high:.4f}]"
    sentence = f"{label} on {title_of(key)}: {of.score:.4f}; {name} published {score:.4f}, {where}."
    return PublishedRow(
        *key, of.metric, label, of.score, low, high, name, score, revision, of.data_revision, position, sentence
    )
