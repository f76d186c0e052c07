"""Charts as inline SVG, drawn here and not in the browser: they print, need no library and work without scripts.

Every chart is a ``role="img"`` with a title and a description in words. Colours and strokes are classes of the style
sheet, so that dark mode and print restyle them; no ``style`` attribute is written, because the page's content security
policy forbids them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from nearfield.report import text

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 34


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
    markers: Sequence[float] = field(default_factory=tuple)


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


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def line_chart(chart: LineChart) -> Markup:
    """An SVG of the curves, with axes, light grid lines and, where there are several series, a legend above."""
    values = [value for series in chart.series for value in _finite(series.y)]
    xs = _finite(chart.x)
    if not values or not xs:
        return Markup("")
    y_ticks = ticks(0.0 if chart.from_zero else min(values), max(values))
    x_low, x_high = min(xs), max(xs)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    x_ticks = [tick for tick in ticks(x_low, x_high) if x_low <= tick <= x_high and (tick.is_integer() or x_high - x_low < 3)]
    y_low, y_high = y_ticks[0], y_ticks[-1]
    legend = len(chart.series) > 1
    top = _TOP + (20 if legend else 0)

    def px(value: float) -> float:
        return _LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def py(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - top - _BOTTOM)

    parts: list[Markup] = []
    for tick in y_ticks:
        y = py(tick)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, WIDTH - _RIGHT, y, y))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 8, y + 4, text.number(tick)))
    for tick in x_ticks:
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(px(tick), HEIGHT - 14, text.number(tick)))
    parts.append(Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - _RIGHT, HEIGHT - 1, text.visible(chart.x_label)))
    for marker in chart.markers:
        if x_low <= marker <= x_high:
            x = px(marker)
            parts.append(Markup('<line class="mark" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(x, x, top, HEIGHT - _BOTTOM))
    for series in chart.series:
        parts.append(_path(chart.x, series, px, py))
    if legend:
        parts.append(_legend(chart.series))
    title, described = f"{chart.key}-title", f"{chart.key}-text"
    head = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{} {}" data-chart="{}" data-box="{} {} {} {}" data-y="{} {}">'
        '<title id="{}">{}</title><desc id="{}">{}</desc>'
    ).format(
        WIDTH, HEIGHT, title, described, chart.key, _LEFT, WIDTH - _RIGHT, top, HEIGHT - _BOTTOM, y_low, y_high,
        title, chart.title, described, chart.description or describe(chart),
    )  # fmt: skip
    return head + Markup("").join(parts) + Markup("</svg>")


def _path(xs: Sequence[float], series: Series, px: object, py: object) -> Markup:
    assert callable(px) and callable(py)
    commands: list[str] = []
    lonely: list[Markup] = []
    pen_down = False
    style = f"{series.style} faint" if series.faint else series.style
    for index, (x, y) in enumerate(zip(xs, series.y, strict=True)):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{px(x):.1f} {py(y):.1f}")
        last = index + 1 == len(xs) or not math.isfinite(series.y[index + 1])
        if not pen_down and last:
            lonely.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(style, px(x), py(y)))
        pen_down = True
    return Markup('<path class="line {}" d="{}"/>').format(style, "".join(commands)) + Markup("").join(lonely)


def _legend(series: Sequence[Series]) -> Markup:
    parts: list[Markup] = []
    x = float(_LEFT)
    for one in series:
        style = f"{one.style} faint" if one.faint else one.style
        parts.append(Markup('<line class="line {}" x1="{:.1f}" x2="{:.1f}" y1="12" y2="12"/>').format(style, x, x + 16))
        parts.append(Markup('<text class="tick" x="{:.1f}" y="16">{}</text>').format(x + 21, text.visible(one.label)))
        x += 36 + 6.6 * len(one.label)
    return Markup("").join(parts)


def describe(chart: LineChart) -> str:
    """The chart in a sentence a series: where it starts and ends, its least and greatest value."""
    sentences = []
    for series in chart.series:
        values = _finite(series.y)
        if values and not series.faint:
            sentences.append(
                f"{text.visible(series.label)}: from {text.number(values[0])} to {text.number(values[-1])}, "
                f"least {text.number(min(values))}, greatest {text.number(max(values))}."
            )
    return " ".join(sentences)


@dataclass(frozen=True)
class Histogram:
    """Counts a bin, for one or two sides (queries, documents); ``edges`` has one number more than each list."""

    key: str
    title: str
    edges: Sequence[float]
    sides: Sequence[Series]
    x_label: str
    description: str


def histogram(chart: Histogram) -> Markup:
    """An SVG of the bins, as steps over one another: filled for the first side, outlined for the next."""
    tallest = max((max(side.y, default=0.0) for side in chart.sides), default=0.0)
    if not tallest or len(chart.edges) < 2:
        return Markup("")
    y_ticks = ticks(0.0, tallest, 4)
    top = _TOP + (20 if len(chart.sides) > 1 else 0)
    low, high = chart.edges[0], chart.edges[-1]

    def px(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def py(value: float) -> float:
        return HEIGHT - _BOTTOM - value / y_ticks[-1] * (HEIGHT - top - _BOTTOM)

    parts: list[Markup] = []
    for tick in y_ticks:
        y = py(tick)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, WIDTH - _RIGHT, y, y))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 8, y + 4, text.number(tick)))
    for tick in ticks(low, high):
        if low <= tick <= high:
            parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(px(tick), HEIGHT - 14, text.number(tick)))
    parts.append(Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - _RIGHT, HEIGHT - 1, text.visible(chart.x_label)))
    for side in chart.sides:
        commands = [f"M{px(low):.1f} {py(0):.1f}"]
        for start, end, value in zip(chart.edges, chart.edges[1:], side.y, strict=False):
            commands.append(f"L{px(start):.1f} {py(value):.1f}L{px(end):.1f} {py(value):.1f}")
        commands.append(f"L{px(high):.1f} {py(0):.1f}Z")
        parts.append(Markup('<path class="area {}" d="{}"/>').format(side.style, "".join(commands)))
    if len(chart.sides) > 1:
        parts.append(_legend(chart.sides))
    title, described = f"{chart.key}-title", f"{chart.key}-text"
    head = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{} {}"><title id="{}">{}</title><desc id="{}">{}</desc>'
    ).format(WIDTH, HEIGHT, title, described, title, chart.title, described, chart.description)
    return head + Markup("").join(parts) + Markup("</svg>")


@dataclass(frozen=True)
class Whisker:
    """A point with its interval (or without one), for one row of an interval plot."""

    label: str
    value: float
    low: float | None
    high: float | None
    style: str = "s1"


def interval_plot(key: str, title: str, rows: Sequence[Whisker], description: str, zero: bool = False) -> Markup:
    """An SVG with a row a point: label, interval as a bar, value as a dot; with ``zero`` a line where nothing differs."""
    rows = [row for row in rows if math.isfinite(row.value)]
    if not rows:
        return Markup("")
    ends = [end for row in rows for end in (row.low, row.high, row.value) if end is not None and math.isfinite(end)]
    scale = ticks(min([*ends, 0.0] if zero else ends), max([*ends, 0.0] if zero else ends), 4)
    low, high = scale[0], scale[-1]
    left, row_height = 110, 30
    height = 12 + row_height * len(rows) + 28

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - 20)

    parts: list[Markup] = []
    for tick in scale:
        x = px(tick)
        style = "zero" if zero and tick == 0 else "grid"
        parts.append(Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="8" y2="{}"/>').format(style, x, x, height - 26))
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, height - 8, text.number(tick)))
    for index, row in enumerate(rows):
        y = 12 + row_height * (index + 0.5)
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(left - 10, y + 4, text.clip(row.label, 16)[:17]))
        if row.low is not None and row.high is not None and math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(row.style, px(row.low), px(row.high), y, y))
        parts.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(row.style, px(row.value), y))
    titled, described = f"{key}-title", f"{key}-text"
    head = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{} {}"><title id="{}">{}</title><desc id="{}">{}</desc>'
    ).format(WIDTH, height, titled, described, titled, text.visible(title), described, text.visible(description))
    return head + Markup("").join(parts) + Markup("</svg>")
