"""The audit of mined negatives as one HTML page: what was found, two pictures, a sample with scores."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from nearfield.files import write_text
from nearfield.reporting import text
from nearfield.reporting.page import TEMPLATES, content_policy, environment
from nearfield.reporting.svg import Histogram, Series, histogram

if TYPE_CHECKING:
    from nearfield.mining.audit import Audit, Proportion

BINS = 40


@dataclass(frozen=True)
class AuditPage:
    """All that the template shows."""

    name: str
    facts: list[tuple[str, str]]
    rules: list[tuple[str, ...]]
    rates: list[tuple[str, ...]]
    judge: str
    gaps: Markup
    scores: Markup
    sample: Sequence[object]


def write_audit(found: Audit, name: str, out: Path) -> Path:
    """Render the page and write it aside and renamed."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    html = (
        environment()
        .get_template("mining.html.j2")
        .render(
            page=audit_page(found, name),
            policy=content_policy("", style),
            style=Markup(style),
            version=importlib.metadata.version("nearfield"),
        )
    )
    write_text(out, html)
    return out


def audit_page(found: Audit, name: str) -> AuditPage:
    """The page of an audit."""
    summary = found.summary
    facts = [
        ("examples", text.count(summary["examples"])),
        ("negatives", text.count(len(found.negative_scores))),
        ("with fewer than wanted", text.count(summary["short"])),
        ("dropped by a filter", text.count(sum(source["dropped"] for source in summary["sources"].values()))),
        ("generation", str(summary["generation"])),
        ("miner", str(summary["fingerprint"])[:12]),
        *(
            (f"recall of the search, {source}", f"{one['recall']:.1%} of the best {one['depth']}")
            for source, one in summary.get("recall", {}).items()
        ),
    ]
    return AuditPage(
        name,
        facts,
        rule_rows(summary),
        [(source, *rate_words(rate)) for source, rate in found.false_negatives.items()],
        found.judge,
        gap_chart(found),
        score_chart(found),
        found.sample,
    )


def rule_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What each rule did: source, rule, candidates removed, examples dropped, candidates left, examples left short."""
    rows: list[tuple[str, ...]] = []
    for name, source in summary["sources"].items():
        rows.append((name, "(found)", "", "", text.count(source["candidates"]), ""))
        for rule in source["rules"]:
            numbers = [text.count(rule[key]) for key in ("removed", "dropped", "left", "short")]
            rows.append((name, rule["kind"], *numbers))
    return rows


def rate_words(rate: Proportion) -> tuple[str, str, str]:
    """The share, its interval and what it is made of."""
    return f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}", f"{rate.hits} of {rate.n}"


def gap_chart(found: Audit) -> Markup:
    """How far below the positive the negatives score."""
    if not len(found.gaps):
        return Markup("")
    low, median, high = np.percentile(found.gaps, [5, 50, 95])
    return histogram(
        Histogram(
            key="gaps",
            title="Score of the positive less that of the negative",
            edges=edges(found.gaps),
            sides=[Series("negatives", bins(found.gaps, edges(found.gaps)), "s1")],
            x_label="score gap; below 0 the negative scores higher",
            description=f"Of {len(found.gaps):,} negatives, the median gap is {median:.3f}; 90 % lie from {low:.3f} to "
            f"{high:.3f}; {float((found.gaps <= 0).mean()):.1%} are 0 or less.",
        )
    )


def score_chart(found: Audit) -> Markup:
    """The teacher's scores of positives and negatives."""
    both = np.concatenate([found.positive_scores, found.negative_scores])
    if not len(both):
        return Markup("")
    limits = edges(both)
    sides = [
        Series(f"{label} (share)", share(bins(values, limits)), style)
        for label, values, style in (
            ("positives", found.positive_scores, "s2"),
            ("negatives", found.negative_scores, "s1"),
        )
    ]
    words = [
        f"{label}: median {float(np.median(values)):.3f}"
        for label, values in (("positives", found.positive_scores), ("negatives", found.negative_scores))
        if len(values)
    ]
    return histogram(
        Histogram("scores", "The teacher's scores", limits, sides, "teacher's score", "; ".join(words) + ".")
    )


def edges(values: npt.NDArray[np.float64]) -> list[float]:
    """Edges of equal bins over the values."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return [float(edge) for edge in np.linspace(low, high, BINS + 1)]


def bins(values: npt.NDArray[np.float64], limits: Sequence[float]) -> list[float]:
    """Counts a bin."""
    return [float(count) for count in np.histogram(values, bins=np.asarray(limits))[0]]


def share(counts: Sequence[float]) -> list[float]:
    """Counts as shares of their sum."""
    total = sum(counts) or 1.0
    return [count / total for count in counts]
