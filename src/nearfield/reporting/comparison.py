"""Before and after: ``comparison.json`` as tables, sentences and plots, and the scores of vectors that were cut."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from markupsafe import Markup

from nearfield.evaluation.scores import MARK, tasks_in_words
from nearfield.reporting import text
from nearfield.reporting.page import Finding, WordTable
from nearfield.reporting.svg import Figure, LineChart, Series, Whisker, interval_plot, line_figure
from nearfield.reporting.text import AbsentError, Json, listing, load_object, mapping, real, string

STYLES = {"before": "s2", "after": "s1"}
FOREST = 60
"""Rows of the plot of all differences, at most."""
VERDICTS = 3
"""Sentences below the page's heading, at most."""
PLOTS = 12
"""Tasks that get an interval plot of their own; a suite with more shows the tables only."""


@dataclass(frozen=True)
class TaskSection:
    """One task (and subset): scores, differences (shaded by what they say), their sentences, and a plot."""

    name: str
    about: str
    tables: list[WordTable]
    sentences: list[Finding]
    notes: list[str]
    plot: Markup


@dataclass(frozen=True)
class ComparisonSection:
    """The section; ``verdict`` stands below the page's heading as well, ``raw`` is what the page's JSON holds.

    ``forest`` shows the differences of one model on all tasks, where there are several.
    """

    confidence: str
    models: WordTable
    tasks: list[TaskSection]
    verdict: list[Finding]
    notes: list[str]
    notices: list[str]
    forest: Markup
    raw: object
    suite: list[SuiteTable]
    truncation: list[Figure]
    """Scores by the dimensions that are kept, where some were cut."""
    kind: ClassVar[str] = "comparison"


def metric_words(metric: str) -> str:
    """``ndcg_at_10`` as ``nDCG@10``; other names with spaces for underscores."""
    words = re.sub(r"_at_(\d+)$", r"@\1", metric).replace("_", " ")
    return re.sub(r"^(ndcg|map|mrr)\b", lambda match: {"ndcg": "nDCG", "map": "MAP", "mrr": "MRR"}[match[1]], words)


def build_comparison(run: Path) -> ComparisonSection:
    """The section of a run folder."""
    made = load_object(
        run / "comparison.json", "No comparison.json: the run was not evaluated, or has not come to that yet."
    )
    scores = sorted((mapping(row) for row in listing(made.get("scores"))), key=_place)
    differences = sorted((mapping(row) for row in listing(made.get("differences"))), key=_place)
    keys = list(dict.fromkeys(_key(row) for row in scores))
    if not keys:
        raise AbsentError("comparison.json holds no score.")
    baseline = string(made.get("baseline")) or "the baseline"
    level = real(mapping(made.get("settings")).get("level")) or 0.95
    noticed = [mapping(row) for row in listing(made.get("notices"))]
    marked = {(string(row.get("model")) or "?", str(task)) for row in noticed for task in listing(row.get("tasks"))}
    tasks = [
        _task(
            number,
            key,
            baseline,
            [row for row in scores if _key(row) == key],
            [row for row in differences if _key(row) == key],
            plotted=len(keys) <= PLOTS,
            marked={model for model, task in marked if task == key[0]},
        )
        for number, key in enumerate(keys)
    ]
    models = [mapping(row) for row in listing(made.get("models"))]
    named = [[string(row.get(name)) or "–" for name in ("label", "name", "revision")] for row in models]
    paths = {string(row.get("label")) or "?": string(row.get("path")) for row in models}
    # A run that was moved keeps its results below itself; a path is only compared with what is there.
    there = {folder.parts[-2:]: folder for folder in sorted((run / "results").glob("*/*")) if folder.is_dir()}
    ends = {label: Path(path).parts[-2:] for label, path in paths.items() if path}
    folders = {label: there[end] for label, end in ends.items() if end in there}
    return ComparisonSection(
        confidence=f"{text.number(100 * level)} %",
        models=WordTable("Compared models", ["label", "model", "revision"], named, words=3),
        tasks=tasks,
        verdict=_verdict(differences),
        notes=[words for words in map(string, listing(made.get("notes"))) if words]
        + _method(mapping(made.get("settings"))),
        notices=[_notice(row) for row in noticed],
        forest=_forest(differences, baseline),
        raw={name: made.get(name) for name in ("baseline", "settings", "models", "scores", "differences")}
        | ({"notices": made["notices"]} if "notices" in made else {}),
        suite=suite_tables(scores, differences, marked),
        truncation=dimension_figures(run / "results", folders),
    )


