"""The section on batches: which examples met, read from the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from nearfield.reporting import text
from nearfield.reporting.run import AbsentError, Json, Missing, first, listing, load_object, mapping, part, real, string
from nearfield.reporting.svg import Histogram, Series, histogram, ticks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BINS = 24


@dataclass(frozen=True)
class Epoch:
    """One epoch of the plan; ``dropped`` pairs a reason with a number of examples."""

    name: str
    batches: float
    rows: float
    tokens: float
    dropped: list[tuple[str, float]]


@dataclass(frozen=True)
class Batches:
    """The section: epochs, sources (name, batches, share), and the histogram of lengths (or why there is none)."""

    facts: list[tuple[str, str]]
    epochs: list[Epoch]
    sources: list[tuple[str, str, str]]
    lengths: Lengths | Missing


@dataclass(frozen=True)
class Lengths:
    """Tokens an item in the first epoch: the chart, and a table row for each side."""

    svg: Markup
    rows: list[tuple[str, str, str, str, str]]
    batch_tokens: str
    by_source: list[tuple[str, str, str]]


def build_batches(run: Path, names: Sequence[str], max_steps: float | None = None) -> Batches:
    """The section of a run folder; ``names`` are the store's sources in order, for plans that give numbers.

    ``max_steps`` is where the recipe ends the training, perhaps before the plan does.
    """
    summary = load_object(run / "plan" / "summary.json", "No plan/summary.json: no batches were planned.")
    epochs = [_epoch(mapping(one), number) for number, one in enumerate(listing(summary.get("epochs")))]
    by_source: dict[str, float] = {}
    for one in listing(summary.get("epochs")):
        for source, value in mapping(mapping(one).get("batches_by_source")).items():
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
            ("batches", _followed(sum(epoch.batches for epoch in epochs), max_steps)),
            ("examples", text.count(sum(epoch.rows for epoch in epochs))),
            ("tokens", text.count(sum(epoch.tokens for epoch in epochs))),
            ("left out", text.count(sum(number for epoch in epochs for _, number in epoch.dropped))),
        ]
    for one in listing(summary.get("epochs"))[:1]:
        facts += _hardness(mapping(mapping(one).get("hardness")))
    return Batches(facts, epochs, sources, part("the plan", lambda: _lengths(run, names)))


def _hardness(hardness: Json) -> list[tuple[str, str]]:
    """What a teacher says of the first epoch's batches, beside random ones; nothing where it was not asked."""
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


def _epoch(one: Json, number: int) -> Epoch:
    dropped = [(reason, real(value) or 0.0) for reason, value in mapping(one.get("dropped")).items()]
    return Epoch(
        name=string(first(one, "epoch")) or str(number),
        batches=real(one.get("batches")) or 0.0,
        rows=real(one.get("rows")) or 0.0,
        tokens=real(one.get("tokens")) or 0.0,
        dropped=sorted(dropped, key=lambda item: -item[1]),
    )


def _lengths(run: Path, names: Sequence[str]) -> Lengths:
    import numpy as np
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
    edges = np.asarray(bin_edges(high))
    series = []
    for number, (label, values) in enumerate(sides, start=1):
        counts, _ = np.histogram(np.minimum(values, edges[-1]), bins=edges)
        series.append(Series(label, [float(value) for value in counts], f"s{number}"))
    rows = [_row(label, values) for label, values in sides]
    chart = Histogram(
        key="tokens",
        title="Tokens of the planned items",
        edges=[float(edge) for edge in edges],
        sides=series,
        x_label="tokens, prompts included; the last bin takes all longer ones",
        description=". ".join(
            f"{row[0]}: median {row[1]}, 95 % under {row[2]}, longest {row[3]} tokens" for row in rows
        )
        + ".",
    )
    batch = ""
    if "step" in wanted:
        per_step = np.bincount(table["step"].to_numpy().astype(np.int64), weights=queries + documents)
        per_step = per_step[per_step > 0]
        if len(per_step):
            batch = (
                f"A batch holds {text.count(float(np.median(per_step)))} tokens in the median, "
                f"{text.count(float(per_step.min()))} at least and {text.count(float(per_step.max()))} at most."
            )
    return Lengths(histogram(chart), rows, batch, _by_source(table, queries, documents, names))


def _by_source(
    table: object, queries: npt.NDArray[np.float64], documents: npt.NDArray[np.float64], names: Sequence[str]
) -> list[tuple[str, str, str]]:
    import numpy as np
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
    import numpy as np

    return (
        label,
        text.count(float(np.median(values))),
        text.count(float(np.percentile(values, 95))),
        text.count(float(values.max())),
        text.count(float(values.sum())),
    )


def bin_edges(high: float) -> list[float]:
    """Edges of about ``BINS`` bins of a round, whole width from 0 to at least ``high``."""
    width = max(1.0, math.ceil(max(high, 1.0) / BINS))
    steps = ticks(0.0, width, 1)
    width = max(1.0, float(math.ceil(steps[-1])))
    return [index * width for index in range(math.ceil(max(high, 1.0) / width) + 1)]
