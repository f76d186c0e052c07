"""The batches of a plan, in a report and on a page of their own, and the audit of mined negatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from nearfield.reporting import text
from nearfield.reporting.page import (
    Charts,
    Columns,
    Element,
    Facts,
    Heading,
    Notes,
    Page,
    Prose,
    Section,
    WordTable,
    write_page,
)
from nearfield.reporting.svg import (
    Figure,
    Histogram,
    LineChart,
    Series,
    Whisker,
    bin_edges,
    binned,
    counts_figure,
    histogram_figure,
    interval_figure,
    line_figure,
)
from nearfield.reporting.text import (
    AbsentError,
    Json,
    Missing,
    first,
    listing,
    load_object,
    mapping,
    part,
    real,
    string,
    total,
)

if TYPE_CHECKING:
    from nearfield.batching.plan import Plan
    from nearfield.mining.negatives import Audit, Proportion, ShownExample


def build_batches(run: Path, names: Sequence[str], max_steps: float | None = None) -> list[Element]:
    """The section of a run folder; ``names`` are the store's sources in order, for plans that give numbers.

    ``max_steps`` is where the recipe ends the training, perhaps before the plan does.
    """
    summary = load_object(run / "plan" / "summary.json", "No plan/summary.json: no batches were planned.")
    epochs = [mapping(one) for one in listing(summary.get("epochs"))]
    by_source: dict[str, float] = {}
    for one in epochs:
        for source, value in mapping(one.get("batches_by_source")).items():
            by_source[source] = by_source.get(source, 0.0) + (real(value) or 0.0)
    whole = sum(by_source.values())
    sources = [
        (source_name(source, names), text.count(value), text.percent(value, whole))
        for source, value in sorted(by_source.items(), key=lambda item: (-item[1], item[0]))
    ]
    facts = []
    kind, batch_size = string(summary.get("kind")), real(summary.get("batch_size"))
    if kind:
        facts.append(("planner", kind.replace("_", " ")))
    if batch_size is not None:
        facts.append(("examples a batch", text.count(batch_size)))
    if epochs:
        facts += [
            ("epochs", text.count(len(epochs))),
            ("batches", _followed(total(one.get("batches") for one in epochs), max_steps)),
            ("examples", text.count(total(one.get("rows") for one in epochs))),
            ("tokens", text.count(total(one.get("tokens") for one in epochs))),
            ("left out", text.count(sum(total(mapping(one.get("dropped")).values()) for one in epochs))),
            *_hardness(mapping(epochs[0].get("hardness"))),
        ]
    rows = [_epoch(one, number) for number, one in enumerate(epochs)]
    heads = ["epoch", "batches", "examples", "tokens", "left out"]
    tables = [
        WordTable("Batches a source", ["source", "batches", "share"], sources),
        WordTable("Epochs, and what was left out of each and why", heads, rows),
    ]
    lengths = part("the plan", lambda: _lengths(run, names))
    return [Facts(facts), beside(tables), *([lengths] if isinstance(lengths, Missing) else lengths)]


def beside(tables: Sequence[WordTable]) -> Columns:
    """Those of the tables that have rows, beside each other."""
    return Columns([("", [table]) for table in tables if table.rows])


def _hardness(hardness: Json) -> list[tuple[str, str]]:
    """A teacher's measurements of the first epoch's batches, beside random ones; nothing without a teacher."""
    facts = []
    for key, name in (("similarity", "similarity in a batch"), ("false_negatives", "likely false negatives")):
        planned, chance = real(hardness.get(f"planned_{key}")), real(hardness.get(f"random_{key}"))
        if planned is None or chance is None:
            continue
        if key == "similarity":
            facts.append((name, f"{text.number(planned)}; at random {text.number(chance)}"))
        else:
            facts.append((name, f"{text.percent(planned, 1)}; at random {text.percent(chance, 1)}"))
    return facts


def _followed(batches: float, max_steps: float | None) -> str:
    if max_steps is None or max_steps >= batches:
        return text.count(batches)
    return f"{text.count(batches)}, of which the training follows the first {text.count(max_steps)}"


def source_name(source: str, names: Sequence[str]) -> str:
    """A plan's source number as the source's name, where the store's names are known."""
    return names[int(source)] if source.isascii() and source.isdigit() and int(source) < len(names) else source


def _epoch(one: Json, number: int) -> list[str]:
    dropped = [(reason, real(value) or 0.0) for reason, value in mapping(one.get("dropped")).items()]
    reasons = [f"{text.count(value)} {reason}" for reason, value in sorted(dropped, key=lambda item: -item[1])]
    counts = [text.count(real(one.get(key)) or 0.0) for key in ("batches", "rows", "tokens")]
    return [string(first(one, "epoch")) or str(number), *counts, "; ".join(reasons) or "nothing"]


