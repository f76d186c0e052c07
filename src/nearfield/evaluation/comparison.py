"""Compare models by the scores of single units: intervals, paired tests and one plain sentence for each pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nearfield.errors import BadInputError
from nearfield.evaluation import scores, statistics
from nearfield.evaluation.config import UNITS_SUFFIX
from nearfield.evaluation.noticed import ScoreNotice, score_notices
from nearfield.evaluation.scores import Key, TaskScores
from nearfield.evaluation.statistics import Floats, Interval
from nearfield.files import read_json
from nearfield.randomness import generator

VERSION = 2


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
    scope: str | None = None
    """What the interval speaks of."""
    type: str | None = None
    """The task's type as mteb names it."""


@dataclass(frozen=True)
class DifferenceRow:
    """A model against the baseline on the same units. ``verdict``: better, worse, not separable, or not tested.

    ``effect`` is the difference in standard deviations of the units' differences; ``won``, ``even`` and ``lost`` count
    units. ``p_equivalent`` (adjusted by Holm) and ``equivalent`` are of the test for equivalence within the margin.
    """

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
    effect: float | None = None
    won: int | None = None
    even: int | None = None
    lost: int | None = None
    p_equivalent: float | None = None
    equivalent: bool | None = None


@dataclass(frozen=True)
class _Options:
    samples: int
    permutations: int
    level: float
    seed: int
    margin: float | None


@dataclass(frozen=True)
class Comparison:
    """Scores with intervals, and differences to the baseline with paired tests."""

    models: tuple[ModelRow, ...]
    baseline: str
    scores: tuple[ScoreRow, ...]
    differences: tuple[DifferenceRow, ...]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    notices: tuple[ScoreNotice, ...] = ()
    """What a reader of the scores must know."""

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
            "notices": [asdict(notice) for notice in self.notices],
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
                notices=tuple(
                    ScoreNotice(**{**notice, "tasks": tuple(notice["tasks"])}) for notice in value.get("notices", ())
                ),
            )
        except (KeyError, TypeError) as error:
            raise BadInputError(f"this is no comparison of version {VERSION} ({error})", where=str(path)) from error


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
    margin: float | None = None,
) -> Comparison:
    """Compare two or more results folders (``<org>__<model>/<revision>``) on the tasks that they share.

    ``baseline`` is a label (the first by default); every other model is tested against it. ``samples`` bootstrap
    resamples give the central ``level`` of each score and difference, ``permutations`` the p-values, which are
    Holm-adjusted over all tests of the comparison. ``margin`` (0.005 is half a point) asks for a test of equivalence
    within it as well. The same inputs and ``seed`` give the same numbers.
    """
    if len(results) < 2:
        raise BadInputError("a comparison needs two models or more", where="compare")
    check_settings(samples, permutations, level)
    if margin is not None and not 0 < margin < 1:
        raise BadInputError(f"the margin must be between 0 and 100 points; it is {100 * margin:g}", where="margin")
    options = _Options(samples, permutations, level, seed, margin)
    models = open_models(results, labels)
    names = [model.label for model in models]
    base = names[0] if baseline is None else baseline
    if base not in names:
        raise BadInputError(f"the baseline {base!r} is not among the models", hint=f"Models: {', '.join(names)}.")
    read = {model.label: scores.read_scores(Path(model.path)) for model in models}
    keys, notes = _shared(read, names, tasks)
    rows: list[ScoreRow] = []
    raw: list[DifferenceRow] = []
    for key in keys:
        of_key = {name: read[name][key] for name in names if key in read[name]}
        task_scores, task_differences = _compare_task(key, of_key, base, options)
        rows += task_scores
        raw += task_differences
    return Comparison(
        tuple(models),
        base,
        tuple(rows),
        tuple(_adjusted(raw, options)),
        tuple(notes),
        asdict(options),
        score_notices(read, keys),
    )


def check_settings(samples: int, permutations: int, level: float) -> None:
    for name, value in (("samples", samples), ("permutations", permutations)):
        if value < 100:
            raise BadInputError(f"{name} must be at least 100; it is {value}", where=name)
    if not 0.5 <= level < 1:
        raise BadInputError(f"the level must be from 0.5 to below 1; it is {level}", where="level")


def open_models(results: Sequence[Path], labels: Sequence[str] | None) -> list[ModelRow]:
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


