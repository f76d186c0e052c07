"""Charts of squares and points: a heat map with like rows side by side, and a map of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from nearfield.reporting.svg import WIDTH, chart_svg, clipped, label_width, words_at

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
