"""Charts as inline SVG, drawn here and not in the browser: they print, need no library and work without scripts.

Every chart is a ``role="img"`` with a title and a description in words. Colours and strokes are classes of the style
sheet, so that dark mode and print restyle them; no ``style`` attribute is written, because the page's content security
policy forbids them.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nearfield.reporting import text

WIDTH, HEIGHT = 460, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 40
_NOTHING = Markup("")
BINS = 24
LABEL_EMS = 15.0
"""The width that a row's label may take, in heights of its letters: half of a chart on a phone."""


@dataclass(frozen=True)
class Series:
    """One line of a chart: ``y[i]`` at the chart's ``x[i]``; not-a-number is a gap. ``style`` is a CSS class."""

    label: str
    y: Sequence[float]
    style: str = "s1"
    faint: bool = False


@dataclass(frozen=True)
class LineChart:
    """Curves over one axis. ``key`` names the chart in the page; it must be unique there and a plain word."""

    key: str
    title: str
    x: Sequence[float]
    series: Sequence[Series]
    x_label: str = "step"
    from_zero: bool = False
    description: str = ""
    log: bool = False
    """Whether x is drawn by its logarithm, with a tick at each value."""


@dataclass(frozen=True)
class Histogram:
    """Counts a bin, for one or two sides (queries, documents); ``edges`` has one number more than each list."""

    key: str
    title: str
    edges: Sequence[float]
    sides: Sequence[Series]
    x_label: str
    description: str


@dataclass(frozen=True)
class Whisker:
    """A point with its interval (or without one), for one row of an interval plot."""

    label: str
    value: float
    low: float | None
    high: float | None
    style: str = "s1"


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its caption."""

    caption: str
    svg: Markup
    key: str = ""
    values: dict[str, object] | None = None
    """The values that the page's script shows beside the pointer, if any."""
    live: bool = False
    """Whether the page's script reads values of it."""


def line_figure(chart: LineChart, shown: Sequence[Series] | None = None) -> Figure:
    """A line chart with the values behind it; ``shown`` are those of its curves that the script tells."""
    series = [{"label": one.label, "y": [float(f"{y:.5g}") for y in one.y]} for one in shown or chart.series]
    values: dict[str, object] = {
        "title": chart.title,
        "x": [round(x, 2) for x in chart.x],
        "series": series,
        "log": chart.log,
        "unit": chart.x_label,
    }
    return Figure(chart.title, line_chart(chart), chart.key, values, live=True)


def binned(values: Sequence[float], edges: Sequence[float], label: str, style: str) -> Series:
    """How many of the values are in each bin."""
    import numpy as np

    counts, _ = np.histogram(np.asarray(values, dtype=np.float64), bins=np.asarray(edges))
    return Series(label, [float(count) for count in counts], style)


def bin_edges(high: float) -> list[float]:
    """Edges of about ``BINS`` bins of a round, whole width from 0 to at least ``high``."""
    width = max(1.0, math.ceil(max(high, 1.0) / BINS))
    width = max(1.0, float(math.ceil(ticks(0.0, width, 1)[-1])))
    return [index * width for index in range(math.ceil(max(high, 1.0) / width) + 1)]


def histogram_figure(chart: Histogram) -> Figure:
    """A histogram under its title."""
    return Figure(chart.title, histogram(chart), chart.key)


def counts_figure(key: str, title: str, values: Sequence[float], label: str, x_label: str, described: str) -> Figure:
    """How many of some counts are in each bin from 0 on."""
    edges = bin_edges(max(values))
    return histogram_figure(Histogram(key, title, edges, [binned(values, edges, label, "s1")], x_label, described))


def interval_figure(key: str, title: str, rows: Sequence[Whisker], form: str = ".3f", *, zero: bool = False) -> Figure:
    """An interval plot under its title, with its values in words."""
    described = "; ".join(f"{row.label} {row.value:{form}}" for row in rows)
    return Figure(title, interval_plot(key, title, rows, described, zero=zero), key)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover ``[low, high]`` with about ``wanted`` steps."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high <= low:
        spread = abs(low) * 0.5 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def tick_words(values: Sequence[float]) -> list[str]:
    """The ticks as words, all with as many decimals as the one that needs most."""
    words = [text.number(value) for value in values]
    if any("e" in word for word in words):
        return words
    decimals = max((len(word.partition(".")[2]) for word in words), default=0)
    return [
        f"{value:.{decimals}f}".replace("-", "−") if value and decimals else word
        for value, word in zip(values, words, strict=True)
    ]


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


