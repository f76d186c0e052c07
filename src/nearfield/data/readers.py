"""Readers turn files into rows and say which rows they could not read and why.

A reader is its settings with two methods. A broken row costs that row alone; a broken file is bad input. Those of tables are here
(JSON Lines, CSV and TSV, Parquet, Hugging Face data sets), those of images in :mod:`.images`.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from nearfield.config import ConfigPath, Kinds, KindSettings
from nearfield.errors import BadInputError
from nearfield.files import hash_file

if TYPE_CHECKING:
    import pyarrow as pa


EXCERPT_CHARACTERS = 200
Column = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Row:
    """A row that was read: its values by column, or the reason why there are none."""

    file: str
    line: int
    """Counted from 1; the number of the row where the file has no lines."""
    values: Mapping[str, object] | None
    reason: str = ""
    excerpt: str = ""


class BadRowError(Exception):
    """A row that cannot be used: a reason to count by, and an excerpt of what is wrong."""

    def __init__(self, reason: str, value: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.excerpt = excerpt(value)


class ReaderBase(KindSettings):
    """The base of every reader."""

    gives_images: ClassVar[bool] = False
    """Whether the rows have images, so that the source needs no ``images``."""

    def build(self) -> ReaderBase:
        """The reader: these settings, unless they stand for another one."""
        return self

    def inputs(self) -> dict[str, str]:
        """Names of what is read, each with a hash of its content (or a revision): part of the store's fingerprint."""
        raise NotImplementedError

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows, one after the other. ``columns`` are those that the recipe names."""
        raise NotImplementedError


_HERE = "nearfield.data.readers"
_IMAGES = "nearfield.data.images"
_METHODS = "nearfield.methods"
READERS = Kinds(
    "readers",
    f"{_HERE}:ReaderBase",
    {
        "jsonl": (f"{_HERE}:JsonlReader", "one JSON object a line"),
        "csv": (f"{_HERE}:CsvReader", "comma- or tab-separated values with a header line"),
        "parquet": (f"{_HERE}:ParquetReader", "Parquet files"),
        "hub": (f"{_HERE}:HubReader", "a Hugging Face data set, on disk or on the hub"),
        "image_folder": (f"{_IMAGES}:ImageFolderReader", "images in a folder, with captions"),
        "webdataset": (f"{_IMAGES}:WebDatasetReader", "tar shards of images and texts"),
        "mmeb": (f"{_IMAGES}:MmebReader", "MMEB's training format"),
        "image_triplets": (f"{_IMAGES}:ImageTripletsReader", "an image and an instruction ask for another image"),
        "spans": (f"{_METHODS}.spans:SpansReader", "spans of long documents (DeCLUTR)"),
        "embedded": (f"{_METHODS}.wordnet:EmbeddedReader", "WordNet's nouns, shipped in the package"),
        "emoji": (f"{_METHODS}.emoji:EmojiReader", "emoji with names and keywords, shipped in the package"),
        "openclipart": (f"{_METHODS}.openclipart:OpenClipartReader", "drawings with tags, from Debian's packages"),
        "debian_descriptions": (f"{_METHODS}.debian:DebianReader", "descriptions of Debian packages"),
        "docstrings": (f"{_METHODS}.docstrings:DocstringsReader", "docstring and code of installed Python packages"),
    },
)
ReaderConfig = Annotated[ReaderBase, READERS]
"""The settings of any reader."""


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


def excerpt(data: bytes | str | object) -> str:
    """The beginning of what could not be used, printable, at most 200 characters."""
    if isinstance(data, bytes):
        text = data[: EXCERPT_CHARACTERS * 4].decode("utf-8", "backslashreplace")
    elif isinstance(data, str):
        text = data[:EXCERPT_CHARACTERS]
    else:
        text = repr(data)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:EXCERPT_CHARACTERS])
    return text[:EXCERPT_CHARACTERS]


def files_at(path: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """The file at ``path``, or the files with one of the suffixes in the folder at ``path``, in the order of names."""
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(suffixes))
        if files:
            return files
        raise BadInputError(
            f"this folder holds no {what} file", where=str(path), hint=f"Wanted: {', '.join(suffixes)}."
        )
    if path.exists():
        raise BadInputError("this is neither a file nor a folder", where=str(path))
    raise BadInputError(
        "this file does not exist", where=str(path), hint="Paths in a data recipe are relative to the recipe's folder."
    )


def hash_files(files: Sequence[Path]) -> dict[str, str]:
    """Name and content hash of each file; the place of the files does not count."""
    hashes: dict[str, str] = {}
    for number, file in enumerate(files):
        try:
            hashes[f"{number}:{file.name}"] = hash_file(file)
        except OSError as error:
            raise BadInputError(f"this file cannot be read ({error.strerror})", where=str(file)) from error
    return hashes


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, unpacking .gz, .xz and .zst; a broken file is bad input."""
    with contextlib.ExitStack() as stack:
        try:
            file: IO[bytes]
            if path.suffix == ".gz":
                file = cast(IO[bytes], stack.enter_context(gzip.open(path, "rb")))
            elif path.suffix == ".xz":
                file = cast(IO[bytes], stack.enter_context(lzma.open(path, "rb")))
            elif path.suffix == ".zst":
                import zstandard

                raw = stack.enter_context(path.open("rb"))
                unpacked = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                file = stack.enter_context(io.BufferedReader(cast(io.RawIOBase, unpacked), 1 << 20))
            else:
                file = stack.enter_context(path.open("rb"))
            yield file
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise _broken(path, error) from error
        except OSError as error:
            reason = f"this file cannot be read ({error.strerror or error})"
            raise BadInputError(reason, where=str(path)) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "zstandard":
                raise _broken(path, error) from error
            raise


