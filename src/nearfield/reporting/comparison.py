"""Before and after: ``comparison.json`` as tables, sentences and interval plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from nearfield.evaluation.scores import MARK, tasks_in_words
from nearfield.reporting import text
from nearfield.reporting.run import AbsentError, Json, listing, load_object, mapping, real, string
from nearfield.reporting.suite import SuiteTable, dimension_chart, suite_tables
from nearfield.reporting.svg import Whisker, interval_plot, line_chart

STYLES = {"before": "s2", "after": "s1"}
FOREST = 60
"""Rows of the plot of all differences, at most."""
VERDICTS = 3
"""Sentences below the page's heading, at most."""
PLOTS = 12
"""Tasks that get an interval plot of their own; a suite with more shows the tables only."""


@dataclass(frozen=True)
class Finding:
    """A sentence, with ``better``, ``worse`` or ``even`` for its colour."""

    sentence: str
    tone: str


@dataclass(frozen=True)
class Score:
    """A model's score on a task, as words; an asterisk says that a notice speaks of it."""

    label: str
    value: str
    interval: str


@dataclass(frozen=True)
class Difference:
    """A paired difference against the baseline, as words; ``adjusted`` is the p-value after Holm's adjustment.

    ``tone`` is better, worse, even (not separable) or untested, for the row's shading.
    """

    label: str
    value: str
    interval: str
    p: str
    adjusted: str
    tone: str


@dataclass(frozen=True)
class Task:
    """One task (and subset): scores, differences, what they say, and a plot."""

    name: str
    about: str
    baseline: str
    scores: list[Score]
    differences: list[Difference]
    sentences: list[Finding]
    notes: list[str]
    plot: Markup


@dataclass(frozen=True)
class Comparison:
    """The section; ``verdict`` stands below the page's heading as well, ``raw`` is what the page's JSON holds.

    ``forest`` shows the differences of one model on all tasks, where there are several.
    """

    confidence: str
    models: list[list[str]]
    tasks: list[Task]
    verdict: list[Finding]
    notes: list[str]
    notices: list[str]
    forest: Markup
    raw: object
    suite: list[SuiteTable]
    truncation: Markup
    charts: dict[str, object]


def metric_words(metric: str) -> str:
    """``ndcg_at_10`` as ``nDCG@10``; other names with spaces for underscores."""
    words = re.sub(r"_at_(\d+)$", r"@\1", metric).replace("_", " ")
    return re.sub(r"^(ndcg|map|mrr)\b", lambda match: {"ndcg": "nDCG", "map": "MAP", "mrr": "MRR"}[match[1]], words)


def build_comparison(run: Path) -> Comparison:
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
    paths = {string(row.get("label")) or "?": string(row.get("path")) for row in models}
    # A run that was moved keeps its results below itself; a path is only compared with what is there.
    there = {folder.parts[-2:]: folder for folder in sorted((run / "results").glob("*/*")) if folder.is_dir()}
    ends = {label: Path(path).parts[-2:] for label, path in paths.items() if path}
    folders = {label: there[end] for label, end in ends.items() if end in there}
    cut = dimension_chart(run / "results", folders)
    return Comparison(
        confidence=f"{text.number(100 * level)} %",
        models=[[string(row.get(name)) or "–" for name in ("label", "name", "revision")] for row in models],
        tasks=tasks,
        verdict=_verdict(differences),
        notes=[words for words in map(string, listing(made.get("notes"))) if words]
        + _method(mapping(made.get("settings"))),
        notices=[_notice(row) for row in noticed],
        forest=_forest(differences, baseline),
        raw={name: made.get(name) for name in ("baseline", "settings", "models", "scores", "differences")}
        | ({"notices": made["notices"]} if "notices" in made else {}),
        suite=suite_tables(scores, differences, marked),
        truncation=Markup("") if cut is None else line_chart(cut[0]),
        charts={} if cut is None else {cut[0].key: cut[1]},
    )


def _notice(row: Json) -> str:
    """What a reader of a model's scores must know."""
    tasks = [words for words in map(string, listing(row.get("tasks"))) if words]
    hint = string(row.get("hint"))
    return (
        f"{string(row.get('model')) or '?'} on {tasks_in_words(tasks, row.get('everywhere') is True)}: "
        f"{string(row.get('what')) or '?'}{f' {hint}' if hint else ''}"
    )


def _verdict(differences: Sequence[Json]) -> list[Finding]:
    """What is said of the trained model; of all models where none is called ``after``."""
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
        f"permutation tests with {text.count(permutations)} permutations."
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
) -> Task:
    name, subset, split = key
    labels = [string(row.get("model")) or "?" for row in scores]
    values = [real(row.get("score")) for row in scores]
    about = [metric_words(string(scores[0].get("metric")) or "")]
    about += [words for words, plain in ((subset, "default"), (split, "test")) if words and words != plain]
    units, clusters = real(scores[0].get("units")), real(scores[0].get("clusters"))
    if units:
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
    reasons = dict.fromkeys(string(row.get("reason")) for row in [*scores, *differences])
    return Task(
        name=name,
        about=" · ".join(part for part in about if part),
        baseline=baseline,
        scores=[
            Score(
                label,
                ("–" if value is None else text.score(value)) + (MARK if label in marked else ""),
                _interval(row, text.score),
            )
            for label, value, row in zip(labels, values, scores, strict=True)
        ],
        differences=[
            Difference(
                string(row.get("model")) or "?",
                text.signed(real(row.get("difference")) or 0.0),
                _interval(row, text.signed),
                _p(row.get("p")),
                _p(row.get("p_adjusted")),
                _tone(row),
            )
            for row in differences
        ],
        sentences=[finding for finding in findings if finding is not None],
        notes=[f"No interval: {reason}." for reason in reasons if reason],
        plot=interval_plot(f"scores-{number}", f"Scores on {name}", whiskers, described) if plotted else Markup(""),
    )