def _lengths(run: Path, names: Sequence[str]) -> list[Element]:
    """Tokens an item in the first epoch: the chart, a table row for each side, the mean of each source."""
    import pyarrow.parquet as pq

    files = sorted((run / "plan").glob("epoch-*.parquet"))
    if not files:
        raise AbsentError("No plan/epoch-*.parquet: the lengths of the planned items are not known.")
    columns = set(pq.read_schema(files[0]).names)
    wanted = [
        name
        for name in ("step", "source", "query_tokens", "document_tokens", "positives", "negatives")
        if name in columns
    ]
    if "query_tokens" not in wanted or "document_tokens" not in wanted:
        raise AbsentError(f"{files[0].name} has no columns query_tokens and document_tokens.")
    table = pq.read_table(files[0], columns=wanted)
    if not len(table):
        raise AbsentError(f"{files[0].name} is empty.")
    queries = table["query_tokens"].to_numpy().astype(np.float64)
    documents = table["document_tokens"].to_numpy().astype(np.float64)
    sides = [("a query", queries), ("the documents of an example", documents)]
    high = max(float(np.percentile(values, 99.5)) for _, values in sides)
    edges = bin_edges(high)
    series = []
    for number, (label, values) in enumerate(sides, start=1):
        series.append(binned(np.minimum(values, edges[-1]), edges, label, f"s{number}"))
    rows = [_row(label, values) for label, values in sides]
    chart = Histogram(
        key="tokens",
        title="Tokens of the planned items, first epoch",
        edges=edges,
        sides=series,
        x_label="tokens, prompts included; the last bin takes all longer ones",
        description=". ".join(
            f"{row[0]}: median {row[1]}, 95 % under {row[2]}, longest {row[3]} tokens" for row in rows
        )
        + ".",
    )
    notes = []
    if "step" in wanted:
        per_step = np.bincount(table["step"].to_numpy().astype(np.int64), weights=queries + documents)
        per_step = per_step[per_step > 0]
        if len(per_step):
            notes.append(
                f"A batch holds {text.count(float(np.median(per_step)))} tokens in the median, "
                f"{text.count(float(per_step.min()))} at least and {text.count(float(per_step.max()))} at most."
            )
    tables = [
        WordTable("Tokens of the first epoch", ["", "median", "95 % under", "longest", "in all"], rows),
        WordTable(
            "Mean tokens a source", ["source", "query", "documents"], _by_source(table, queries, documents, names)
        ),
    ]
    return [Charts([histogram_figure(chart)]), Notes(notes), beside(tables)]


def _by_source(
    table: object, queries: npt.NDArray[np.float64], documents: npt.NDArray[np.float64], names: Sequence[str]
) -> list[tuple[str, str, str]]:
    import pyarrow as pa

    assert isinstance(table, pa.Table)
    if "source" not in table.column_names:
        return []
    numbers = np.asarray([str(value) for value in table["source"].to_pylist()])
    result = []
    for source in sorted(set(numbers.tolist())):
        mine = numbers == source
        result.append(
            (
                source_name(source, names),
                text.number(float(queries[mine].mean())),
                text.number(float(documents[mine].mean())),
            )
        )
    return result


def _row(label: str, values: npt.NDArray[np.float64]) -> tuple[str, str, str, str, str]:
    return (
        label,
        text.count(float(np.median(values))),
        text.count(float(np.percentile(values, 95))),
        text.count(float(values.max())),
        text.count(float(values.sum())),
    )


MOST_SOURCES = 4
"""Sources that have a curve of their own; styles for more are not told apart."""
WINDOWS = 40


def write_plan_page(plans: Sequence[Plan], out: Path) -> Path:
    """Write an HTML page on the plans of a run's epochs."""
    write_page(out, plan_page(plans))
    return out


def plan_page(plans: Sequence[Plan]) -> Page:
    """The page of plans; the figures are of the first epoch, but for hardness, which is of all."""
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
    figures = [
        *_hardness_figures(summaries),
        *_token_figures(first),
        *_source_figures(first),
        *_strata_figures(first, one["planner"]),
    ]
    name = first.path.parent.parent.resolve().name if first.path.parent.name == "plan" else first.path.name
    heads = ["why", *(f"epoch {number}" for number in range(min(6, len(summaries))))]
    tables = [
        WordTable("Sources of the first epoch", ["source", "batches", "examples", "share", "tokens"], sources),
        WordTable("Examples left out, by epoch", heads, dropped),
    ]
    shown: list[Element] = [Facts(facts), Notes(_notes(one)), Charts(figures), *tables]
    return Page(name, "nearfield plan", [Section("plan", "Plan", "Which examples meet", shown)])


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