def _broken(path: Path, error: Exception) -> BadInputError:
    return BadInputError(
        f"this packed file is broken or cut short ({error})", where=str(path), hint="Fetch or write the file again."
    )


MAX_LINE_BYTES = 64 << 20
"""A longer line of a JSONL file is not read into memory but skipped and reported."""
MAX_CELL_CHARACTERS = 16 << 20

_PACKED = ("", ".gz", ".xz", ".zst")
JSONL_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".ndjson") for packed in _PACKED)
CSV_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".csv", ".tsv") for packed in _PACKED)
PARQUET_SUFFIXES = (".parquet",)
TABLE_SUFFIXES = (*JSONL_SUFFIXES, *CSV_SUFFIXES, *PARQUET_SUFFIXES)

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BATCH_ROWS = 1024


class TableReader(ReaderBase):
    """The base of readers of one table or of a folder of tables, in the order of names; by itself of any format."""

    suffixes: ClassVar[tuple[str, ...]] = TABLE_SUFFIXES
    what: ClassVar[str] = "JSONL, CSV or Parquet"
    path: ConfigPath
    """A file, or a folder of them."""

    def inputs(self) -> dict[str, str]:
        return hash_files(files_at(self.path, self.suffixes, self.what))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in files_at(self.path, self.suffixes, self.what):
            yield from self.read(file, columns)

    def read(self, file: Path, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of one file."""
        return read_table(file, columns)


class JsonlReader(TableReader):
    """One JSON object a line; .gz, .xz and .zst are unpacked on the way. A folder means all its JSONL files."""

    kind: Literal["jsonl"] = "jsonl"
    suffixes = JSONL_SUFFIXES
    what = "JSONL"

    def read(self, file: Path, columns: Sequence[str]) -> Iterator[Row]:
        return read_jsonl(file)


class CsvReader(TableReader):
    """Comma- or tab-separated values with a header line; the delimiter follows from the suffix unless it is given."""

    kind: Literal["csv"] = "csv"
    suffixes = CSV_SUFFIXES
    what = "CSV or TSV"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """One character; null is a tab for .tsv files and a comma for all others."""

    def read(self, file: Path, columns: Sequence[str]) -> Iterator[Row]:
        return read_delimited(file, self.delimiter, columns)


class ParquetReader(TableReader):
    """A Parquet file, or a folder of them."""

    kind: Literal["parquet"] = "parquet"
    suffixes = PARQUET_SUFFIXES
    what = "Parquet"

    def read(self, file: Path, columns: Sequence[str]) -> Iterator[Row]:
        return read_parquet(file, columns)


class HubReader(ReaderBase):
    """A Hugging Face data set, of which no code is ever run: a folder written by ``save_to_disk`` (``path``), or ``name`` and ``revision`` on the hub."""

    kind: Literal["hub"] = "hub"
    path: ConfigPath | None = None
    """The folder on disk."""
    name: str | None = None
    """The name on the hub, e.g. ``org/data``."""
    revision: str | None = None
    """The commit on the hub; a branch would move."""
    subset: str | None = None
    """The configuration of the data set; null is its default."""
    split: str = "train"
    """The split of the data set whose rows are read."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either 'path' (a folder on disk) or 'name' and 'revision' (on the hub)")
        if self.name is not None and not self.revision:
            raise ValueError("'revision' is required with 'name': a branch moves, a commit does not")
        if self.path is not None and (self.revision or self.subset):
            raise ValueError("'revision' and 'subset' go with 'name', not with 'path'")
        return self

    def inputs(self) -> dict[str, str]:
        if self.path is None:
            return {f"{self.name}/{self.subset or ''}/{self.split}": str(self.revision)}
        if not self.path.is_dir():
            raise BadInputError("this folder does not exist", where=str(self.path), hint="Write it with save_to_disk.")
        return hash_files(sorted(file for file in self.path.rglob("*") if file.suffix in (".arrow", ".json")))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        from datasets import Dataset, Image

        data = self._load()
        if not isinstance(data, Dataset):
            raise BadInputError("this is not a data set with rows", where=self._where())
        check_header(data.column_names, columns, self._where())
        for column, feature in data.features.items():
            if isinstance(feature, Image):
                # Images come as bytes: they are checked before they are decoded.
                data = data.cast_column(column, Image(decode=False))
        name = self.name or (self.path or Path()).name
        for index, values in enumerate(data.select_columns(list(columns) or data.column_names)):
            yield Row(name, index + 1, values)

    def _where(self) -> str:
        return str(self.path) if self.path else f"{self.name}@{self.revision} ({self.split})"

    def _load(self) -> object:
        from datasets import DatasetDict, load_dataset, load_from_disk

        try:
            if self.path is None:
                return load_dataset(self.name, self.subset, revision=self.revision, split=self.split)
            data = load_from_disk(str(self.path))
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            # Covers a missing name or revision, no network, an unknown split and a folder that is no data set.
            message = (str(error).splitlines() or [type(error).__name__])[0][:300]
            hint = "Check the folder." if self.path else "Check name, revision and split; offline, fetch it first."
            raise BadInputError(
                f"this data set cannot be loaded ({message})", where=self._where(), hint=hint
            ) from error
        if isinstance(data, DatasetDict):
            if self.split not in data:
                hint = f"Splits here: {', '.join(data)}."
                raise BadInputError(f"there is no split {self.split!r}", where=str(self.path), hint=hint)
            return data[self.split]
        return data


