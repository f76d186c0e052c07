"""Numbers as words, and charts as SVG."""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.reporting import text
from nearfield.reporting.curves import build_curves, smooth, thin
from nearfield.reporting.svg import (
    Histogram,
    LineChart,
    Series,
    Whisker,
    clipped,
    histogram,
    interval_plot,
    label_width,
    line_chart,
    tick_words,
    ticks,
)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (text.number(0.05), "0.05"), (text.number(2e-5), "2e−5"), (text.number(0.0), "0"), (text.number(-1.5), "−1.5"),
        (text.number(123456), "123\u202f456"), (text.number(12345.6), "12\u202f346"), (text.number(1.25e9), "1.25e9"),
        (text.number(math.nan), "not finite"), (text.number(-7.0), "−7"), (text.count(92012), "92\u202f012"),
        (text.score(0.43124), "0.4312"), (text.signed(0.03121), "+0.0312"), (text.signed(-0.00401), "−0.0040"), (text.signed(-0.00001), "0.0000"),
        (text.duration(0.85), "850 ms"), (text.duration(42.08), "42.1 s"), (text.duration(200), "3 min 20 s"), (text.duration(59.99), "1 min 00 s"),
        (text.duration(7500), "2 h 05 min"), (text.duration(math.nan), "unknown"), (text.size(999), "999 bytes"), (text.size(142_531), "142.5 kB"),
        (text.percent(1, 100_000), "under 0.1 %"), (text.percent(0, 10), "0.0 %"), (text.percent(1, 0), "–"),
        (text.moment("2026-11-23T19:41:07+00:00"), "2026-11-23 19:41 UTC"), (text.moment("yesterday"), "yesterday"), (text.moment(0), "1970-01-01 00:00 UTC"),
        (text.plain(None), "none"), (text.plain(True), "yes"), (text.plain(["a", 1, 0.5]), "a, 1, 0.5"), (text.plain("q: "), "“q: ”"), (text.plain(1234567), "1234567"),
        (text.visible("a\0b\u202ec"), "a[U+0000]b[U+202E]c"), (text.clip("a  b\n c", 10), "a b c"), (text.clip("x" * 20, 5), "xxxxx… (20 characters)"),
        (text.clip("", 5), ""), (text.breakable("a_b/<c>.d"), "a_<wbr>b/&lt;c&gt;.<wbr>d"), (text.breakable("<a_b>\0"), "&lt;a_<wbr>b&gt;[U+0000]"),
    ],
)  # fmt: skip
def test_words(made: str, expected: str) -> None:
    assert made == expected


@given(st.text(max_size=300), st.integers(1, 40))
def test_clip_is_short_and_visible(value: str, length: int) -> None:
    """No more than asked for, plus the count; nothing hidden, nothing that cannot be written as UTF-8."""
    clipped = text.clip(value, length)
    assert text.visible(clipped) == clipped
    clipped.encode()
    assert len(clipped) <= length + len(f"… ({text.count(len(value))} characters)")


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 8))
def test_ticks_cover_the_range(low: float, width: float, wanted: int) -> None:
    """Round steps of equal size around the range, at most a few more than wanted."""
    high = low + width
    found = ticks(low, high, wanted)
    assert found[0] <= low + 1e-6 * width + 1e-9 * abs(low) and found[-1] >= high - 1e-6 * width - 1e-9 * abs(high)
    assert 2 <= len(found) <= wanted + 3
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-3, abs_tol=1e-9 * abs(high)) and step > 0 for step in steps)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.0, 0.0), (-3.0, -3.0), (math.nan, 1.0), (0.0, math.inf)])
def test_ticks_of_no_range(low: float, high: float) -> None:
    assert len(ticks(low, high)) >= 2


def test_ticks_have_equal_decimals() -> None:
    assert tick_words([0.0, 0.05, 0.1, 0.15]) == ["0", "0.05", "0.10", "0.15"]
    assert tick_words([0.0, 5.0, 10.0]) == ["0", "5", "10"]
    assert tick_words([-0.5, 0.0]) == ["−0.5", "0"]