def _hardness_figures(summaries: Sequence[dict[str, Any]]) -> list[Figure]:
    titles = {
        "similarity": ("Similarity of a query and the positives of others in its batch", 1),
        "false_negatives": ("In-batch negatives that score above the positive, %", 100),
    }
    figures = []
    for key, (caption, scale) in titles.items():
        rows = []
        for number, summary in enumerate(summaries[:6]):
            hardness = summary.get("hardness") or {}
            for side, style in (("planned", "s1"), ("random", "s4")) if hardness else ():
                value, margin = scale * hardness[f"{side}_{key}"], hardness[f"{side}_{key}_margin"]
                low, high = (None, None) if margin is None else (value - scale * margin, value + scale * margin)
                if low is not None and key == "false_negatives":
                    low = max(0.0, low)
                rows.append(Whisker(f"{side}, epoch {number}", value, low, high, style))
        figures.append(interval_figure(key.replace("_", ""), caption, rows, ".4f"))
    return figures


def _token_figures(plan: Plan) -> list[Figure]:
    tokens = plan.tokens().astype(np.float64)
    if not len(tokens):
        return []
    described = (
        f"Median {text.count(float(np.median(tokens)))}, least {text.count(float(tokens.min()))}, "
        f"most {text.count(float(tokens.max()))} tokens a batch."
    )
    return [counts_figure("tokens", "Tokens of a batch", tokens.tolist(), "batches", "tokens", described)]


def _source_figures(plan: Plan) -> list[Figure]:
    """The share of the examples that each source has, over the steps."""
    names = {int(number): name for number, name in plan.metadata.get("sources", {}).items()}
    steps, source = plan.column("step"), plan.column("source")
    numbers, counts = np.unique(source, return_counts=True)
    if len(numbers) < 2 or len(plan) < 2:
        return []
    windows = max(2, min(WINDOWS, len(plan) // 8))
    window = steps * windows // len(plan)
    whole = np.maximum(np.bincount(window, minlength=windows), 1)
    series = []
    for place, number in enumerate(numbers[np.argsort(-counts, kind="stable")][:MOST_SOURCES].tolist()):
        share = np.bincount(window[source == number], minlength=windows) / whole
        series.append(Series(names.get(number, str(number)), share.tolist(), f"s{place + 1}"))
    x = [float(step) for step in np.arange(windows) * len(plan) // windows]
    return [line_figure(LineChart("sources", "Share of each source over the epoch", x, series, from_zero=True))]


def _strata_figures(plan: Plan, planner: dict[str, Any]) -> list[Figure]:
    figures: list[Figure] = []
    for one in [planner, *planner.get("parts", [])]:
        for name, about in one.get("strata", {}).items():
            if about["kind"] == "kmeans":
                sizes, title = [float(size) for size in about["sizes"]], f"Examples a cluster, {name}"
                described = f"{len(sizes)} clusters of {sizes[-1]:.0f} to {sizes[0]:.0f} examples."
                key = f"strata{len(figures)}"
                figures.append(counts_figure(key, title, sizes, "clusters", "examples", described))
    stratum, steps = plan.column("stratum"), plan.column("step")
    if (stratum >= 0).any():
        pairs = np.unique(np.stack([steps[stratum >= 0], stratum[stratum >= 0]]), axis=1)
        met = np.bincount(pairs[0], minlength=len(plan)).astype(np.float64)
        title, described = "Clusters or communities a batch", f"Median {np.median(met):.0f}, at most {met.max():.0f}."
        figures.append(counts_figure("met", title, met.tolist(), "batches", "clusters or communities", described))
    return figures


BINS = 40
RULES = ("source", "rule", "candidates removed", "examples dropped", "candidates left", "examples left short")


def write_audit(audit: Audit, name: str, out: Path) -> Path:
    """Write the page of an audit of mined negatives."""
    write_page(out, audit_page(audit, name))
    return out


def audit_page(audit: Audit, name: str) -> Page:
    """The page of an audit: what was found, two figures, a sample with scores."""
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
    rules = WordTable("What each rule did", RULES, rule_rows(summary), words=2)
    judged = (
        f"A negative counts as false where {audit.judge} scores it higher than the example's lowest positive. This is an estimate by "
        "that judge, with Wilson's interval at 95 %."
    )
    heads = ["source", "share", "interval", "judged"]
    table = WordTable("Estimated share of false negatives", heads, rates)
    return Page(
        name,
        "nearfield audit of mined negatives",
        [
            Section(
                "audit",
                "Mined",
                "What was mined",
                [Facts(facts), rules, Charts([gap_figure(audit), score_figure(audit)])],
            ),
            Section("judged", "False negatives", "False negatives, by a second teacher", [Prose([judged]), table]),
            Section("sample", "Sample", "A sample", [each for one in audit.sample for each in _example(one)]),
        ],
    )


def _example(one: ShownExample) -> list[Element]:
    rows = [(words, "positive", text.number(score), "", "") for words, score in one.positives]
    rows += [
        (of.text, "negative", text.number(of.score), text.count(of.rank), text.number(of.judged))
        for of in one.negatives
    ]
    heads = ["text", "role", "teacher", "rank", "judge"]
    return [Heading(one.query), WordTable(f"{one.source}, example {one.example}", heads, rows, words=2)]


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
