"""Runs the steps of a data recipe over a built store and writes what stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from nearfield.data.cleaning.step import Encoders, Taken, no_encoders
from nearfield.data.cleaning.table import ExampleTable
from nearfield.data.cleaning_config import StepConfig
from nearfield.data.config import DataConfig
from nearfield.data.store import EXAMPLES_SCHEMA, WEIGHT, Rows, Store
from nearfield.data.summary import StepSummary
from nearfield.errors import BadInputError

_BATCH = 32_768
_PICTURES = 1024


def steps_of(config: DataConfig) -> list[tuple[StepConfig, int | None]]:
    """The steps in the order in which they run, each with the number of its source: sources' own first, then the common."""
    own = [(step, number) for number, source in enumerate(config.sources) for step in source.steps]
    return [*own, *((step, None) for step in config.steps)]


def clean(config: DataConfig, store: Store, removed: Path, encoders: Encoders | None = None) -> tuple[StepSummary, ...]:
    """Apply the steps of a recipe to the store in place: ``items.arrow`` and ``examples.arrow`` are written anew.

    What goes is written to ``removed`` (JSONL). A store from which nothing goes stays as it is, byte for byte. Raises
    BadInputError where a step leaves nothing of a source.
    """
    table = ExampleTable(store)
    summaries = []
    with removed.open("w", encoding="utf-8") as out:
        for number, (step, source) in enumerate(steps_of(config), start=1):
            sources = list(range(len(store.sources))) if source is None else [source]
            names = [store.sources[i].name for i in sources]
            before = table.counts()
            taken = Taken(number, step.kind, table, out)
            step.build().apply(table, sources, taken, encoders or no_encoders)
            after = table.counts()
            for name in names:
                if before[name] and not after[name]:
                    why = "; ".join(f"{reason} ({count:,})" for reason, count in taken.reasons.most_common(3))
                    raise BadInputError(
                        f"the cleaning step {number} ({step.kind}) leaves nothing of the source {name!r}: {why}",
                        hint="Loosen the step, or leave the source out.",
                    )
            summaries.append(
                StepSummary(
                    number,
                    step.kind,
                    None if source is None else store.sources[source].name,
                    {name: before[name] for name in names},
                    {name: after[name] for name in names},
                    dict(taken.reasons.most_common()),
                    taken.members["positives"],
                    taken.members["negatives"],
                )
            )
    if not (table.alive.all() and table.positives.alive.all() and table.negatives.alive.all()):
        _write(table)
    return tuple(summaries)


def _write(table: ExampleTable) -> None:
    """Examples without what went; items that no example needs any more are left out and the others numbered anew."""
    store, count = table.store, len(table)
    for members in (table.positives, table.negatives):
        members.alive &= table.alive[members.owners]
    kept = np.flatnonzero(table.alive).astype(np.int64)
    used = table.items(kept, ("query", "positives", "negatives"))
    new = np.full(store.items.num_rows, -1, dtype=np.int64)
    new[used] = np.arange(len(used))
    positives, negatives = (members.lists(count) for members in (table.positives, table.negatives))
    folder = store.path
    schema = EXAMPLES_SCHEMA.append(WEIGHT) if store.weights() is not None else EXAMPLES_SCHEMA
    with pa.ipc.new_stream(str(folder / "examples.new"), schema) as writer:
        for start in range(0, len(kept), _BATCH):
            rows = kept[start : start + _BATCH]
            part = store.examples.take(rows)
            columns = {name: part[name] for name in schema.names}
            columns["query"] = pa.array(new[table.query[rows]])
            for name, lists in (("positives", positives), ("negatives", negatives)):
                columns[name] = pa.array([new[lists[row]].tolist() for row in rows.tolist()], pa.list_(pa.int64()))
            writer.write_table(pa.table(columns, schema=schema))
    pictures = _write_pictures(store, used) if store.has_images else None
    with pa.ipc.new_stream(str(folder / "items.new"), store.items.schema) as writer:
        ids = store.items["id"]
        for rows, texts in table.texts(used):
            arrays = [ids.take(rows).combine_chunks(), pa.array(texts, pa.large_string())]
            if pictures is not None:
                images = store.picture_rows(rows)
                arrays.append(pa.array(pictures[images], pa.int64(), mask=images < 0))
            writer.write_batch(pa.record_batch(arrays, schema=store.items.schema))
    for name in ("examples", "items", *(() if pictures is None else ("pictures",))):
        (folder / f"{name}.new").replace(folder / f"{name}.arrow")


def _write_pictures(store: Store, items: Rows) -> Rows:
    """The pictures of some items, written anew; returns the new row of each old one."""
    rows = store.picture_rows(items)
    used = np.unique(rows[rows >= 0])
    new = np.full(store.pictures.num_rows + 1, -1, dtype=np.int64)
    new[used] = np.arange(len(used))
    with pa.ipc.new_stream(str(store.path / "pictures.new"), store.pictures.schema) as writer:
        for start in range(0, len(used), _PICTURES):
            writer.write_table(store.pictures.take(used[start : start + _PICTURES]))
    return new