def _notice(row: Json) -> str:
    """A notice of a model's scores in words."""
    tasks = [words for words in map(string, listing(row.get("tasks"))) if words]
    hint = string(row.get("hint"))
    return (
        f"{string(row.get('model')) or '?'} on {tasks_in_words(tasks, row.get('everywhere') is True)}: "
        f"{string(row.get('what')) or '?'}{f' {hint}' if hint else ''}"
    )


def _verdict(differences: Sequence[Json]) -> list[Finding]:
    """The findings on the trained model; on all models where none is called ``after``."""
    trained = [row for row in differences if row.get("model") == "after"]
    findings = [_finding(row) for row in trained or differences]
    return [finding for finding in findings if finding is not None][:VERDICTS]


def _forest(differences: Sequence[Json], baseline: str) -> Markup:
    """One row a task: the paired difference of the trained model (of the first one, where none is called ``after``)."""
    models = [string(row.get("model")) or "?" for row in differences]
    shown = "after" if "after" in models else next(iter(models), None)
    rows = []
    for row, model in zip(differences, models, strict=True):
        value, low, high = (real(row.get(name)) for name in ("difference", "low", "high"))
        if model == shown and value is not None and low is not None and high is not None:
            name = " ".join(part for part in _key(row)[:2] if part != "default")
            rows.append(Whisker(name, value, low, high, "s4" if _tone(row) == "even" else "s1"))
    if len(rows) < 2:
        return Markup("")
    described = "; ".join(f"{one.label} {text.signed(one.value)}" for one in rows[:FOREST]) + "."
    return interval_plot("forest", f"{shown} minus {baseline} on each task", rows[:FOREST], described, zero=True)


def _tone(row: Json) -> str:
    verdict = string(row.get("verdict"))
    return {"better": "better", "worse": "worse", "not separable": "even"}.get(verdict or "", "untested")


def _place(row: Json) -> int:
    """The base model comes first and the trained one second; the others keep their order."""
    return {"before": 0, "after": 1}.get(string(row.get("model")) or "", 2)


def _key(row: Json) -> tuple[str, str, str]:
    return string(row.get("task")) or "?", string(row.get("subset")) or "", string(row.get("split")) or ""


def _method(settings: Json) -> list[str]:
    samples, permutations = real(settings.get("samples")), real(settings.get("permutations"))
    if not samples or not permutations:
        return []
    return [
        f"Intervals are percentiles of {text.count(samples)} bootstrap resamples of whole clusters; p-values are of paired "
        f"permutation tests with {text.count(permutations)} permutations. Where units share content, both are of Student's t."
    ]


def _finding(row: Json) -> Finding | None:
    sentence = string(row.get("sentence"))
    verdict = string(row.get("verdict"))
    return Finding(sentence, verdict if verdict in ("better", "worse") else "even") if sentence else None


def _interval(row: Json, words: Callable[[float], str]) -> str:
    low, high = real(row.get("low")), real(row.get("high"))
    return "–" if low is None or high is None else f"{words(low)} to {words(high)}"


def _p(value: object) -> str:
    number = real(value)
    if number is None:
        return "–"
    return f"{number:.4f}" if number >= 0.00005 else text.number(number, 2)


