"""The first pass of a build: texts become items on disk, examples become row numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from nearfield.data.examples import Item, PictureItem, identity

if TYPE_CHECKING:
    from nearfield.data.picture_files import PictureWriter

_BATCH_ROWS = 32_768
_BATCH_CHARACTERS = 16 << 20


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


class ItemWriter(BatchWriter):
    """Gives each item its row number and writes it once; ``pictures`` where the store has any.

    Held in memory: the 16-byte id and the row number of each item (about 170 bytes an item in Python's dictionary) and
    the texts of one batch; never the texts of the data set.
    """

    def __init__(self, path: Path, schema: pa.Schema, pictures: PictureWriter | None = None) -> None:
        super().__init__(path, schema)
        self._pictures = pictures
        self._images: list[int | None] = []
        self._rows: dict[bytes, int] = {}
        self._all_ids = bytearray()
        self._texts: list[str] = []
        self._ids: list[bytes] = []
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
        text = item.text if isinstance(item, PictureItem) else item
        self._ids.append(key)
        self._all_ids += key
        self._texts.append(text)
        if self._pictures is not None:
            self._images.append(self._pictures.add(item.picture) if isinstance(item, PictureItem) else None)
        self._characters += len(text)
        if len(self._ids) >= _BATCH_ROWS or self._characters >= _BATCH_CHARACTERS:
            self._flush()
        return row

    def _take(self) -> list[list[Any]]:
        columns: list[list[Any]] = [self._ids, self._texts]
        if self._pictures is not None:
            columns.append(self._images)
        self._ids, self._texts, self._images, self._characters = [], [], [], 0
        return columns


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
