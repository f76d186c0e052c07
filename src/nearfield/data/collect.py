"""The first pass of a build: rows are read and checked, texts and images become items on disk, examples row numbers."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import pyarrow as pa

from nearfield.console import track
from nearfield.data.items import (
    BadRowError,
    Example,
    ImageItem,
    ImagePreparer,
    Item,
    PreparedImage,
    identity,
    read_example,
    with_images,
)
from nearfield.data.readers import ReaderBase, Row
from nearfield.data.store import IMAGE, IMAGES_FILE, IMAGES_SCHEMA, ITEMS_SCHEMA
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.data.config import DataConfig, SourceConfig

_BATCH_ROWS = 32_768
_BATCH_IMAGES = 4096
_BATCH_BYTES = 16 << 20

RAW_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("query", pa.int64()),
        ("positives", pa.large_list(pa.int64())),
        ("negatives", pa.large_list(pa.int64())),
        ("score", pa.float64()),
        ("label", pa.large_string()),
        ("group", pa.large_string()),
        ("cluster", pa.large_string()),
        ("split_key", pa.large_string()),
        ("weight", pa.float64()),
    ]
)


class TableWriter:
    """Writes rows of a schema to an Arrow stream, batch by batch; what is open is written when the block ends."""

    def __init__(self, path: Path, schema: pa.Schema, batch_rows: int | None = None) -> None:
        self.schema = schema
        self._writer = pa.ipc.new_stream(str(path), schema)
        self._batch_rows = batch_rows or _BATCH_ROWS
        self._columns: list[list[Any]] = [[] for _ in schema]
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._writer.close()

    def add(self, *values: object, size: int = 0) -> None:
        """Append one row, its values in the order of the schema; ``size`` is about how many bytes it takes."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self._size += size
        if len(self._columns[0]) >= self._batch_rows or self._size >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        columns, self._columns, self._size = self._columns, [[] for _ in self.schema], 0
        if columns[0]:
            arrays = [pa.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=self.schema))


class ItemWriter:
    """Gives each item its row number and writes it once, and each image: those with equal pixels are one.

    Held in memory: the 16-byte id and the row number of each item, image and file of an image (about 170 bytes each in
    Python's dictionary), and one batch of texts and of images; never the texts of the data set.
    """

    def __init__(self, items: TableWriter, images: TableWriter | None = None) -> None:
        self._items = items
        self._images = images
        self._rows: dict[bytes, int] = {}
        self._by_file: dict[bytes, int] = {}
        self._by_pixels: dict[bytes, int] = {}
        self._all_ids = bytearray()

    def ids(self) -> bytes:
        """The ids of all items end to end, in the order of rows."""
        return bytes(self._all_ids)

    def knows(self, raw_id: bytes) -> bool:
        """Whether the image of this file is written."""
        return raw_id in self._by_file

    def add(self, item: Item) -> int:
        """The row of an item; one that is new is written."""
        key = identity(item)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self._rows)
            self._all_ids += key
            text = item.text if isinstance(item, ImageItem) else item
            if self._images is None:
                self._items.add(key, text, size=len(text))
            else:
                image = self._image_row(item.image, self._images) if isinstance(item, ImageItem) else None
                self._items.add(key, text, image, size=len(text))
        return row

    def _image_row(self, image: PreparedImage, images: TableWriter) -> int:
        row = self._by_file.get(image.raw_id)
        if row is not None:
            return row
        row = self._by_pixels.get(image.id)
        if row is None:
            row = self._by_pixels[image.id] = len(self._by_pixels)
            images.add(image.id, image.data, *image.size, *image.original, size=len(image.data))
        self._by_file[image.raw_id] = row
        return row


@dataclass
class Collected:
    """The numbers of the first pass that the second one needs."""

    ids: bytes = b""
    """The ids of all items end to end, 16 bytes each."""
    rows: list[int] = field(default_factory=list)
    """Rows read, by source."""
    bad: list[Counter[str]] = field(default_factory=list)
    """Rows that cannot be used, by reason, of each source."""
    positives: array[int] = field(default_factory=lambda: array("q"))
    """Query and positive of all retrieval examples, one after the other."""
    ties: array[int] = field(default_factory=lambda: array("q"))
    """Items that examples of sources with ``group: {kind: duplicates}`` tie together, two by two."""


def collect(config: DataConfig, readers: list[ReaderBase], items: Path, raw: Path, quarantine: Path) -> Collected:
    """Read all sources into ``items`` and ``raw`` (Arrow streams) and ``quarantine`` (JSONL).

    Raises BadInputError where a source has no usable row or too many that are not usable; the quarantine file is
    then complete for that source.
    """
    with contextlib.ExitStack() as stack:
        images, schema = None, ITEMS_SCHEMA
        if any(source.image_rules() is not None for source in config.sources):
            schema = schema.append(IMAGE)
            images = stack.enter_context(TableWriter(items.with_name(IMAGES_FILE), IMAGES_SCHEMA, _BATCH_IMAGES))
        writer = ItemWriter(stack.enter_context(TableWriter(items, schema)), images)
        table = stack.enter_context(TableWriter(raw, RAW_SCHEMA))
        bad = stack.enter_context(quarantine.open("w", encoding="utf-8"))
        collector = _Collector(config, writer, table, bad)
        for number, (source, reader) in enumerate(zip(config.sources, readers, strict=True)):
            collector.read(number, source, reader)
        collector.result.ids = writer.ids()
    return collector.result


class _Collector:
    """Writes what the sources hold, one after the other."""

    def __init__(self, config: DataConfig, items: ItemWriter, table: TableWriter, quarantine: IO[str]) -> None:
        self._config = config
        self._items = items
        self._table = table
        self._quarantine = quarantine
        self.result = Collected()

    def read(self, number: int, source: SourceConfig, reader: ReaderBase) -> None:
        """Read the rows of a source."""
        rules = source.image_rules()
        prepare = None if rules is None else ImagePreparer(rules, self._items.knows)
        folder = source.image_folder()
        count, reasons, first_bad = 0, Counter[str](), ""
        for row in track(reader.rows(source.read_columns()), f"Reading {source.name}"):
            count += 1
            try:
                if row.values is None:
                    raise BadRowError(row.reason, row.excerpt)
                values = row.values if source.images is None else with_images(source.images, row.values, folder)
                self._add(number, source, read_example(source, values, self._config.max_characters, prepare))
            except BadRowError as error:
                reasons[error.reason] += 1
                self._quarantine.write(_entry(source.name, row, error))
                first_bad = first_bad or f"{row.file}:{row.line}: {error.reason}"
        self.result.rows.append(count)
        self.result.bad.append(reasons)
        self._quarantine.flush()
        _check_counts(self._config, source, count, reasons, first_bad)

    def _add(self, number: int, source: SourceConfig, example: Example) -> None:
        query = self._items.add(example.query)
        positives = [self._items.add(item) for item in example.positives]
        negatives = [self._items.add(item) for item in example.negatives]
        if example.score is None:
            for positive in positives:
                self.result.positives.extend((query, positive))
        tie = source.duplicate_groups
        if tie is not None:
            for other in [*positives, *(negatives if tie.negatives else ())]:
                self.result.ties.extend((query, other))
        keys = (example.group, example.cluster, example.split_key)
        self._table.add(number, query, positives, negatives, example.score, example.label, *keys, example.weight)


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