def _task(
    number: int,
    key: tuple[str, str, str],
    baseline: str,
    scores: Sequence[Json],
    differences: Sequence[Json],
    *,
    plotted: bool,
    marked: Collection[str],
) -> TaskSection:
    name, subset, split = key
    labels = [string(row.get("model")) or "?" for row in scores]
    values = [real(row.get("score")) for row in scores]
    about = [metric_words(string(scores[0].get("metric")) or "")]
    about += [words for words, plain in ((subset, "default"), (split, "test")) if words and words != plain]
    units, clusters = real(scores[0].get("units")), real(scores[0].get("clusters"))
    resampled = string(scores[0].get("resampled"))
    if resampled:
        about.append(resampled)
    elif units:
        about.append(
            f"{text.count(units)} queries or items"
            + (f" in {text.count(clusters)} clusters" if clusters and clusters != units else "")
        )
    whiskers = [
        Whisker(label, value, real(row.get("low")), real(row.get("high")), STYLES.get(label, "s4"))
        for label, value, row in zip(labels, values, scores, strict=True)
        if value is not None
    ]
    described = "; ".join(f"{one.label} {text.score(one.value)}" for one in whiskers) + "."
    findings = [_finding(row) for row in differences]
    # An asterisk says that a notice speaks of the score.
    score_rows = [
        (
            label,
            ("–" if value is None else text.score(value)) + (MARK if label in marked else ""),
            _interval(row, text.score),
        )
        for label, value, row in zip(labels, values, scores, strict=True)
    ]
    difference_rows = [
        (
            string(row.get("model")) or "?",
            text.signed(real(row.get("difference")) or 0.0),
            _interval(row, text.signed),
            _p(row.get("p")),
            _p(row.get("p_adjusted")),
        )
        for row in differences
    ]
    heads = [f"against {baseline}", "difference", "interval", "p", "p, adjusted"]
    tones = [_tone(row) for row in differences]
    tables = [
        WordTable("Scores with their intervals", ["model", "score", "interval"], score_rows),
        WordTable("Paired differences; shaded rows are not separable", heads, difference_rows, tones=tones),
    ]
    reasons = dict.fromkeys(string(row.get("reason")) for row in [*scores, *differences])
    return TaskSection(
        name=name,
        about=" · ".join(part for part in about if part),
        tables=[table for table in tables if table.rows],
        sentences=[finding for finding in findings if finding is not None],
        notes=[f"No interval: {reason}." for reason in reasons if reason]
        + [
            f"{label}: {caution}."
            for label, row in zip(labels, scores, strict=True)
            if (caution := string(row.get("caution")))
        ],
        plot=interval_plot(f"scores-{number}", f"Scores on {name}", whiskers, described) if plotted else Markup(""),
    )


CUT = re.compile(r"^(?P<name>.+)-(?P<axes>dim|random|pca)(?P<dimensions>\d+)$")
AXES = {"dim": "first", "random": "random", "pca": "principal"}
"""The mark in the name of a model that was cut -> the dimensions that were kept."""
TYPES = 4
"""Task types that have a curve."""


@dataclass(frozen=True)
class Cell:
    """A score with its interval; ``tone`` is even (shaded: not separable from the baseline), apart, or nothing."""

    value: str
    interval: str
    tone: str


@dataclass(frozen=True)
class SuiteTable:
    """The tasks of one type: a row a task, a cell a model."""

    type: str
    models: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def suite_tables(
    scores: Sequence[Json], differences: Sequence[Json], marked: Collection[tuple[str, str]] = ()
) -> list[SuiteTable]:
    """A table a task type, in the order in which the types come; nothing for a single task.

    ``marked`` holds model and task of each score that a notice speaks of.
    """

    models = list(dict.fromkeys(string(row.get("model")) or "?" for row in scores))
    verdicts = {(_key(row), string(row.get("model"))): string(row.get("verdict")) for row in differences}
    types: dict[str, dict[tuple[str, str, str], dict[str, Cell]]] = defaultdict(lambda: defaultdict(dict))
    for row in scores:
        model, value = string(row.get("model")) or "?", real(row.get("score"))
        low, high = real(row.get("low")), real(row.get("high"))
        verdict = verdicts.get((_key(row), model))
        tone = "even" if verdict == "not separable" else "apart" if verdict in ("better", "worse") else ""
        interval = "" if low is None or high is None else f"{text.score(low)} to {text.score(high)}"
        mark = MARK if (model, _key(row)[0]) in marked else ""
        cell = Cell(("–" if value is None else text.score(value)) + mark, interval, tone)
        types[string(row.get("type")) or "Tasks"][_key(row)][model] = cell
    if sum(len(tasks) for tasks in types.values()) < 2:
        return []
    tables = []
    for kind, tasks in types.items():
        rows: list[tuple[str, list[Cell | None]]] = []
        for (task, subset, split), cells in tasks.items():
            more = [part for part, usual in ((subset, "default"), (split, "test")) if part and part != usual]
            rows.append((" ".join([task, *more]), [cells.get(model) for model in models]))
        tables.append(SuiteTable(kind, models, rows))
    return tables