Scale = Callable[[float], float]


def line_chart(chart: LineChart) -> Markup:
    """An SVG of the curves, with axes, light grid lines and, where there are several series, a legend above."""
    values = [value for series in chart.series for value in _finite(series.y)]
    xs = _finite(chart.x)
    if not values or not xs:
        return Markup("")
    y_ticks = ticks(0.0 if chart.from_zero else min(values), max(values))
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (xs[0] - 0.5, xs[0] + 0.5)
    x_ticks = [tick for tick in ticks(x_low, x_high) if x_low <= tick <= x_high and tick.is_integer()]
    top = _TOP + (20 if len(chart.series) > 1 else 0)
    px, py = _scales((x_low, x_high), (y_ticks[0], y_ticks[-1]), top)
    if chart.log:
        px, x_ticks = _log_scale(x_low, x_high), sorted(set(xs))
    parts = [*_axes(px, py, x_ticks, y_ticks, chart.x_label)]
    parts += [_path(chart.x, series, px, py) for series in chart.series]
    if len(chart.series) > 1:
        parts.append(_legend(chart.series))
    place = Markup(' data-chart="{}" data-box="{} {} {} {}"').format(
        chart.key, _LEFT, WIDTH - _RIGHT, top, HEIGHT - _BOTTOM
    )
    return chart_svg(chart.key, chart.title, chart.description or describe(chart), HEIGHT, parts, place)


def histogram(chart: Histogram) -> Markup:
    """An SVG of the bins, as steps over one another, each side outlined and filled lightly."""
    tallest = max((max(side.y, default=0.0) for side in chart.sides), default=0.0)
    if not tallest or len(chart.edges) < 2:
        return Markup("")
    y_ticks = ticks(0.0, tallest, 4)
    low, high = chart.edges[0], chart.edges[-1]
    top = _TOP + (20 if len(chart.sides) > 1 else 0)
    px, py = _scales((low, high), (0.0, y_ticks[-1]), top)
    parts = [*_axes(px, py, [tick for tick in ticks(low, high) if low <= tick <= high], y_ticks, chart.x_label)]
    for side in chart.sides:
        commands = [f"M{px(low):.1f} {py(0):.1f}"]
        for (start, end), value in zip(itertools.pairwise(chart.edges), side.y, strict=True):
            commands.append(f"L{px(start):.1f} {py(value):.1f}L{px(end):.1f} {py(value):.1f}")
        commands.append(f"L{px(high):.1f} {py(0):.1f}Z")
        parts.append(Markup('<path class="area {}" d="{}"/>').format(side.style, "".join(commands)))
    if len(chart.sides) > 1:
        parts.append(_legend(chart.sides))
    return chart_svg(chart.key, chart.title, chart.description, HEIGHT, parts)


def interval_plot(key: str, title: str, rows: Sequence[Whisker], description: str, *, zero: bool = False) -> Markup:
    """An SVG with a row a point: its label, its interval as a bar and its value as a dot; ``zero`` marks a line at 0."""
    rows = [row for row in rows if math.isfinite(row.value)]
    if not rows:
        return Markup("")
    ends = [end for row in rows for end in (row.low, row.high, row.value) if end is not None and math.isfinite(end)]
    if zero:
        ends.append(0.0)
    scale = ticks(min(ends), max(ends), 4)
    labels = [clipped(row.label, LABEL_EMS) for row in rows]
    left, row_height = max(110.0, label_width(labels)), 30
    height = 12 + row_height * len(rows) + 28

    def px(value: float) -> float:
        return left + (value - scale[0]) / (scale[-1] - scale[0]) * (WIDTH - left - 20)

    parts = []
    for tick, words in zip(scale, tick_words(scale), strict=True):
        parts.append(_rule("grid", px(tick), px(tick), 8, height - 26))
        parts.append(words_at(px(tick), height - 8, "middle", words))
    if zero:
        parts.append(_rule("cursor", px(0.0), px(0.0), 8, height - 26))
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = 12 + row_height * (index + 0.5)
        parts.append(words_at(left - 10, y + 4, "end", label))
        if row.low is not None and row.high is not None and math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(_rule(f"whisker {row.style}", px(row.low), px(row.high), y, y))
        parts.append(_dot(row.style, px(row.value), y, 5))
    return chart_svg(key, title, description, height, parts)


