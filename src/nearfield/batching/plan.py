"""The plan file: one epoch's batches as Parquet, to be read, plotted, diffed and followed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.batching.planner import EpochBatches, Rows
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, hash_file

VERSION = 1
_METADATA_KEY = b"nearfield.plan"

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("slot", pa.int32()),
        ("example", pa.int64()),
        ("query", pa.int64()),
        ("positives", pa.list_(pa.int64())),
        ("negatives", pa.list_(pa.int64())),
        ("query_prompt", pa.int32()),
        ("document_prompt", pa.int32()),
        ("query_tokens", pa.int32()),
        ("document_tokens", pa.int32()),
        ("source", pa.int32()),
        ("stratum", pa.int32()),
    ]
)

Lengths = Callable[[int, Rows], Rows]
"""(prompt number, item rows) -> tokens of each."""


@dataclass(frozen=True)
class Batch:
    """One step of the plan: B examples with their items, as rows of the store."""

    example: Rows
    query: Rows
    positives: list[Rows]
    negatives: list[Rows]
    query_prompt: Rows
    document_prompt: Rows
    source: int


def write_plan(
    path: Path,
    epoch: EpochBatches,
    prompts: dict[int, tuple[int, int]],
    lengths: Lengths,
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """Write an epoch's plan and return its summary: batches, rows, tokens, batches a source, what was dropped and why.

    ``prompts`` gives each source's (query, document) prompt numbers; ``metadata`` names the inputs (seed, epoch,
    fingerprints) and is kept in the file.
    """
    rows = [row for batch in epoch.batches for row in batch]
    steps = [step for step, batch in enumerate(epoch.batches) for _ in batch]
    slots = [slot for batch in epoch.batches for slot in range(len(batch))]
    query_tokens = np.zeros(len(rows), dtype=np.int64)
    document_tokens = np.zeros(len(rows), dtype=np.int64)
    for source, (query_prompt, document_prompt) in prompts.items():
        mine = [i for i, row in enumerate(rows) if row.source == source]
        if not mine:
            continue
        query_tokens[mine] = lengths(query_prompt, np.asarray([rows[i].query for i in mine], dtype=np.int64))
        documents = [np.concatenate([rows[i].positives, rows[i].negatives]) for i in mine]
        flat = lengths(document_prompt, np.concatenate(documents).astype(np.int64))
        owner = np.repeat(np.arange(len(mine)), [len(part) for part in documents])
        document_tokens[mine] = np.bincount(owner, weights=flat, minlength=len(mine)).astype(np.int64)
    table = pa.table(
        {
            "step": steps,
            "slot": slots,
            "example": [row.example for row in rows],
            "query": [row.query for row in rows],
            "positives": [row.positives for row in rows],
            "negatives": [row.negatives for row in rows],
            "query_prompt": [prompts[row.source][0] for row in rows],
            "document_prompt": [prompts[row.source][1] for row in rows],
            "query_tokens": query_tokens,
            "document_tokens": document_tokens,
            "source": [row.source for row in rows],
            "stratum": [row.stratum for row in rows],
        },
        schema=SCHEMA,
    )
    metadata = {"version": VERSION, **metadata}
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    with atomic_path(path) as aside:
        pq.write_table(table, aside, compression="zstd")
    sources = Counter(batch[0].source for batch in epoch.batches)
    return {
        "epoch": metadata.get("epoch"),
        "file": path.name,
        "hash": hash_file(path),
        "batches": len(epoch.batches),
        "rows": len(rows),
        "tokens": int(query_tokens.sum() + document_tokens.sum()),
        "batches_by_source": {str(source): count for source, count in sorted(sources.items())},
        "dropped": dict(sorted(epoch.dropped.items())),
    }


class Plan:
    """An opened plan of one epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.table = pq.read_table(path, memory_map=True)
        except FileNotFoundError as error:
            raise BadInputError(
                "this plan does not exist", where=str(path), hint="Run `nearfield plan RECIPE`."
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(f"this is not a readable plan: {error}", where=str(path)) from error
        raw = (self.table.schema.metadata or {}).get(_METADATA_KEY)
        missing = [name for name in SCHEMA.names if name not in self.table.schema.names]
        if raw is None or missing:
            detail = f"the columns {', '.join(missing)} are missing" if missing else "its metadata is missing"
            raise BadInputError(f"this Parquet file is not a plan: {detail}", where=str(path))
        self.metadata: dict[str, Any] = json.loads(raw)
        if self.metadata["version"] != VERSION:
            raise BadInputError(
                f"this plan has version {self.metadata['version']}; {VERSION} is wanted",
                where=str(path),
                hint="Plan again: `nearfield plan RECIPE`.",
            )
        steps = self.table["step"].to_numpy()
        if len(steps) and (np.diff(steps) < 0).any():
            raise BadInputError("the steps of this plan are not in order", where=str(path))
        self._starts = np.searchsorted(steps, np.arange(int(steps[-1]) + 2)) if len(steps) else np.zeros(1, np.int64)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._starts) - 1

    def batch(self, step: int) -> Batch:
        """The batch of one step, in time that does not depend on the step."""
        start, stop = int(self._starts[step]), int(self._starts[step + 1])
        part = self.table.slice(start, stop - start)

        def column(name: str) -> Rows:
            values: Rows = part[name].to_numpy().astype(np.int64)
            return values

        def lists(name: str) -> list[Rows]:
            return [np.asarray(value, dtype=np.int64) for value in part[name].to_pylist()]

        return Batch(
            example=column("example"),
            query=column("query"),
            positives=lists("positives"),
            negatives=lists("negatives"),
            query_prompt=column("query_prompt"),
            document_prompt=column("document_prompt"),
            source=int(part["source"][0].as_py()),
        )

    def tokens(self) -> Rows:
        """Real tokens of each step, shape (steps,)."""
        total = self.table["query_tokens"].to_numpy().astype(np.int64) + self.table["document_tokens"].to_numpy()
        sums: Rows = np.add.reduceat(total, self._starts[:-1]) if len(self) else np.zeros(0, np.int64)
        return sums


def total_steps(plans: Sequence[Plan], max_steps: int | None) -> int:
    """Steps of a run over these epochs, at most ``max_steps``."""
    steps = sum(len(plan) for plan in plans)
    return steps if max_steps is None else min(steps, max_steps)
