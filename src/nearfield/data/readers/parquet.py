"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.data.readers.base import Row, excerpt, files_at, hash_files
from nearfield.data.readers.delimited import check_header
from nearfield.errors import BadInputError

SUFFIXES = (".parquet",)
_BATCH_ROWS = 1024


class ParquetFiles:
    """The rows of one file or of a folder of files."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def inputs(self) -> dict[str, str]:
        return hash_files(files_at(self._path, SUFFIXES, "Parquet"))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in files_at(self._path, SUFFIXES, "Parquet"):
            yield from read_parquet(file, columns)


def read_parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file with the given columns (all, if none are given); lines are row numbers from 1."""
    try:
        with pq.ParquetFile(path) as file:
            check_header(file.schema_arrow.names, columns, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns) or None):
                yield from batch_rows(batch, path.name, number)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        message = str(error).splitlines()[0][:200]
        raise BadInputError(f"this is not a readable Parquet file ({message})", where=str(path)) from error


def batch_rows(batch: pa.RecordBatch, name: str, before: int) -> Iterator[Row]:
    """The rows of a record batch that follows ``before`` rows; text that is no UTF-8 spoils its own row only."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield Row(name, before + index + 1, batch.slice(index, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield Row(name, before + index + 1, None, "not UTF-8", excerpt(error.object))
        return
    for index, value in enumerate(values):
        yield Row(name, before + index + 1, value)
