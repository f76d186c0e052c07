"""A table of whatever kind its name says: JSONL, CSV, TSV or Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nearfield.data.readers import delimited, jsonl, parquet
from nearfield.data.readers.base import Row, files_at
from nearfield.errors import BadInputError

SUFFIXES = (*jsonl.SUFFIXES, *delimited.SUFFIXES, *parquet.SUFFIXES)


def table_files(path: Path) -> list[Path]:
    """The file at ``path``, or the tables in the folder at ``path``."""
    return files_at(path, SUFFIXES, "JSONL, CSV or Parquet")


def read_table(file: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file with all its columns; ``columns`` must be among them where the file has a header."""
    if file.name.endswith(parquet.SUFFIXES):
        for number, row in enumerate(parquet.read_parquet(file)):
            if not number and row.values is not None:
                delimited.check_header(list(row.values), columns, str(file))
            yield row
    elif file.name.endswith(delimited.SUFFIXES):
        yield from delimited.read_delimited(file, None, columns)
    elif file.name.endswith(jsonl.SUFFIXES):
        yield from jsonl.read_jsonl(file)
    else:
        raise BadInputError("this is no table", where=str(file), hint=f"Wanted: {', '.join(SUFFIXES)}.")
