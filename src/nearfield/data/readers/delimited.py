"""Comma- and tab-separated values with a header line."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from nearfield.data.readers.base import Row, excerpt, files_at, hash_files, open_bytes
from nearfield.errors import BadInputError

MAX_CELL_CHARACTERS = 16 << 20
SUFFIXES = tuple(f"{kind}{packed}" for kind in (".csv", ".tsv") for packed in ("", ".gz", ".xz", ".zst"))


class DelimitedFiles:
    """The rows of one file or of a folder of files."""

    def __init__(self, path: Path, delimiter: str | None = None) -> None:
        self._path = path
        self._delimiter = delimiter

    def inputs(self) -> dict[str, str]:
        return hash_files(files_at(self._path, SUFFIXES, "CSV or TSV"))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in files_at(self._path, SUFFIXES, "CSV or TSV"):
            yield from read_delimited(file, self._delimiter, columns)


def delimiter_of(path: Path) -> str:
    """A tab for .tsv files (packed or not), a comma for all others."""
    return "\t" if ".tsv" in path.suffixes[-2:] else ","


def read_delimited(path: Path, delimiter: str | None = None, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file; a row's line is the one it begins on.

    Raises BadInputError where the file, its header or one of ``columns`` in it is not there.
    """
    # The module's limit is global; it is only ever raised, to what a text may hold.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))
    with open_bytes(path) as file:
        reader = csv.reader(_text(file, path), delimiter=delimiter or delimiter_of(path), strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise BadInputError(f"the header line cannot be read ({error})", where=f"{path}:1") from error
        check_header(header, columns, f"{path}:1")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(path.name, line, None, "not valid CSV", str(error))
                continue
            if cells:
                yield _row(path.name, line, header, cells)


def _row(name: str, line: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        return Row(name, line, None, "wrong number of cells", f"{len(cells)} of {len(header)}: {excerpt(cells)}")
    for cell in cells:
        # Bytes that are no UTF-8 were read as lone surrogates.
        if not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell):
            return Row(name, line, None, "not UTF-8", excerpt(cell))
    return Row(name, line, dict(zip(header, cells, strict=True)))


def _text(file: IO[bytes], path: Path) -> Iterator[str]:
    first = True
    # A line over the limit comes in pieces; within quotes they are one cell, which the csv module then refuses.
    while line := file.readline(MAX_CELL_CHARACTERS * 4):
        if first:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise BadInputError("this file is UTF-16, not UTF-8", where=str(path), hint="Save it as UTF-8.")
            line = line.removeprefix(b"\xef\xbb\xbf")
            first = False
        yield line.decode("utf-8", "surrogateescape")


def check_header(header: Sequence[str], columns: Iterable[str], where: str) -> None:
    """Refuse a header without names, with a name twice, or without one of the columns that the recipe names."""
    if not header:
        raise BadInputError("this file is empty", where=where, hint="The first line must name the columns.")
    for name in header:
        if header.count(name) > 1:
            raise BadInputError(f"the header names the column {name!r} twice", where=where, hint="Rename one.")
    for name in columns:
        if name not in header:
            close = difflib.get_close_matches(name, header, n=1)
            nearest = f"Did you mean {close[0]!r}? " if close else ""
            shown = ", ".join(header[:30])
            raise BadInputError(f"there is no column {name!r}", where=where, hint=f"{nearest}Columns here: {shown}.")
