"""The audit of mined negatives as one HTML page: what was found, two figures, a sample with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from nearfield.reporting import text
from nearfield.reporting.page import write_page
from nearfield.reporting.svg import Figure, Histogram, binned, histogram_figure
from nearfield.reporting.text import WordTable

if TYPE_CHECKING:
    from nearfield.mining.negatives import Audit, Proportion

BINS = 40
RULES = ("source", "rule", "candidates removed", "examples dropped", "candidates left", "examples left short")


@dataclass(frozen=True)
class AuditPage:
    """All that the template shows."""

    facts: list[tuple[str, str]]
    rules: WordTable
    rates: WordTable
    judge: str
    figures: list[Figure]
    sample: Sequence[object]


def write_audit(audit: Audit, name: str, out: Path) -> Path:
    """Write the page of an audit."""
    write_page("mining.html.j2", out, name=name, page=audit_page(audit))
    return out


def audit_page(audit: Audit) -> AuditPage:
    """The page of an audit."""
    summary = audit.summary
    facts = [
        ("examples", text.count(summary["examples"])),
        ("negatives", text.count(len(audit.negative_scores))),
        ("with fewer than wanted", text.count(summary["short"])),
        ("dropped by a filter", text.count(sum(source["dropped"] for source in summary["sources"].values()))),
        ("generation", str(summary["generation"])),
        ("miner", str(summary["fingerprint"])[:12]),
        *(
            (f"recall of the search, {source}", f"{one['recall']:.1%} of the best {one['depth']}")
            for source, one in summary.get("recall", {}).items()
        ),
    ]
    rates = [(source, *rate_words(rate)) for source, rate in audit.false_negatives.items()]
    return AuditPage(
        facts,
        WordTable("What each rule did", RULES, rule_rows(summary), words=2),
        WordTable("Estimated share of false negatives", ["source", "share", "interval", "judged"], rates),
        audit.judge,
        [figure for figure in (gap_figure(audit), score_figure(audit)) if figure.svg],
        audit.sample,
    )


def rule_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a rule: source, rule, candidates removed, examples dropped, candidates left, examples left short."""
    rows: list[tuple[str, ...]] = []
    for name, source in summary["sources"].items():
        rows.append((name, "(found)", "", "", text.count(source["candidates"]), ""))
        for rule in source["rules"]:
            numbers = [text.count(rule[key]) for key in ("removed", "dropped", "left", "short")]
            rows.append((name, rule["kind"], *numbers))
    return rows


def rate_words(rate: Proportion) -> tuple[str, str, str]:
    """The share, its interval and its counts."""
    return f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}", f"{rate.hits} of {rate.n}"


def gap_figure(audit: Audit) -> Figure:
    """How far below the positive the negatives score."""
    title = "Score of the positive less that of the negative"
    if not len(audit.gaps):
        return Figure(title, Markup(""))
    low, median, high = np.percentile(audit.gaps, [5, 50, 95])
    limits, label = edges(audit.gaps), "score gap; below 0 the negative scores higher"
    described = (
        f"Of {len(audit.gaps):,} negatives, the median gap is {median:.3f}; 90 % lie from {low:.3f} to "
        f"{high:.3f}; {float((audit.gaps <= 0).mean()):.1%} are 0 or less."
    )
    return histogram_figure(
        Histogram("gaps", title, limits, [binned(audit.gaps.tolist(), limits, "negatives", "s1")], label, described)
    )


def score_figure(audit: Audit) -> Figure:
    """The teacher's scores of positives and negatives."""
    title = "The teacher's scores"
    parts = {"positives": (audit.positive_scores, "s2"), "negatives": (audit.negative_scores, "s1")}
    both = np.concatenate([values for values, _ in parts.values()])
    if not len(both):
        return Figure(title, Markup(""))
    limits, sides = edges(both), []
    for label, (values, style) in parts.items():
        side = binned(values.tolist(), limits, f"{label} (share)", style)
        sides.append(replace(side, y=[count / max(1, len(values)) for count in side.y]))
    described = "; ".join(
        f"{label}: median {float(np.median(values)):.3f}" for label, (values, _) in parts.items() if len(values)
    )
    return histogram_figure(Histogram("scores", title, limits, sides, "teacher's score", f"{described}."))


def edges(values: npt.NDArray[np.float64]) -> list[float]:
    """Edges of equal bins over the values."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return [float(edge) for edge in np.linspace(low, high, BINS + 1)]
