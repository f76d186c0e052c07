"""The page of a plan: what meets in a batch, in pictures."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from nearfield.errors import BadInputError
from nearfield.files import write_text
from nearfield.reporting import text
from nearfield.reporting.batches import bin_edges
from nearfield.reporting.svg import Histogram, LineChart, Series, Whisker, histogram, interval_plot, line_chart

if TYPE_CHECKING:
    from nearfield.batching.plan import Plan

MOST_SOURCES = 4
"""Sources that have a curve of their own; styles for more are not told apart."""
WINDOWS = 40


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    caption: str
    svg: Markup


@dataclass(frozen=True)
class PlanPage:
    """All that the template shows."""

    name: str
    facts: list[tuple[str, str]]
    sources: list[tuple[str, ...]]
    dropped: list[tuple[str, ...]]
    dropped_heads: list[str]
    pictures: list[Picture]
    notes: list[str]


def write_plan_page(plans: Sequence[Plan], out: Path) -> Path:
    """Write an HTML page on the plans of a run's epochs; it loads nothing from a network."""
    from nearfield.reporting.page import TEMPLATES, content_hash, environment

    if out.is_dir():
        raise BadInputError("the page is one file, and this is a folder", where=str(out), hint="Name a file.")
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src {content_hash(style)}; base-uri 'none'; form-action 'none'"
    html = (
        environment()
        .get_template("plan.html.j2")
        .render(
            page=build_plan_page(plans),
            style=Markup(style),
            policy=policy,
            version=importlib.metadata.version("nearfield"),
        )
    )
    try:
        write_text(out, html)
    except OSError as error:
        raise BadInputError(f"the page cannot be written ({error.strerror})", where=str(out)) from error
    return out


def build_plan_page(plans: Sequence[Plan]) -> PlanPage:
    """The page of plans; the pictures are of the first epoch, but for hardness, which is of all."""
    first = plans[0]
    summaries = [plan.metadata["summary"] for plan in plans]
    settings = first.metadata.get("batches", {})
    facts = [
        ("planner", str(settings.get("kind", "unknown")).replace("_", " ")),
        ("examples a batch", str(settings.get("batch_size", "unknown"))),
        ("seed", str(first.metadata.get("seed", "unknown"))),
        ("epochs", text.count(len(plans))),
        ("batches", text.count(sum(one["batches"] for one in summaries))),
        ("examples", text.count(sum(one["rows"] for one in summaries))),
        ("tokens", text.count(sum(one["tokens"] for one in summaries))),
        ("moved for a clash", text.count(summaries[0]["planner"].get("moved", 0))),
    ]
    one = summaries[0]
    sources: list[tuple[str, ...]] = [
        (
            name,
            text.count(one["batches_by_source"].get(name, 0)),
            text.count(rows),
            text.percent(rows, one["rows"]),
            text.count(one["tokens_by_source"][name]),
        )
        for name, rows in one["rows_by_source"].items()
    ]
    several = one["batches_by_source"].get("several sources")
    if several:
        sources.append(("several sources", text.count(several), "", "", ""))
    reasons = sorted({reason for summary in summaries for reason in summary["dropped"]})
    dropped: list[tuple[str, ...]] = [
        (reason, *(text.count(summary["dropped"].get(reason, 0)) for summary in summaries[:6])) for reason in reasons
    ]
    pictures = [
        *_hardness(summaries),
        _tokens(first),
        _sources(first, {int(k): v for k, v in first.metadata.get("sources", {}).items()}),
        *_strata(first, one["planner"]),
    ]
    name = first.path.parent.parent.resolve().name if first.path.parent.name == "plan" else first.path.name
    shown = [picture for picture in pictures if picture is not None and picture.svg]
    heads = ["why", *(f"epoch {number}" for number in range(min(6, len(summaries))))]
    return PlanPage(name, facts, sources, dropped, heads, shown, _notes(one))


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = []
    exceptions = summary.get("exceptions", {})
    if exceptions.get("repeated_items"):
        notes.append(f"{text.count(exceptions['repeated_items'])} times an item stands twice in a batch.")
    if exceptions.get("known_positives"):
        times = text.count(exceptions["known_positives"])
        notes.append(f"{times} times an item is a known positive of another query of its batch.")
    if exceptions and not notes:
        notes.append("No item stands twice in a batch, and none is a known positive of another query of its batch.")
    if summary.get("hardness"):
        hardness = summary["hardness"]
        notes.append(
            f"Similarity and false negatives are the teacher's, measured on {text.count(hardness['batches'])} batches "
            f"({text.count(hardness['pairs'])} pairs of a query with the positive of another example of its batch) and on "
            "random batches of as many examples of the same sources. Bars are 95 % intervals over batches."
        )
    else:
        notes.append("How hard the batches are is not known: the recipe names no teacher.")
    return notes


