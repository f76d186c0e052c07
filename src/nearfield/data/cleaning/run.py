"""Runs the cleaning steps of a data recipe over a built store and writes what stays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nearfield.arrays import Mask, Ragged, Rows
from nearfield.data.near_duplicates import EmbedTexts
from nearfield.data.readers import excerpt
from nearfield.data.store import EXAMPLES_SCHEMA, WEIGHT, StepSummary, Store
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.data.config import DataConfig

_BATCH = 4096
_WRITTEN = 32_768
_IMAGES = 1024


@dataclass
class Members:
    """The positives or negatives of all examples, end to end."""

    rows: Rows
    """Item rows."""
    owners: Rows
    """The example of each."""
    alive: Mask

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Members:
        """Those of a column of lists."""
        lists = Ragged.from_arrow(column)
        return cls(lists.values, lists.owners(), np.ones(len(lists.values), dtype=np.bool_))

    def kept(self, count: int) -> Ragged:
        """The members that are alive, by example."""
        return Ragged.from_lengths(np.bincount(self.owners[self.alive], minlength=count), self.rows[self.alive])


class ExampleTable:
    """The examples of a store while steps take things out of them; what goes becomes ``False`` in the masks."""

    def __init__(self, store: Store) -> None:
        self.store = store
        table = store.examples
        self.source: Rows = table["source"].to_numpy().astype(np.int64)
        self.query: Rows = table["query"].to_numpy().astype(np.int64)
        self.positives = Members.of(table["positives"])
        self.negatives = Members.of(table["negatives"])
        self.label = table["label"]
        self.score = table["score"]
        self.alive: Mask = np.ones(len(self.query), dtype=np.bool_)

    @property
    def split(self) -> npt.NDArray[np.object_]:
        """The split of each example, [n]."""
        return np.asarray(self.store.examples["split"].to_pylist(), dtype=object)

    def __len__(self) -> int:
        return len(self.query)

    def members(self, side: str) -> Members:
        """The positives or the negatives."""
        return self.positives if side == "positives" else self.negatives

    def counts(self) -> dict[str, int]:
        """Examples that are still there, by source."""
        counts = np.bincount(self.source[self.alive], minlength=len(self.store.sources)).tolist()
        return {source.name: count for source, count in zip(self.store.sources, counts, strict=True)}

    def of_sources(self, sources: Sequence[int]) -> Rows:
        """The examples of some sources that are still there."""
        return np.flatnonzero(self.alive & np.isin(self.source, np.asarray(sources, dtype=np.int64))).astype(np.int64)

    def items(self, examples: Rows, sides: Sequence[str]) -> Rows:
        """The items that examples have on some sides, sorted, each once."""
        mine = np.zeros(len(self), dtype=np.bool_)
        mine[examples] = True
        parts = [np.empty(0, dtype=np.int64)]
        if "query" in sides:
            parts.append(self.query[examples])
        for side in ("positives", "negatives"):
            if side in sides:
                members = self.members(side)
                parts.append(members.rows[members.alive & mine[members.owners]])
        return np.unique(np.concatenate(parts))

    def texts(self, items: Rows) -> Iterator[tuple[Rows, list[str]]]:
        """Items and their texts, batch by batch."""
        for start in range(0, len(items), _BATCH):
            part = items[start : start + _BATCH]
            yield part, self.store.texts(part)


Encoders = Callable[[str], EmbedTexts]
"""The name of a model -> its ``encode``; loaded when it is first called."""


def no_encoders(model: str) -> EmbedTexts:
    """Stands for the encoders of a build that was given none; refuses."""
    raise BadInputError(
        f"a cleaning step embeds texts with {model}, and this program handed in no encoder",
        hint="Build the store before: nearfield data build RECIPE (or pass encoders=...).",
    )


@dataclass
class Taken:
    """Writes what a step takes out, and counts it."""

    number: int
    kind: str
    table: ExampleTable
    out: IO[str]
    reasons: Counter[str] = field(default_factory=Counter)
    """Examples taken out, by reason."""
    members: Counter[str] = field(default_factory=Counter)
    """Positives and negatives taken out of examples that stay."""

    def write(self, examples: Rows, what: str, reasons: Sequence[str], texts: Rows, like: Rows | None = None) -> None:
        """One line for each text that goes: of which example, why, and for a duplicate what it repeats."""
        table = self.table
        split = table.store.examples["split"]
        shown = table.store.shown(texts)
        queries = table.store.shown(table.query[examples])
        others = [None] * len(examples) if like is None else table.store.shown(like)
        for example, reason, text, query, other in zip(examples.tolist(), reasons, shown, queries, others, strict=True):
            entry: dict[str, Any] = {
                "step": self.number,
                "kind": self.kind,
                "source": table.store.sources[table.source[example]].name,
                "split": split[example].as_py(),
                "what": what,
                "reason": reason,
                "text": excerpt(text),
                "query": excerpt(query),
            }
            if other is not None:
                entry["like"] = excerpt(other)
            self.out.write(json.dumps(entry, ensure_ascii=True) + "\n")

    def take_out(self, examples: Rows, sides: Sequence[str], bad: dict[int, str]) -> None:
        """Take the items in ``bad`` (row -> reason) out of some sides of the examples.

        An example goes with its query or with its last positive. Negatives go alone.
        """
        table = self.table
        rows = np.fromiter(bad, dtype=np.int64, count=len(bad))
        mine = np.zeros(len(table), dtype=np.bool_)
        mine[examples] = True
        if "query" in sides:
            gone = np.flatnonzero(mine & np.isin(table.query, rows)).astype(np.int64)
            reasons = [f"query: {bad[row]}" for row in table.query[gone].tolist()]
            self.reasons.update(reasons)
            self.write(gone, "example", reasons, table.query[gone])
            table.alive[gone] = mine[gone] = False
        for side in ("positives", "negatives"):
            if side not in sides:
                continue
            members = table.members(side)
            hit = np.flatnonzero(members.alive & mine[members.owners] & np.isin(members.rows, rows)).astype(np.int64)
            members.alive[hit] = False
            owners, texts = members.owners[hit], members.rows[hit]
            if side == "negatives":
                self.members["negatives"] += len(hit)
                self.write(owners, "negative", [bad[row] for row in texts.tolist()], texts)
                continue
            left = np.bincount(members.owners[members.alive], minlength=len(table))
            empty = left[owners] == 0
            last = np.unique(owners[empty], return_index=True)[1]
            gone, last_texts = owners[empty][last], texts[empty][last]
            reasons = [f"positive: {bad[row]}" for row in last_texts.tolist()]
            self.reasons.update(reasons)
            self.write(gone, "example", reasons, last_texts)
            table.alive[gone] = mine[gone] = False
            self.members["positives"] += int(np.count_nonzero(~empty))
            self.write(owners[~empty], "positive", [bad[row] for row in texts[~empty].tolist()], texts[~empty])


def clean(config: DataConfig, store: Store, removed: Path, encoders: Encoders | None = None) -> tuple[StepSummary, ...]:
    """Apply the steps of a recipe to the store in place: ``items.arrow`` and ``examples.arrow`` are written anew.

    Removed rows are written to ``removed`` (JSONL). A store that loses nothing stays as it is, byte for byte. Raises
    BadInputError where a step leaves nothing of a source.
    """
    table = ExampleTable(store)
    summaries = []
    with removed.open("w", encoding="utf-8") as out:
        for number, (step, source) in enumerate(config.all_steps(), start=1):
            sources = list(range(len(store.sources))) if source is None else [source]
            names = [store.sources[i].name for i in sources]
            before = table.counts()
            taken = Taken(number, step.kind, table, out)
            step.apply(table, sources, taken, encoders or no_encoders)
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
    remaining = np.flatnonzero(table.alive).astype(np.int64)
    used = table.items(remaining, ("query", "positives", "negatives"))
    new = np.full(store.items.num_rows, -1, dtype=np.int64)
    new[used] = np.arange(len(used))
    positives, negatives = (members.kept(count) for members in (table.positives, table.negatives))
    folder = store.path
    schema = EXAMPLES_SCHEMA.append(WEIGHT) if store.weights() is not None else EXAMPLES_SCHEMA
    with pa.ipc.new_stream(str(folder / "examples.new"), schema) as writer:
        for start in range(0, len(remaining), _WRITTEN):
            rows = remaining[start : start + _WRITTEN]
            examples = store.examples.take(rows)
            columns = {name: examples[name] for name in schema.names}
            columns["query"] = pa.array(new[table.query[rows]])
            for name, lists in (("positives", positives), ("negatives", negatives)):
                part = lists.take(rows)
                columns[name] = Ragged(part.offsets, new[part.values]).to_arrow()
            writer.write_table(pa.table(columns, schema=schema))
    new_images = _write_images(store, used) if store.has_images else None
    with pa.ipc.new_stream(str(folder / "items.new"), store.items.schema) as writer:
        ids = store.items["id"]
        for rows, texts in table.texts(used):
            arrays = [ids.take(rows).combine_chunks(), pa.array(texts, pa.large_string())]
            if new_images is not None:
                images = store.image_rows(rows)
                arrays.append(pa.array(new_images[images], pa.int64(), mask=images < 0))
            writer.write_batch(pa.record_batch(arrays, schema=store.items.schema))
    for name in ("examples", "items", *(() if new_images is None else ("images",))):
        (folder / f"{name}.new").replace(folder / f"{name}.arrow")


def _write_images(store: Store, items: Rows) -> Rows:
    """The images of some items, written anew; returns the new row of each old one."""
    rows = store.image_rows(items)
    used = np.unique(rows[rows >= 0])
    new = np.full(store.image_table.num_rows + 1, -1, dtype=np.int64)
    new[used] = np.arange(len(used))
    with pa.ipc.new_stream(str(store.path / "images.new"), store.image_table.schema) as writer:
        for start in range(0, len(used), _IMAGES):
            writer.write_table(store.image_table.take(used[start : start + _IMAGES]))
    return new