def test_a_line_breaks_where_a_value_is_missing() -> None:
    """Points lie where the axes say; a gap lifts the pen; a lonely value is a dot."""
    ys = [0.0, 1.0, math.nan, 2.0, math.nan, 1.0, 1.0]
    svg = str(line_chart(LineChart("k", "A title", list(range(7)), [Series("s", ys)])))
    root = ElementTree.fromstring(svg)
    path = next(one for one in root if one.get("class") == "line s1")
    assert re.findall("[ML]", path.get("d") or "") == ["M", "L", "M", "M", "L"]
    assert [one.get("class") for one in root].count("dot s1") == 1
    points = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", path.get("d") or "")]
    left, right, top, bottom = map(float, (root.get("data-box") or "").split())
    assert points[0] == (left, bottom) and points[-1][0] == right and points[2][1] == top
    assert root[0].text == "A title" and "from 0 to 1, least 0, greatest 2" in (root[1].text or "")


@pytest.mark.parametrize("ys", [[], [math.nan, math.inf], [-math.inf]])
def test_nothing_finite_is_no_chart(ys: list[float]) -> None:
    assert line_chart(LineChart("k", "t", list(range(len(ys))), [Series("s", ys)])) == ""
    assert histogram(Histogram("k", "t", [0.0, 1.0], [Series("s", [])], "x", "d")) == ""
    assert interval_plot("k", "t", [Whisker("a", math.nan, None, None)], "d") == ""


def test_labels_are_escaped_in_charts() -> None:
    """A label never becomes an element."""
    bad = "</text><script>1</script>\u202e"
    charts = [
        line_chart(
            LineChart("k", bad, [1, 2], [Series(bad, [1, 2]), Series(bad, [2, 1])], description=bad, x_label=bad)
        ),
        histogram(Histogram("k", bad, [0, 1, 2], [Series(bad, [1, 2]), Series(bad, [1, 1])], bad, bad)),
        interval_plot("k", bad, [Whisker(bad, 0.5, 0.4, 0.6)], bad),
    ]
    for chart in charts:
        names = {one.tag for one in ElementTree.fromstring(str(chart)).iter()}
        assert names <= {"svg", "title", "desc", "line", "text", "path", "circle"}
        assert "\u202e" not in chart


def test_interval_plot_places_dot_in_its_whisker() -> None:
    root = ElementTree.fromstring(
        str(interval_plot("k", "t", [Whisker("a", 0.5, 0.4, 0.7), Whisker("b", 0.1, None, None)], "d"))
    )
    whiskers = [one for one in root if "whisker" in (one.get("class") or "")]
    dots = [one for one in root if "dot" in (one.get("class") or "")]
    assert len(whiskers) == 1 and len(dots) == 2
    low, high, dot = (float(one or "nan") for one in (whiskers[0].get("x1"), whiskers[0].get("x2"), dots[0].get("cx")))
    assert (dot - low) / (high - low) == pytest.approx(1 / 3, abs=0.01)


def test_smooth_keeps_ends_gaps_and_means() -> None:
    values = [1.0, 5.0, math.nan, 3.0, 4.0]
    assert smooth(values, 1)[0] == 1.0 and smooth(values, 1)[-1] == 4.0
    assert smooth(values, 1)[1] == 3.0
    assert math.isnan(smooth(values, 1)[2])
    line = [2.0 * i for i in range(50)]
    assert smooth(line, 7) == pytest.approx(line)


def test_thin_keeps_short_runs_as_they_are() -> None:
    assert thin([1, 2, 3], [4, 5, 6], 3) == ([1, 2, 3], [4, 5, 6])
    xs, ys = thin(list(range(10)), [float(i) for i in range(10)], 5)
    assert xs == ys == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_the_loss_is_told_as_means_of_the_first_and_last_tenth(tmp_path: Path) -> None:
    """One step's loss is an easy or a hard batch."""
    lines = [{"step": step, "loss": 10.0 if step % 2 else 20.0 - step / 10} for step in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = build_curves(tmp_path)
    assert curves.first_loss == pytest.approx(sum(line["loss"] for line in lines[:10]) / 10)
    assert curves.last_loss == pytest.approx(sum(line["loss"] for line in lines[90:]) / 10)


def test_labels_are_cut_by_their_width_and_paths_at_their_beginning() -> None:
    assert clipped("SciFact", 15) == "SciFact" and clipped("", 15) == ""
    assert clipped("i" * 30, 15) == "i" * 30
    assert clipped("W" * 30, 15) == "W" * 13 + "…"
    assert clipped("漢" * 30, 15) == "漢" * 13 + "…"
    assert clipped("a" * 30 + "/model", 6.5).startswith("…") and clipped("a" * 30 + "/model", 6.5).endswith("/model")
    assert len(clipped("x" * 5_000_000, 15)) < 40
    assert label_width(["W"]) < label_width(["W", "WW"])