def dimension_figures(results: Path, scored: Mapping[str, Path]) -> list[Figure]:
    """The mean score of each task type by the dimensions that are kept, of the trained model (else of the first one).

    ``scored`` is label -> the folder of whole vectors; cut ones lie beside it, in folders called ``MODEL-dimN``. Only tasks
    that all of them have count, so that no mean is over other tasks than its neighbour.
    """
    label = "after" if "after" in scored else next(iter(scored), None)
    read = None if label is None else scores_by_type(results, scored[label]).get("first")
    if read is None:
        return []
    dimensions, types = read
    series = [
        Series(f"{kind} ({of[0]})", of[1], f"s{i + 1}") for i, (kind, of) in enumerate(list(types.items())[:TYPES])
    ]
    title = f"Mean score of {label} by the first dimensions kept"
    chart = LineChart("dimensions", title, [float(d) for d in dimensions], series, "dimensions", log=True)
    return [line_figure(chart)]


ByType = dict[str, tuple[int, list[float]]]
"""Task type -> its number of tasks, and their mean score at each number of dimensions."""


def scores_by_type(results: Path, whole: Path) -> dict[str, tuple[list[int], ByType]]:
    """Dimensions kept (``first``, ``random``, ``principal``) -> how many, ascending, and the scores by task type.

    ``whole`` is the folder of a model's results; those of cut vectors lie in folders of ``results`` called ``MODEL-dimN``,
    ``MODEL-randomN`` and ``MODEL-pcaN``. Only tasks that all of them have count, so that no mean is over other tasks than its
    neighbour.
    """
    folders: dict[str, dict[int, Path]] = defaultdict(dict)
    for folder in sorted(results.glob("*")):
        match = CUT.match(folder.name)
        if match and match["name"] == whole.parent.name and (folder / whole.name).is_dir():
            folders[AXES[match["axes"]]][int(match["dimensions"])] = folder / whole.name
    full = _dimensions(whole)
    if full is None:
        return {}
    read = {axes: {n: _main_scores(f) for n, f in sorted({**of, full: whole}.items())} for axes, of in folders.items()}
    everything = [set(tasks) for of in read.values() for tasks in of.values()]
    shared = sorted(set.intersection(*everything)) if everything else []
    made = {}
    for axes, of in read.items():
        by_type: dict[str, list[str]] = defaultdict(list)
        for task in shared:
            by_type[of[full][task][0]].append(task)
        types = {
            kind: (len(tasks), [sum(scores[t][1] for t in tasks) / len(tasks) for scores in of.values()])
            for kind, tasks in by_type.items()
        }
        if types and len(of) > 1:
            made[axes] = (list(of), types)
    return made


def _dimensions(folder: Path) -> int | None:
    try:
        dimensions = real(load_object(folder / "model_meta.json", "no description").get("embed_dim"))
    except AbsentError:
        return None
    return int(dimensions) if dimensions else None


def _main_scores(folder: Path) -> dict[str, tuple[str, float]]:
    """Task -> its type and the mean of its main scores, from mteb's result files."""
    scores: dict[str, tuple[str, float]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            value = load_object(file, "gone")
        except AbsentError:
            continue
        main = [
            real(mapping(entry).get("main_score"))
            for split in mapping(value.get("scores")).values()
            for entry in listing(split)
        ]
        known = [score for score in main if score is not None and score == score]
        if known and len(known) == len(main):
            scores[file.stem] = (_type(folder, file.stem), sum(known) / len(known))
    return scores


def _type(folder: Path, task: str) -> str:
    """A task's type, from the file of its unit scores."""
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(folder / f"{task}.units.parquet").metadata or {}
        return str(json.loads(metadata[b"nearfield"]).get("task_type") or "Tasks")
    except (OSError, KeyError, ValueError):
        return "Tasks"
