"""The first pass of a build: rows are read and checked, their texts become items, their examples row numbers."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nearfield.console import track
from nearfield.data.config import DataConfig, DuplicateGroups, SourceConfig
from nearfield.data.examples import BadRowError, Prepare, read_example
from nearfield.data.picture_columns import folder_of, joined
from nearfield.data.picture_files import PictureWriter, Preparer
from nearfield.data.readers.base import Reader, Row
from nearfield.data.store import IMAGE, ITEMS_SCHEMA, PICTURES
from nearfield.data.writing import ItemWriter, TableWriter
from nearfield.errors import BadInputError

Rows = npt.NDArray[np.int64]

RAW_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("query", pa.int64()),
        ("positives", pa.list_(pa.int64())),
        ("negatives", pa.list_(pa.int64())),
        ("score", pa.float64()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("cluster", pa.string()),
        ("split_key", pa.string()),
        ("weight", pa.float64()),
    ]
)


class PairList:
    """Pairs of item rows, 16 bytes each."""

    def __init__(self) -> None:
        self._parts: list[Rows] = []
        self._open: list[tuple[int, int]] = []

    def add(self, first: int, second: int) -> None:
        self._open.append((first, second))
        if len(self._open) >= 1 << 16:
            self._close()

    def _close(self) -> None:
        self._parts.append(np.asarray(self._open, dtype=np.int64).reshape(-1, 2))
        self._open = []

    def array(self) -> Rows:
        """[pairs, 2]"""
        self._close()
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]


@dataclass
class Collected:
    """What the first pass found out."""

    ids: bytes = b""
    """The ids of all items end to end, 16 bytes each."""
    rows: list[int] = field(default_factory=list)
    """Rows read, by source."""
    bad: list[Counter[str]] = field(default_factory=list)
    positives: PairList = field(default_factory=PairList)
    """(query, positive) of all retrieval examples."""
    ties: PairList = field(default_factory=PairList)
    """Items that examples of sources with ``group: {kind: duplicates}`` tie together."""


def collect(config: DataConfig, readers: list[Reader], items: Path, raw: Path, quarantine: Path) -> Collected:
    """Read all sources into ``items`` and ``raw`` (Arrow streams) and ``quarantine`` (JSONL).

    Raises BadInputError where a source has no usable row or too many that are not usable; the quarantine file is
    then complete for that source.
    """
    result = Collected()
    with contextlib.ExitStack() as stack:
        pictures, schema = None, ITEMS_SCHEMA
        if any(source.pictures() is not None for source in config.sources):
            pictures, schema = stack.enter_context(PictureWriter(items.with_name(PICTURES))), ITEMS_SCHEMA.append(IMAGE)
        writer = stack.enter_context(ItemWriter(items, schema, pictures))
        table = stack.enter_context(TableWriter(raw, RAW_SCHEMA))
        bad = stack.enter_context(quarantine.open("w", encoding="utf-8"))
        for number, (source, reader) in enumerate(zip(config.sources, readers, strict=True)):
            rules = source.pictures()
            prepare = None if rules is None or pictures is None else Preparer(rules, pictures)
            _collect_source(config, number, source, reader, result, writer, table, bad, prepare)
        result.ids = writer.ids()
    return result


def _collect_source(
    config: DataConfig,
    number: int,
    source: SourceConfig,
    reader: Reader,
    result: Collected,
    items: ItemWriter,
    table: TableWriter,
    quarantine: IO[str],
    prepare: Prepare | None,
) -> None:
    count = 0
    reasons: Counter[str] = Counter()
    first_bad = ""
    folder = folder_of(source)
    tie = source.group if isinstance(source.group, DuplicateGroups) else None
    for row in track(reader.rows(source.read_columns()), f"Reading {source.name}"):
        count += 1
        try:
            if row.values is None:
                raise BadRowError(row.reason, row.excerpt)
            values = row.values if source.images is None else joined(source.images, row.values, folder)
            example = read_example(source, values, config.max_characters, prepare)
        except BadRowError as error:
            reasons[error.reason] += 1
            quarantine.write(_entry(source.name, row, error))
            first_bad = first_bad or f"{row.file}:{row.line}: {error.reason}"
            continue
        query = items.add(example.query)
        positives = [items.add(item) for item in example.positives]
        negatives = [items.add(item) for item in example.negatives]
        if example.score is None:
            for positive in positives:
                result.positives.add(query, positive)
        if tie is not None:
            for other in [*positives, *(negatives if tie.negatives else ())]:
                result.ties.add(query, other)
        table.add(
            number,
            query,
            positives,
            negatives,
            example.score,
            example.label,
            example.group,
            example.cluster,
            example.split_key,
            example.weight,
        )
    result.rows.append(count)
    result.bad.append(reasons)
    quarantine.flush()
    _check_counts(config, source, count, reasons, first_bad)


def _entry(source: str, row: Row, error: BadRowError) -> str:
    entry = {"source": source, "file": row.file, "line": row.line, "reason": error.reason, "excerpt": error.excerpt}
    return json.dumps(entry, ensure_ascii=True) + "\n"


def _check_counts(config: DataConfig, source: SourceConfig, rows: int, reasons: Counter[str], first: str) -> None:
    bad = reasons.total()
    if rows == 0:
        raise BadInputError(f"the source {source.name!r} is empty: there is no row to read", hint="Check its reader.")
    if bad > config.max_bad_rows * rows or bad == rows:
        common = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(5))
        raise BadInputError(
            f"the source {source.name!r}: {bad:,} of {rows:,} rows cannot be used ({bad / rows:.1%}, allowed are "
            f"{config.max_bad_rows:.1%}): {common}; the first is {first}"
        )
