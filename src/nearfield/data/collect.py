"""The first pass of a build: rows are read and checked, texts and images become items on disk, examples row numbers."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
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
_BATCH_CHARACTERS = 16 << 20
_BATCH_IMAGES = 4096
_BATCH_IMAGE_BYTES = 16 << 20

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


class BatchWriter(ABC):
    """A stream of record batches on disk, closed with what is still open when the block ends."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pa.ipc.new_stream(str(path), schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._writer.close()

    @abstractmethod
    def _take(self) -> list[list[Any]]:
        """The columns of the open rows, in the order of the schema; none is open afterwards."""

    def _flush(self) -> None:
        columns = self._take()
        if columns[0]:
            arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))


class TableWriter(BatchWriter):
    """Writes rows of a schema in batches; columns are lists that are filled side by side."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        super().__init__(path, schema)
        self._columns: list[list[Any]] = [[] for _ in schema]

    def add(self, *values: object) -> None:
        """Append one row, its values in the order of the schema."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        if len(self._columns[0]) >= _BATCH_ROWS:
            self._flush()

    def _take(self) -> list[list[Any]]:
        columns, self._columns = self._columns, [[] for _ in self._schema]
        return columns


class ImageWriter(BatchWriter):
    """Gives each image its row number and writes it once.

    Images with equal pixels are one, whatever their files hold. Held in memory: the ids and row numbers, about 170 bytes
    a file and an image, and one batch of images.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, IMAGES_SCHEMA)
        self._by_file: dict[bytes, int] = {}
        self._by_pixels: dict[bytes, int] = {}
        self._open: list[PreparedImage] = []
        self._bytes = 0

    def knows(self, raw_id: bytes) -> bool:
        """Whether the image of this file is written."""
        return raw_id in self._by_file

    def add(self, image: PreparedImage) -> int:
        """The row of an image; one that is new is written."""
        row = self._by_file.get(image.raw_id)
        if row is not None:
            return row
        row = self._by_pixels.get(image.id)
        if row is None:
            row = self._by_pixels[image.id] = len(self._by_pixels)
            self._open.append(image)
            self._bytes += len(image.data)
            if self._bytes >= _BATCH_IMAGE_BYTES or len(self._open) >= _BATCH_IMAGES:
                self._flush()
        self._by_file[image.raw_id] = row
        return row

    def _take(self) -> list[list[Any]]:
        rows, self._open, self._bytes = self._open, [], 0
        return [
            [image.id for image in rows],
            [image.data for image in rows],
            *([image.size[side] for image in rows] for side in (0, 1)),
            *([image.original[side] for image in rows] for side in (0, 1)),
        ]


class ItemWriter(BatchWriter):
    """Gives each item its row number and writes it once; ``images`` where the store has any.

    Held in memory: the 16-byte id and the row number of each item (about 170 bytes an item in Python's dictionary) and
    the texts of one batch; never the texts of the data set.
    """

    def __init__(self, path: Path, images: ImageWriter | None = None) -> None:
        super().__init__(path, ITEMS_SCHEMA if images is None else ITEMS_SCHEMA.append(IMAGE))
        self._images = images
        self._rows: dict[bytes, int] = {}
        self._all_ids = bytearray()
        self._open: list[tuple[bytes, str, int | None]] = []
        self._characters = 0

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self) -> bytes:
        """The ids of all items end to end, in the order of rows."""
        return bytes(self._all_ids)

    def add(self, item: Item) -> int:
        """The row of an item; one that is new is written."""
        key = identity(item)
        row = self._rows.get(key)
        if row is not None:
            return row
        row = self._rows[key] = len(self._rows)
        image = self._images.add(item.image) if isinstance(item, ImageItem) and self._images is not None else None
        text = item.text if isinstance(item, ImageItem) else item
        self._all_ids += key
        self._open.append((key, text, image))
        self._characters += len(text)
        if len(self._open) >= _BATCH_ROWS or self._characters >= _BATCH_CHARACTERS:
            self._flush()
        return row

    def _take(self) -> list[list[Any]]:
        rows, self._open, self._characters = self._open, [], 0
        return [[row[column] for row in rows] for column in range(len(self._schema))]


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
        images = None
        if any(source.image_rules() is not None for source in config.sources):
            images = stack.enter_context(ImageWriter(items.with_name(IMAGES_FILE)))
        writer = stack.enter_context(ItemWriter(items, images))
        table = stack.enter_context(TableWriter(raw, RAW_SCHEMA))
        bad = stack.enter_context(quarantine.open("w", encoding="utf-8"))
        collector = _Collector(config, writer, images, table, bad)
        for number, (source, reader) in enumerate(zip(config.sources, readers, strict=True)):
            collector.read(number, source, reader)
        collector.result.ids = writer.ids()
    return collector.result


class _Collector:
    """Writes what the sources hold, one after the other."""

    def __init__(
        self, config: DataConfig, items: ItemWriter, images: ImageWriter | None, table: TableWriter, quarantine: IO[str]
    ) -> None:
        self._config = config
        self._items = items
        self._images = images
        self._table = table
        self._quarantine = quarantine
        self.result = Collected()

    def read(self, number: int, source: SourceConfig, reader: ReaderBase) -> None:
        """Read the rows of a source."""
        rules = source.image_rules()
        prepare = None if rules is None or self._images is None else ImagePreparer(rules, self._images.knows)
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
