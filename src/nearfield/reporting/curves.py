"""The training curves: ``metrics.jsonl`` as a few charts and one small table, ``evaluations.jsonl`` as some more."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from nearfield.reporting import text
from nearfield.reporting.learning import CHARTS as LEARNING_CHARTS
from nearfield.reporting.learning import judge
from nearfield.reporting.run import AbsentError, Json, load_object, mapping, real, string
from nearfield.reporting.svg import LineChart, Series, line_chart

POINTS = 400
"""Points of a curve at most; longer runs are cut into so many stretches of steps, each drawn by its mean."""
STYLES = 4
"""Colours of curves."""

NAN = math.nan


@dataclass(frozen=True)
class Metrics:
    """The lines of ``metrics.jsonl`` by column, one value a step; a step without a value has not-a-number."""

    steps: list[float]
    columns: dict[str, list[float]]
    torn: int
    broken: int
    repeated: int

    def column(self, name: str) -> list[float]:
        """A column, of the length of ``steps``; all not-a-number where the run did not record it."""
        return self.columns.get(name, [NAN] * len(self.steps))

    def known(self, name: str) -> bool:
        """Whether the column has one finite value."""
        return any(math.isfinite(value) for value in self.column(name))


@dataclass(frozen=True)
class Chart:
    """A drawn chart: heading, SVG, and the numbers behind it (of the length of ``x``) for the tooltip."""

    key: str
    title: str
    svg: Markup
    x: list[float]
    series: list[tuple[str, list[float]]]


@dataclass(frozen=True)
class Curves:
    """The section: charts, a table of some steps, notes, and what the overview shows.

    ``steps`` is the last step's number; the totals are over the recorded steps, which are all if ``every_step``.
    """

    charts: list[Chart]
    heads: list[str]
    rows: list[list[str]]
    notes: list[str]
    steps: int
    every_step: bool
    rows_seen: float
    tokens: float
    padded: float
    seconds: float
    first_loss: float
    """Mean of the first tenth of the steps."""
    last_loss: float
    """Mean of the last tenth."""


def read_metrics(path: Path) -> Metrics:
    """Read the file; the last line may be torn by a crash, and a resumed run may write a step twice (the last counts)."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise AbsentError("No metrics.jsonl: the run has not trained a step.") from error
    records: dict[float, dict[str, float]] = {}
    torn = broken = repeated = 0
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            last = position == len(lines) - 1
            torn, broken = torn + last, broken + (not last)
            continue
        step = real(record.get("step")) if isinstance(record, dict) else None
        if step is None or not math.isfinite(step):
            broken += 1
            continue
        numbers = {
            str(name): value for name, value in ((key, real(item)) for key, item in record.items()) if value is not None
        }
        if "loss" not in numbers and "loss" in record:
            numbers["loss"] = NAN
        repeated += step in records
        records[step] = numbers
    steps = sorted(records)
    names = sorted({name for record in records.values() for name in record})
    columns = {name: [records[step].get(name, NAN) for step in steps] for name in names}
    return Metrics(steps, columns, torn, broken, repeated)


