"""The plan file: one epoch's batches as Parquet, to be read, plotted, diffed and followed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.arrays import Floats, Ragged, Rows
from nearfield.batching.planner import EpochBatches
from nearfield.batching.streams import PlannedRows
from nearfield.batching.summary import summarise
from nearfield.checksums import Sealed
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, hash_file

VERSION = 3
_METADATA_KEY = b"nearfield.plan"

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("slot", pa.int32()),
        ("example", pa.int64()),
        ("query", pa.int64()),
        ("positives", pa.large_list(pa.int64())),
        ("negatives", pa.large_list(pa.int64())),
        ("query_prompt", pa.int32()),
        ("document_prompt", pa.int32()),
        ("query_tokens", pa.int32()),
        ("document_tokens", pa.int32()),
        ("source", pa.int32()),
        ("stratum", pa.int32()),
    ]
)
OPTIONAL = pa.schema([("score", pa.float64()), ("label", pa.int32())])
"""Columns of plans whose examples have a score or a label; null where an example of such a plan has none."""

SEVERAL_SOURCES = -1
"""The source of a batch that has examples of several."""

Lengths = Callable[[int, Rows], Rows]
"""(prompt number, item rows) -> tokens of each."""
PromptsOf = Callable[[PlannedRows], tuple[Rows, Rows]]
"""Rows -> the (query, document) prompt numbers of each."""


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
    """``SEVERAL_SOURCES`` where the examples have not one source; prompts are by row."""
    score: Floats | None = None
    """(B,) of graded pairs; not a number where an example has none. None where no example of the plan has one."""
    label: Rows | None = None
    """(B,) of labelled examples, -1 where an example has none: the same number is the same label of the same source."""
    sources: Rows | None = None
    """(B,) the source of each example, where they have several."""


def write_plan(
    path: Path,
    epoch: EpochBatches,
    prompts: Mapping[int, tuple[int, int]] | PromptsOf,
    lengths: Lengths,
    metadata: dict[str, Any],
    *,
    names: Mapping[int, str] | None = None,
    measured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an epoch's plan and return its summary: see :func:`nearfield.batching.summary.summarise`.

    ``prompts`` gives each source's (query, document) prompt numbers, or those of each row; ``names`` the sources' names;
    ``metadata`` names the inputs (seed, epoch, fingerprints); ``measured`` holds further figures of the batches.
    Both, and the summary, are kept in the file.
    """
    rows = epoch.rows
    if isinstance(prompts, Mapping):
        query_prompt, document_prompt = (_of_source(rows.source, prompts, side) for side in (0, 1))
    else:
        query_prompt, document_prompt = prompts(rows)
    query_tokens, document_tokens = count_tokens(rows, query_prompt, document_prompt, lengths)
    step = epoch.batch_of_rows()
    columns: dict[str, Any] = {
        "step": step,
        "slot": np.arange(len(rows)) - epoch.offsets[step],
        "example": rows.example,
        "query": rows.query,
        "positives": rows.positives.to_arrow(),
        "negatives": rows.negatives.to_arrow(),
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "query_tokens": query_tokens,
        "document_tokens": document_tokens,
        "source": rows.source,
        "stratum": rows.stratum,
    }
    schema = SCHEMA
    if np.isfinite(rows.score).any():
        columns["score"] = pa.array(rows.score, pa.float64(), from_pandas=True)
        schema = schema.append(OPTIONAL.field("score"))
    if (rows.label >= 0).any():
        columns["label"] = pa.array(rows.label, pa.int32(), mask=rows.label < 0)
        schema = schema.append(OPTIONAL.field("label"))
    summary = summarise(epoch, query_tokens + document_tokens, names or {}) | (measured or {})
    metadata = {"version": VERSION, **metadata, "summary": summary}
    table = pa.table({name: _narrow(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    with atomic_path(path) as aside:
        pq.write_table(table, aside, compression="zstd")
    return {"epoch": metadata.get("epoch"), "file": path.name, "hash": hash_file(path), **summary}


def _of_source(source: Rows, prompts: Mapping[int, tuple[int, int]], side: int) -> Rows:
    table = np.full(max([*prompts, int(source.max(initial=-1))], default=-1) + 1, -1, dtype=np.int64)
    for number, pair in prompts.items():
        table[number] = pair[side]
    return table[source]


def _narrow(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values.astype(kind.to_pandas_dtype(), copy=False))


def count_tokens(rows: PlannedRows, query_prompt: Rows, document_prompt: Rows, lengths: Lengths) -> tuple[Rows, Rows]:
    """Tokens of each row's query, and of all its documents together."""
    queries, documents = np.zeros(len(rows), dtype=np.int64), rows.documents()
    for prompt in np.unique(query_prompt).tolist():
        mine = query_prompt == prompt
        queries[mine] = lengths(prompt, rows.query[mine])
    each = np.zeros(len(documents.values), dtype=np.int64)
    prompt_of = np.repeat(document_prompt, documents.lengths)
    for prompt in np.unique(prompt_of).tolist():
        mine = prompt_of == prompt
        each[mine] = lengths(prompt, documents.values[mine])
    return queries, Ragged(documents.offsets, each).sums()


class Plan:
    """An opened plan of one epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mend = "Plan again: `nearfield plan RECIPE` replaces a plan that is damaged."
        sealed = Sealed(path.parent, mend)
        if path.name in sealed.files:
            sealed.file(path.name, whole=True)
        try:
            table = pq.read_table(path, memory_map=True)
        except FileNotFoundError as error:
            raise BadInputError(
                "this plan does not exist", where=str(path), hint="Run `nearfield plan RECIPE`."
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(f"this is not a readable plan: {error}", where=str(path), hint=mend) from error
        raw = (table.schema.metadata or {}).get(_METADATA_KEY)
        missing = [name for name in SCHEMA.names if name not in table.schema.names]
        if raw is None or missing:
            detail = f"the columns {', '.join(missing)} are missing" if missing else "its metadata is missing"
            raise BadInputError(f"this Parquet file is not a plan: {detail}", where=str(path), hint=mend)
        self.metadata: dict[str, Any] = json.loads(raw)
        if self.metadata["version"] != VERSION:
            raise BadInputError(
                f"this plan has version {self.metadata['version']}; {VERSION} is wanted",
                where=str(path),
                hint="Plan again: `nearfield plan RECIPE`.",
            )
        # One chunk a column, so that a batch is a slice of an array wherever it is.
        self.table = table.combine_chunks()
        steps = self.table["step"].to_numpy()
        if len(steps) and (np.diff(steps) < 0).any():
            raise BadInputError("the steps of this plan are not in order", where=str(path))
        self._starts = np.searchsorted(steps, np.arange(int(steps[-1]) + 2)) if len(steps) else np.zeros(1, np.int64)
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._starts) - 1

    def column(self, name: str) -> Rows:
        """A column of numbers as an array, shape (rows,)."""
        if name not in self._columns:
            values = self.table[name]
            if name == "label":
                values = values.fill_null(-1)
            kind = np.float64 if name == "score" else np.int64
            self._columns[name] = values.to_numpy().astype(kind)
        column: Rows = self._columns[name]
        return column

    def lists(self, name: str) -> Ragged:
        """The column ``positives`` or ``negatives``."""
        if name not in self._columns:
            self._columns[name] = Ragged.from_arrow(self.table[name])
        lists: Ragged = self._columns[name]
        return lists

    def batch(self, step: int) -> Batch:
        """The batch of one step, in time that does not depend on the step."""
        start, stop = int(self._starts[step]), int(self._starts[step + 1])

        def column(name: str) -> Rows:
            return self.column(name)[start:stop]

        def lists(name: str) -> list[Rows]:
            return [self.lists(name)[row] for row in range(start, stop)]

        source = column("source")
        several = bool((source != source[0]).any())
        has = self.table.schema.names
        return Batch(
            example=column("example"),
            query=column("query"),
            positives=lists("positives"),
            negatives=lists("negatives"),
            query_prompt=column("query_prompt"),
            document_prompt=column("document_prompt"),
            source=SEVERAL_SOURCES if several else int(source[0]),
            score=self.column("score").astype(np.float64)[start:stop] if "score" in has else None,
            label=column("label") if "label" in has else None,
            sources=source if several else None,
        )

    def sources(self) -> Rows:
        """(steps,) the source of each batch, ``SEVERAL_SOURCES`` where it has several."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        source, starts = self.column("source"), self._starts[:-1]
        least, most = np.minimum.reduceat(source, starts), np.maximum.reduceat(source, starts)
        sources: Rows = np.where(least == most, least, SEVERAL_SOURCES)
        return sources

    def epoch(self) -> EpochBatches:
        """The rows of the plan as a planner made them."""
        has = self.table.schema.names
        rows = PlannedRows.of(
            self.column("source"),
            self.column("example"),
            self.column("query"),
            self.lists("positives"),
            self.lists("negatives"),
            stratum=self.column("stratum"),
            score=self.column("score").astype(np.float64) if "score" in has else None,
            label=self.column("label") if "label" in has else None,
        )
        return EpochBatches(rows, self._starts.astype(np.int64))

    def tokens(self) -> Rows:
        """Real tokens of each step, shape (steps,)."""
        total = self.column("query_tokens") + self.column("document_tokens")
        sums: Rows = np.add.reduceat(total, self._starts[:-1]) if len(self) else np.zeros(0, np.int64)
        return sums


def total_steps(plans: Sequence[Plan], max_steps: int | None) -> int:
    """Steps of a run over these epochs, at most ``max_steps``."""
    steps = sum(len(plan) for plan in plans)
    return steps if max_steps is None else min(steps, max_steps)


def plan_files(path: Path) -> list[Path]:
    """The plan files, one an epoch, of a file, a ``plan`` folder or a run's folder."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise BadInputError("there is no plan", where=str(path), hint="Name a run's folder, its plan folder or a file.")
    files = sorted(path.glob("epoch-*.parquet")) or sorted((path / "plan").glob("epoch-*.parquet"))
    if not files:
        raise BadInputError(
            "this folder has no plan: neither epoch-*.parquet nor plan/epoch-*.parquet",
            where=str(path),
            hint="Write one: nearfield plan RECIPE.",
        )
    return files