def _ems(words: str) -> float:
    """About how wide words are in a usual sans-serif font, rather too wide, in the height of its letters."""
    total = 0.0
    for one in words:
        if one in "fijlrtI.,:;'|!()[]/ ":
            total += 0.4
        elif one in "mwMW@%…" or unicodedata.east_asian_width(one) in "WF":
            total += 1.05
        else:
            total += 0.64 if one.isalnum() and not one.isupper() else 0.85
    return total


def label_width(labels: Sequence[str]) -> float:
    """The width of labels to the left of a chart: a phone shows the chart smaller and its letters, at 14.5 units, larger."""
    return max(map(_ems, labels)) * 14.5 + 14


def clipped(words: str, most: float) -> str:
    """Words of at most so many ems, made visible, with a sign where some were left out: of a path, the first."""
    words = text.visible(words)
    longest = int(most / 0.4)
    if len(words) <= longest and _ems(words) <= most:
        return words
    path = "/" in words
    shown = words[-longest:] if path else words[:longest]
    while _ems(shown) > most - 1.05:
        shown = shown[1:] if path else shown[:-1]
    return f"…{shown}" if path else f"{shown}…"


def describe(chart: LineChart) -> str:
    """The chart in a sentence a series: where it starts and ends, its least and greatest value."""
    sentences = []
    for series in chart.series:
        values = _finite(series.y)
        if values and not series.faint:
            sentences.append(
                f"{series.label}: from {text.number(values[0])} to {text.number(values[-1])}, "
                f"least {text.number(min(values))}, greatest {text.number(max(values))}."
            )
    return " ".join(sentences)


def chart_svg(
    key: str, title: str, description: str, height: float, parts: Sequence[Markup], more: Markup = _NOTHING
) -> Markup:
    """A chart with its title and description in words; ``more`` are attributes."""
    head = Markup(
        '<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-labelledby="{}-title {}-text"{}>'
        '<title id="{}-title">{}</title><desc id="{}-text">{}</desc>{}</svg>'
    )
    inner = Markup("").join(parts)
    return head.format(WIDTH, height, key, key, more, key, text.visible(title), key, text.visible(description), inner)


def _scales(xs: tuple[float, float], ys: tuple[float, float], top: float) -> tuple[Scale, Scale]:
    """From values to places: left to right, bottom to top."""

    def px(value: float) -> float:
        return _LEFT + (value - xs[0]) / (xs[1] - xs[0]) * (WIDTH - _LEFT - _RIGHT)

    def py(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - top - _BOTTOM)

    return px, py


def _log_scale(low: float, high: float) -> Scale:
    def px(value: float) -> float:
        return _LEFT + math.log(value / low) / math.log(high / low) * (WIDTH - _LEFT - _RIGHT)

    return px


def _axes(px: Scale, py: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], label: str) -> Iterator[Markup]:
    for tick, words in zip(y_ticks, tick_words(y_ticks), strict=True):
        yield _rule("grid", _LEFT, WIDTH - _RIGHT, py(tick), py(tick))
        yield words_at(_LEFT - 8, py(tick) + 4, "end", words)
    for tick, words in zip(x_ticks, tick_words(x_ticks), strict=True):
        yield words_at(px(tick), HEIGHT - 22, "middle", words)
    yield words_at(WIDTH - _RIGHT, HEIGHT - 4, "end", text.visible(label))


