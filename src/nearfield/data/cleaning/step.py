"""What every step is, and how what it takes out is written down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np

from nearfield.data.cleaning.table import ExampleTable, Members
from nearfield.data.near import Encode
from nearfield.data.readers.base import excerpt
from nearfield.data.store import Rows
from nearfield.errors import BadInputError

Encoders = Callable[[str], Encode]
"""The name of a model -> its ``encode``; loaded when it is first called."""


def no_encoders(model: str) -> Encode:
    """What a build has that nobody handed an encoder in."""
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


class Step(Protocol):
    """A step of the cleaning."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out of the examples of the sources what should go, and write it down."""
        ...


def take_out_texts(
    table: ExampleTable, examples: Rows, sides: Sequence[str], bad: dict[int, str], taken: Taken
) -> None:
    """Take the items in ``bad`` (row -> reason) out of some sides of the examples.

    An example goes with its query or with its last positive. Negatives go alone.
    """
    rows = np.fromiter(bad, dtype=np.int64, count=len(bad))
    mine = np.zeros(len(table), dtype=np.bool_)
    mine[examples] = True
    if "query" in sides:
        gone = np.flatnonzero(mine & np.isin(table.query, rows)).astype(np.int64)
        reasons = [f"query: {bad[row]}" for row in table.query[gone].tolist()]
        taken.reasons.update(reasons)
        taken.write(gone, "example", reasons, table.query[gone])
        table.alive[gone] = mine[gone] = False
    for side in ("positives", "negatives"):
        if side not in sides:
            continue
        members: Members = getattr(table, side)
        hit = np.flatnonzero(members.alive & mine[members.owners] & np.isin(members.rows, rows)).astype(np.int64)
        members.alive[hit] = False
        owners, texts = members.owners[hit], members.rows[hit]
        if side == "negatives":
            taken.members["negatives"] += len(hit)
            taken.write(owners, "negative", [bad[row] for row in texts.tolist()], texts)
            continue
        left = np.bincount(members.owners[members.alive], minlength=len(table))
        empty = left[owners] == 0
        last = np.unique(owners[empty], return_index=True)[1]
        gone, last_texts = owners[empty][last], texts[empty][last]
        reasons = [f"positive: {bad[row]}" for row in last_texts.tolist()]
        taken.reasons.update(reasons)
        taken.write(gone, "example", reasons, last_texts)
        table.alive[gone] = mine[gone] = False
        taken.members["positives"] += int(np.count_nonzero(~empty))
        taken.write(owners[~empty], "positive", [bad[row] for row in texts[~empty].tolist()], texts[~empty])
