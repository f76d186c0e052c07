"""JSON Lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from nearfield.data.readers.base import Row, excerpt, files_at, hash_files, open_bytes
from nearfield.errors import BadInputError

MAX_LINE_BYTES = 64 << 20
"""A longer line is not read into memory but skipped and reported."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.xz", ".ndjson.zst")
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class JsonlFiles:
    """The rows of one file or of a folder of files."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def inputs(self) -> dict[str, str]:
        return hash_files(files_at(self._path, SUFFIXES, "JSONL"))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in files_at(self._path, SUFFIXES, "JSONL"):
            yield from read_jsonl(file)


def read_jsonl(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """Yield the rows of a JSONL file; blank lines are no rows. Raises BadInputError where the file cannot be read."""
    with open_bytes(path) as file:
        for number, (line, whole) in enumerate(_lines(file, max_line_bytes), start=1):
            if number == 1:
                if line.startswith(_UTF16_MARKS):
                    raise BadInputError("this file is UTF-16, not UTF-8", where=str(path), hint="Save it as UTF-8.")
                line = line.removeprefix(_UTF8_MARK)
            if not whole:
                yield Row(path.name, number, None, f"line longer than {max_line_bytes:,} bytes", excerpt(line))
            elif line.strip():
                yield parse_line(path.name, number, line)


def _lines(file: IO[bytes], limit: int) -> Iterator[tuple[bytes, bool]]:
    """Lines, and whether each is whole; of a line over the limit only the beginning is kept."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line, True
            continue
        beginning = line[:1000]
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)
        yield beginning, False


def parse_line(name: str, number: int, line: bytes) -> Row:
    """One line as a row. Objects nested too deep and numbers too long are bad JSON, not crashes."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Row(name, number, None, "not UTF-8", f"byte {error.start}: {excerpt(line)}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Row(name, number, None, "not valid JSON", excerpt(text.rstrip("\r\n")))
    if not isinstance(value, dict):
        return Row(name, number, None, "not a JSON object", excerpt(text.rstrip("\r\n")))
    return Row(name, number, value)