def thin(xs: Sequence[float], ys: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """At most ``points`` pairs: the mean of x and of the finite y of each stretch of steps."""
    if len(xs) <= points:
        return list(xs), list(ys)
    edges = [round(index * len(xs) / points) for index in range(points + 1)]
    thin_x, thin_y = [], []
    for start, end in itertools.pairwise(edges):
        values = [value for value in ys[start:end] if math.isfinite(value)]
        thin_x.append(xs[start] if points >= len(xs) else math.fsum(xs[start:end]) / (end - start))
        thin_y.append(math.fsum(values) / len(values) if values else NAN)
    return thin_x, thin_y


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean of the finite values at most ``reach`` places away on either side, so that nothing lags; gaps stay gaps.

    Near the ends the window shrinks on both sides alike, which keeps the first and the last value where they are.
    """
    result = []
    for place, value in enumerate(values):
        near = min(reach, place, len(values) - 1 - place)
        window = [one for one in values[place - near : place + near + 1] if math.isfinite(one)]
        result.append(math.fsum(window) / len(window) if math.isfinite(value) else NAN)
    return result


def _chart(
    metrics: Metrics, key: str, title: str, columns: Sequence[tuple[str, str]], *, smoothed: bool, zero: bool
) -> Chart:
    series: list[Series] = []
    shown: list[tuple[str, list[float]]] = []
    known = [(column, label) for column, label in columns if metrics.known(column)]
    # Some figures are told now and then only: steps that have none of them are no gaps.
    told = [i for i in range(len(metrics.steps)) if any(math.isfinite(metrics.column(name)[i]) for name, _ in known)]
    sparse = len(told) <= len(metrics.steps) // 2
    places = told if sparse else range(len(metrics.steps))
    steps = [metrics.steps[place] for place in places]
    xs, _ = thin(steps, steps, POINTS)
    for number, (column, label) in enumerate(known, start=1):
        values = metrics.column(column)
        _, ys = thin(steps, [values[place] for place in places], POINTS)
        style = f"s{min(number, STYLES)}"
        if smoothed and len(ys) >= 20:
            series.append(Series("each step" if len(steps) <= POINTS else "mean of some steps", ys, style, faint=True))
            ys = smooth(ys, max(2, len(ys) // 40))
            label = f"{label}, smoothed"
        series.append(Series(label, ys, style))
        shown.append((label, ys))
    chart = LineChart(key, title, xs, series, from_zero=zero)
    return Chart(key, title, line_chart(chart), [round(x, 2) for x in xs], shown)


def _padding(metrics: Metrics) -> Metrics:
    """The metrics with the column ``padding_share``: the share of the computed token places that held padding."""
    shares = []
    for tokens, padded in zip(metrics.column("tokens"), metrics.column("padded_tokens"), strict=True):
        good = math.isfinite(tokens) and math.isfinite(padded) and padded >= tokens > 0
        shares.append(1 - tokens / padded if good else NAN)
    return Metrics(
        metrics.steps, {**metrics.columns, "padding_share": shares}, metrics.torn, metrics.broken, metrics.repeated
    )


def _speed(metrics: Metrics) -> Metrics:
    """The metrics with the column ``tokens_per_second``."""
    speeds = []
    for tokens, seconds in zip(metrics.column("tokens"), metrics.column("seconds"), strict=True):
        speeds.append(tokens / seconds if math.isfinite(tokens) and math.isfinite(seconds) and seconds > 0 else NAN)
    return Metrics(
        metrics.steps, {**metrics.columns, "tokens_per_second": speeds}, metrics.torn, metrics.broken, metrics.repeated
    )


CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...], bool, bool], ...] = (
    ("loss", "Loss", (("loss", "loss"),), True, False),
    ("learning-rate", "Learning rate", (("learning_rate", "learning rate"),), False, True),
    ("gradient-norm", "Gradient norm, before clipping", (("gradient_norm", "gradient norm"),), True, True),
    (
        "similarity",
        "Cosine of the positive and of the hardest negative",
        (("positive_similarity", "positive"), ("hardest_negative_similarity", "hardest negative")),
        False,
        False,
    ),
    *LEARNING_CHARTS,
    ("speed", "Tokens a second", (("tokens_per_second", "tokens a second"),), True, True),
    ("padding", "Share of padding in what was computed", (("padding_share", "padding"),), False, True),
)
"""(key, heading, (column, label)..., smoothed, axis from zero) of each chart; one is drawn if a column has a value."""

TABLE = (
    ("loss", "loss"),
    ("learning_rate", "learning rate"),
    ("gradient_norm", "gradient norm"),
    ("rows", "examples"),
    ("tokens", "tokens"),
    ("seconds", "seconds"),
)


def _notes(metrics: Metrics) -> list[str]:
    notes = []
    if metrics.torn:
        notes.append("The last line of metrics.jsonl is torn (the run was cut off while it wrote); it is left out.")
    if metrics.broken:
        notes.append(f"{text.count(metrics.broken)} lines of metrics.jsonl cannot be read and are left out.")
    if metrics.repeated:
        notes.append(
            f"{text.count(metrics.repeated)} steps stand twice (the run was resumed); the later record counts."
        )
    bad = sum(not math.isfinite(value) for value in metrics.column("loss"))
    if bad:
        steps = [
            text.count(step)
            for step, value in zip(metrics.steps, metrics.column("loss"), strict=True)
            if not math.isfinite(value)
        ]
        notes.append(
            f"The loss is not a finite number at {text.count(bad)} steps: {', '.join(steps[:8])}{'…' if bad > 8 else ''}."
        )
    if len(metrics.steps) < round(metrics.steps[-1]):
        notes.append(f"{text.count(len(metrics.steps))} of {text.count(metrics.steps[-1])} steps were recorded.")
    if len(metrics.steps) > POINTS:
        notes.append(
            f"Each curve has {POINTS} points; a point is the mean of about {text.number(len(metrics.steps) / POINTS, 2)} steps."
        )
    return notes


SCORE_CHARTS = 6
"""Scores of evaluations that are drawn at most."""


def build_scores(run: Path) -> tuple[list[Chart], list[str]]:
    """A chart a score of the evaluations during the training, and notes; nothing where there were none."""
    try:
        lines = (run / "evaluations.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    by_step: dict[float, dict[str, float]] = {}
    unreadable = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = mapping(json.loads(line))
        except (ValueError, RecursionError):
            record = {}
        step = real(record.get("step"))
        if step is None or not math.isfinite(step):
            unreadable += 1
            continue
        scores = {name: real(value) for name, value in mapping(record.get("scores")).items()}
        by_step[step] = {name: NAN if value is None else value for name, value in scores.items()}
    steps = sorted(by_step)
    names = list(dict.fromkeys(name for step in steps for name in by_step[step]))
    if len(names) == 2 and names[0] == "mean":
        names = names[1:]  # the mean of one task
    charts = []
    for number, name in enumerate(names[:SCORE_CHARTS]):
        xs, ys = thin(steps, [by_step[step].get(name, NAN) for step in steps], POINTS)
        key, title = f"evaluation-{number}", f"Evaluation: {text.clip(name, 60)}"
        svg = line_chart(LineChart(key, title, xs, [Series("score", ys)]))
        if svg:
            charts.append(Chart(key, title, svg, [round(x, 2) for x in xs], [("score", ys)]))
    notes = _outcome(run)
    if unreadable:
        notes.append(f"{text.count(unreadable)} lines of evaluations.jsonl cannot be read and are left out.")
    if len(names) > SCORE_CHARTS:
        notes.append(f"{SCORE_CHARTS} of {text.count(len(names))} scores are drawn; all are in evaluations.jsonl.")
    return charts, notes


def _outcome(run: Path) -> list[str]:
    """What the evaluations decided, as the manifest says."""
    try:
        manifest = load_object(run / "manifest.json", "")
    except AbsentError:
        return []
    trained = mapping(mapping(manifest.get("stages")).get("train"))
    best, notes = mapping(trained.get("best")), []
    step, score = real(best.get("step")), real(best.get("score"))
    if trained.get("stopped_early") is True:
        notes.append("The training ended early: as many evaluations in a row as its patience brought no gain.")
    if step is not None and score is not None:
        kept = string(trained.get("checkpoint")) == f"step-{round(step):08d}"
        model = "; the model is made of it" if kept else ""
        notes.append(f"The best evaluation was that after step {text.count(step)}: {text.score(score)}{model}.")
    return notes


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def build_curves(run: Path, recipe: Json | None = None) -> Curves:
    """The section of a run folder with this parsed recipe; :class:`AbsentError` where nothing was recorded."""
    metrics = read_metrics(run / "metrics.jsonl")
    if not metrics.steps:
        raise AbsentError("metrics.jsonl holds no step.")
    full = _speed(_padding(metrics))
    charts = [
        _chart(full, key, title, columns, smoothed=smoothed, zero=zero)
        for key, title, columns, smoothed, zero in CHARTS
        if any(full.known(column) for column, _ in columns)
    ]
    scores, score_notes = build_scores(run)
    known = [(name, label) for name, label in TABLE if metrics.known(name)]
    last = len(metrics.steps) - 1
    picked = sorted({round(index * last / 11) for index in range(12)})
    rows = [[text.count(metrics.steps[i]), *(_cell(metrics.column(name)[i]) for name, _ in known)] for i in picked]
    losses = _finite(metrics.column("loss"))
    # A single step says little: a batch is easy or hard. The first and last tenths are compared.
    tenth = max(1, len(losses) // 10)
    return Curves(
        charts=[*charts[:1], *scores, *charts[1:]],
        heads=["step", *(label for _, label in known)],
        rows=rows,
        notes=[*_notes(metrics), *score_notes, *judge(metrics.column, recipe or {})],
        steps=round(metrics.steps[-1]),
        every_step=len(metrics.steps) >= round(metrics.steps[-1]),
        rows_seen=math.fsum(_finite(metrics.column("rows"))),
        tokens=math.fsum(_finite(metrics.column("tokens"))),
        padded=math.fsum(_finite(metrics.column("padded_tokens"))),
        seconds=math.fsum(_finite(metrics.column("seconds"))),
        first_loss=math.fsum(losses[:tenth]) / tenth if losses else NAN,
        last_loss=math.fsum(losses[-tenth:]) / tenth if losses else NAN,
    )


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else text.number(value)