def _hardness(summaries: Sequence[dict[str, Any]]) -> list[Picture]:
    pictures = []
    titles = {
        "similarity": "Similarity of a query and the positives of others in its batch",
        "false_negatives": "In-batch negatives that score above the positive, %",
    }
    for key, caption in titles.items():
        rows = []
        for number, summary in enumerate(summaries[:6]):
            hardness = summary.get("hardness")
            if not hardness:
                continue
            for side, style in (("planned", "s1"), ("random", "s4")):
                scale = 100 if key == "false_negatives" else 1
                value, margin = scale * hardness[f"{side}_{key}"], hardness[f"{side}_{key}_margin"]
                low, high = (None, None) if margin is None else (value - scale * margin, value + scale * margin)
                if low is not None and key == "false_negatives":
                    low = max(0.0, low)
                rows.append(Whisker(f"{side}, epoch {number}", value, low, high, style))
        described = ". ".join(f"{row.label}: {row.value:.4f}" for row in rows)
        pictures.append(Picture(caption, interval_plot(key.replace("_", ""), caption, rows, described)))
    return pictures


def _tokens(plan: Plan) -> Picture | None:
    import numpy as np

    tokens = plan.tokens().astype(np.float64)
    if not len(tokens):
        return None
    edges = bin_edges(float(tokens.max()))
    counts, _ = np.histogram(tokens, bins=edges)
    described = (
        f"Median {text.count(float(np.median(tokens)))}, least {text.count(float(tokens.min()))}, "
        f"most {text.count(float(tokens.max()))} tokens a batch."
    )
    side = Series("batches", [float(value) for value in counts], "s1")
    return Picture(
        "Tokens of a batch", histogram(Histogram("tokens", "Tokens of a batch", edges, [side], "tokens", described))
    )


def _sources(plan: Plan, names: dict[int, str]) -> Picture | None:
    """Which share of the examples each source has, over the steps."""
    import numpy as np

    steps, source = plan.column("step"), plan.column("source")
    numbers, counts = np.unique(source, return_counts=True)
    if len(numbers) < 2 or len(plan) < 2:
        return None
    windows = max(2, min(WINDOWS, len(plan) // 8))
    window = steps * windows // len(plan)
    whole = np.maximum(np.bincount(window, minlength=windows), 1)
    series = []
    for place, number in enumerate(numbers[np.argsort(-counts, kind="stable")][:MOST_SOURCES].tolist()):
        share = np.bincount(window[source == number], minlength=windows) / whole
        series.append(Series(names.get(number, str(number)), share.tolist(), f"s{place + 1}"))
    x = [float(step) for step in np.arange(windows) * len(plan) // windows]
    chart = LineChart("sources", "Share of a source over the epoch", x, series, from_zero=True)
    return Picture("Share of each source over the epoch", line_chart(chart))


def _strata(plan: Plan, planner: dict[str, Any]) -> list[Picture]:
    import numpy as np

    pictures: list[Picture] = []
    for part in [planner, *planner.get("parts", [])]:
        for name, about in part.get("strata", {}).items():
            if about["kind"] != "kmeans":
                continue
            sizes = [float(size) for size in about["sizes"]]
            edges = bin_edges(max(sizes))
            counts = np.histogram(sizes, bins=edges)[0]
            series = Series("clusters", [float(value) for value in counts], "s3")
            caption = f"Examples a cluster, {name}"
            described = f"{len(sizes)} clusters of {sizes[-1]:.0f} to {sizes[0]:.0f} examples."
            chart = Histogram(f"strata{len(pictures)}", caption, edges, [series], "examples", described)
            pictures.append(Picture(caption, histogram(chart)))
    stratum, steps = plan.column("stratum"), plan.column("step")
    if (stratum >= 0).any():
        pairs = np.unique(np.stack([steps[stratum >= 0], stratum[stratum >= 0]]), axis=1)
        met = np.bincount(pairs[0], minlength=len(plan)).astype(np.float64)
        edges = bin_edges(float(met.max()))
        counts = np.histogram(met, bins=edges)[0]
        caption = "Clusters or communities a batch"
        described = f"Median {np.median(met):.0f}, at most {met.max():.0f}."
        series = Series("batches", [float(value) for value in counts], "s2")
        chart = Histogram("met", caption, edges, [series], "clusters or communities", described)
        pictures.append(Picture(caption, histogram(chart)))
    return pictures