def _shared(
    read: dict[str, dict[Key, TaskScores]], names: Sequence[str], tasks: Sequence[str] | None
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
            notes.append(f"{title_of(key)}: no result of {', '.join(without)}")
    shared = [key for key in keys if sum(key in read[name] for name in names) >= 2]
    if not shared:
        raise BadInputError("the models share no task", hint="Score them on the same suite.")
    return shared, notes


def _compare_task(
    key: Key, found: dict[str, TaskScores], base: str, options: _Options
) -> tuple[list[ScoreRow], list[DifferenceRow]]:
    task, subset, split = key
    resamples = dict(drawn_scores(key, found, options.samples, options.seed))
    rows, differences = [], []
    for name, of in found.items():
        interval = None
        if name in resamples:
            own = scores.score_draws(of, resamples[name])
            interval = statistics.percentile_interval(own, options.level, of.freedom)
        units, clusters = of.sizes
        low, high = _ends(interval)
        scope = None if interval is None else scores.SCOPES[of.kind]
        rows.append(
            ScoreRow(
                task,
                subset,
                split,
                of.metric,
                name,
                of.score,
                low,
                high,
                units,
                clusters,
                of.reason,
                scope,
                of.task_type or None,
            )
        )
    if base not in found:
        return rows, []
    for name, of in found.items():
        if name != base:
            differences.append(_difference(key, name, of, base, found[base], resamples, options))
    return rows, differences


def _difference(
    key: Key,
    name: str,
    of: TaskScores,
    base: str,
    reference: TaskScores,
    resamples: Mapping[str, Floats],
    options: _Options,
) -> DifferenceRow:
    reason = scores.not_paired(reference, of)
    row = DifferenceRow(
        *key,
        metric=of.metric,
        model=name,
        baseline=base,
        difference=of.score - reference.score,
        low=None,
        high=None,
        p=None,
        p_adjusted=None,
        units=None,
        clusters=None,
        verdict="",
        sentence="",
        reason=reason,
    )
    if reason is not None:
        return row
    drawn, freedom = scores.difference_draws(of, reference, resamples[name] - resamples[base])
    interval = statistics.percentile_interval(drawn, options.level, freedom)
    units, clusters = of.sizes
    size = scores.effect(of, reference)
    outside = None
    if options.margin is not None:
        outside = statistics.equivalence_p(drawn, options.margin)
    return replace(
        row,
        low=interval.low,
        high=interval.high,
        p=scores.p_value(of, reference, options.permutations, generator(options.seed, "permutation", *key)),
        units=units,
        clusters=clusters,
        effect=size.size,
        won=size.won,
        even=size.even,
        lost=size.lost,
        p_equivalent=outside,
    )


def drawn_scores(key: Key, found: Mapping[str, TaskScores], samples: int, seed: int) -> Iterator[tuple[str, Floats]]:
    """Draws around the score of each model with units; models with the same units share every resample."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, of in found.items():
        if of.reason is None:
            groups.setdefault(scores.same_units(of), []).append(name)
    for members in groups.values():
        drawn = scores.draws([found[name] for name in members], samples, generator(seed, "bootstrap", *key))
        for i, name in enumerate(members):
            yield name, drawn[:, i]


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def title_of(key: Key) -> str:
    task, subset, split = key
    return task + (f" ({subset})" if subset != "default" else "") + (f" [{split}]" if split != "test" else "")


def _adjusted(rows: Sequence[DifferenceRow], options: _Options) -> Iterator[DifferenceRow]:
    adjusted = iter(statistics.holm([row.p for row in rows if row.p is not None]))
    equal = iter(statistics.holm([row.p_equivalent for row in rows if row.p_equivalent is not None]))
    tests = sum(row.p is not None for row in rows)
    for row in rows:
        p = next(adjusted) if row.p is not None else None
        p_equal = next(equal) if row.p_equivalent is not None else None
        made = replace(
            row,
            p_adjusted=p,
            p_equivalent=p_equal,
            equivalent=None if p_equal is None else p_equal <= 1 - options.level,
            verdict=_verdict(row, p, options.level),
        )
        yield replace(made, sentence=_sentence(made, tests, options.margin))


def _verdict(row: DifferenceRow, p: float | None, level: float) -> str:
    if p is None or row.low is None or row.high is None:
        return "not tested"
    if p <= 1 - level and (row.low > 0 or row.high < 0):
        return "better" if row.difference > 0 else "worse"
    return "not separable"


_WORDS = {"better": "is better than", "worse": "is worse than", "not separable": "is not separable from"}


def _sentence(row: DifferenceRow, tests: int, margin: float | None) -> str:
    title = title_of((row.task, row.subset, row.split))
    if row.low is None or row.high is None or row.p is None or row.p_adjusted is None:
        return f"{row.model} and {row.baseline} on {title}: {row.difference:+.4f}, not tested ({row.reason})."
    p_text = f"p = {_p(row.p)}" + (
        f", {_p(row.p_adjusted)} after Holm's adjustment for {tests} tests" if tests > 1 else ""
    )
    numbers = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}], {p_text}"
    said = f"{row.model} {_WORDS[row.verdict]} {row.baseline} on {title}: {numbers}."
    if margin is None or row.p_equivalent is None:
        return said
    points = f"{100 * margin:g} points"
    if row.equivalent:
        return f"{said} The two are equivalent within {points} (p = {_p(row.p_equivalent)})."
    return f"{said} Equivalence within {points} is not shown (p = {_p(row.p_equivalent)})."


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00005 else f"{value:.1e}"