def read_table(file: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a table of any format, with all its columns; ``columns`` must be among them where it has a header."""
    if file.name.endswith(PARQUET_SUFFIXES):
        for number, row in enumerate(read_parquet(file)):
            if not number and row.values is not None:
                check_header(list(row.values), columns, str(file))
            yield row
    elif file.name.endswith(CSV_SUFFIXES):
        yield from read_delimited(file, None, columns)
    elif file.name.endswith(JSONL_SUFFIXES):
        yield from read_jsonl(file)
    else:
        raise BadInputError("this is not a table", where=str(file), hint=f"Wanted: {', '.join(TABLE_SUFFIXES)}.")


def read_jsonl(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """Yield the rows of a JSONL file; blank lines are no rows. Raises BadInputError where the file cannot be read."""
    with open_bytes(path) as file:
        for number, (line, whole) in enumerate(_lines(file, max_line_bytes), start=1):
            line = _without_mark(line, path) if number == 1 else line
            if not whole:
                yield Row(path.name, number, None, f"line longer than {max_line_bytes:,} bytes", excerpt(line))
            elif line.strip():
                yield _json_row(path.name, number, line)


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


def _json_row(name: str, number: int, line: bytes) -> Row:
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


def read_delimited(path: Path, delimiter: str | None = None, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file with a header line; a row's line is the one it begins on.

    Without ``delimiter`` it is a tab for .tsv files (packed or not) and a comma for all others. Raises BadInputError where
    the file, its header or one of ``columns`` in it is missing.
    """
    # The module's limit is global; it is only ever raised, to what a text may hold.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))
    delimiter = delimiter or ("\t" if ".tsv" in path.suffixes[-2:] else ",")
    with open_bytes(path) as file:
        reader = csv.reader(_csv_lines(file, path), delimiter=delimiter, strict=True)
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
                yield _csv_row(path.name, line, header, cells)


def _csv_row(name: str, line: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        return Row(name, line, None, "wrong number of cells", f"{len(cells)} of {len(header)}: {excerpt(cells)}")
    for cell in cells:
        # Bytes that are no UTF-8 were read as lone surrogates.
        if not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell):
            return Row(name, line, None, "not UTF-8", excerpt(cell))
    return Row(name, line, dict(zip(header, cells, strict=True)))


def _csv_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    first = True
    # A line over the limit comes in pieces; within quotes they are one cell, which the csv module then refuses.
    while line := file.readline(MAX_CELL_CHARACTERS * 4):
        line, first = _without_mark(line, path) if first else line, False
        yield line.decode("utf-8", "surrogateescape")


def _without_mark(line: bytes, path: Path) -> bytes:
    """The first line of a file without its byte order mark; UTF-16 is refused."""
    if line.startswith(_UTF16_MARKS):
        raise BadInputError("this file is UTF-16, not UTF-8", where=str(path), hint="Save it as UTF-8.")
    return line.removeprefix(_UTF8_MARK)


def read_parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file with the given columns (all, if none are given); lines are row numbers from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_header(file.schema_arrow.names, columns, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns) or None):
                yield from _batch_rows(batch, path.name, number)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        message = str(error).splitlines()[0][:200]
        raise BadInputError(f"this is not a readable Parquet file ({message})", where=str(path)) from error


def _batch_rows(batch: pa.RecordBatch, name: str, before: int) -> Iterator[Row]:
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
