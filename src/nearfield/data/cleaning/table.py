"""The examples of a store while steps take things out of them: row numbers and what of them is still there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.data.store import Rows, Store

Mask = npt.NDArray[np.bool_]
_BATCH = 4096


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
        lists = column.combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        rows = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(rows, np.repeat(np.arange(len(lengths)), lengths), np.ones(len(rows), dtype=np.bool_))

    def lists(self, count: int) -> list[list[int]]:
        """What is alive, by example."""
        kept = np.flatnonzero(self.alive)
        ends = np.searchsorted(self.owners[kept], np.arange(count + 1))
        rows = self.rows[kept].tolist()
        return [rows[start:stop] for start, stop in itertools.pairwise(ends.tolist())]


class ExampleTable:
    """All examples of a store; steps turn what they take out to ``False`` in the masks."""

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

    def counts(self) -> dict[str, int]:
        """Examples that are still there, by source."""
        found = np.bincount(self.source[self.alive], minlength=len(self.store.sources)).tolist()
        return {source.name: count for source, count in zip(self.store.sources, found, strict=True)}

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
                members: Members = getattr(self, side)
                parts.append(members.rows[members.alive & mine[members.owners]])
        return np.unique(np.concatenate(parts))

    def texts(self, items: Rows) -> Iterator[tuple[Rows, list[str]]]:
        """Items and their texts, batch by batch."""
        for start in range(0, len(items), _BATCH):
            part = items[start : start + _BATCH]
            yield part, self.store.texts(part)