def _rule(style: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    line = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    return line.format(style, x1, x2, y1, y2)


def words_at(x: float, y: float, anchor: str, words: str) -> Markup:
    """Small words that start, end or have their middle at a place."""
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def _dot(style: str, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(style, x, y, radius)


def _path(xs: Sequence[float], series: Series, px: Scale, py: Scale) -> Markup:
    """The curve; a value that is not finite lifts the pen, and one that stands alone is a dot."""
    style = f"{series.style} faint" if series.faint else series.style
    known = [math.isfinite(x) and math.isfinite(y) for x, y in zip(xs, series.y, strict=True)]
    commands: list[str] = []
    lonely: list[Markup] = []
    for index, (x, y) in enumerate(zip(xs, series.y, strict=True)):
        if not known[index]:
            continue
        before = index > 0 and known[index - 1]
        after = index + 1 < len(known) and known[index + 1]
        commands.append(f"{'L' if before else 'M'}{px(x):.1f} {py(y):.1f}")
        if not before and not after:
            lonely.append(_dot(style, px(x), py(y), 2.5))
    return Markup('<path class="line {}" d="{}"/>').format(style, "".join(commands)) + Markup("").join(lonely)


def _legend(series: Sequence[Series]) -> Markup:
    parts = []
    x = float(_LEFT)
    for one in series:
        label = text.visible(one.label)
        parts.append(_rule(f"line {one.style} faint" if one.faint else f"line {one.style}", x, x + 16, 12, 12))
        parts.append(words_at(x + 21, 16, "start", label))
        x += 40 + 7.6 * len(label)
    return Markup("").join(parts)


COLOURS = 6
"""Labels with a colour of their own; the rarer ones share the last style."""
MAP_HEIGHT = 400


def clustered(values: Sequence[Sequence[float]]) -> list[int]:
    """An order of rows that puts like ones side by side: average linkage on one minus the likeness."""
    import numpy as np
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    square = np.asarray(values, dtype=np.float64)
    if len(square) < 3:
        return list(range(len(square)))
    distance = np.maximum(1 - (square + square.T) / 2, 0)
    np.fill_diagonal(distance, 0)
    return [int(i) for i in leaves_list(linkage(squareform(distance, checks=False), "average"))]


def heat_map(
    key: str, title: str, names: Sequence[str], values: Sequence[Sequence[float | None]], order: Sequence[int]
) -> Markup:
    """An SVG of a square table, darker for larger values from 0 to 1; rows and columns in ``order``, empty for null."""
    labels = [clipped(names[row], 12.0) for row in order]
    left, top = max(130.0, label_width(labels)), 12.0
    side = min((WIDTH - left - 10) / len(order), 44.0)
    height = top + side * len(order) + 34
    parts = []
    for i, row in enumerate(order):
        y = top + side * i
        parts.append(words_at(left - 8, y + side / 2 + 4, "end", labels[i]))
        parts.append(words_at(left + side * (i + 0.5), top + side * len(order) + 18, "middle", str(i + 1)))
        for j, column in enumerate(order):
            value = values[row][column]
            if value is None:
                continue
            parts.append(
                Markup(
                    '<rect class="cell" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}"/>'
                ).format(left + side * j, y, side - 1, side - 1, 0.5 * min(max(value, 0.0), 1.0))
            )
            if side >= 28:
                words = Markup('<text class="strong" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
                parts.append(words.format(left + side * (j + 0.5), y + side / 2 + 4, f"{value:.2f}"))
    told = ". ".join(
        f"{names[a]} and {names[b]}: {value:.2f}"
        for i, a in enumerate(order)
        for b in order[:i]
        if (value := values[a][b]) is not None
    )
    return chart_svg(key, title, told or "One model.", height, parts)


def scatter(key: str, title: str, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> Markup:
    """An SVG of points, coloured and shaped by label: the commonest labels have a colour, the others share a grey one."""
    if not points:
        return Markup("")
    named = [label for label, _ in Counter(labels).most_common(COLOURS)]
    style_of = {label: f"m{i + 1}" for i, label in enumerate(named)}
    kinds = [*named, *(["other labels"] if len(set(labels)) > len(named) else [])]
    rows = -(-len(kinds) // 2)
    top = 18.0 * rows + 12
    low = [min(point[axis] for point in points) for axis in (0, 1)]
    high = [max(point[axis] for point in points) for axis in (0, 1)]
    spread = max(high[0] - low[0], high[1] - low[1]) or 1.0
    scale = min((WIDTH - 24) / spread, (MAP_HEIGHT - 24) / spread)
    parts = []
    for i, label in enumerate(kinds):
        x, y = 12 + (i % 2) * WIDTH / 2, 14.0 + 18 * (i // 2)
        parts.append(_mark(style_of.get(label, "m0"), x, y - 4))
        parts.append(words_at(x + 10, y, "start", clipped(label, 14.0)))
    width = (high[0] - low[0]) * scale
    for (x, y), label in zip(points, labels, strict=True):
        place = (WIDTH - width) / 2 + (x - low[0]) * scale, top + 10 + (high[1] - y) * scale
        parts.append(_mark(style_of.get(label, "m0"), *place))
    described = f"{len(points)} texts: " + ", ".join(
        f"{count} {label}" for label, count in Counter(labels).most_common(8)
    )
    height = top + 20 + (high[1] - low[1]) * scale
    return chart_svg(key, title, f"{described}.", height, parts, Markup(' data-map="{}"').format(key))


def _mark(style: str, x: float, y: float) -> Markup:
    return Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(style, x, y)
