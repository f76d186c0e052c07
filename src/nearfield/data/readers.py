"""Readers turn files into rows and say which rows they could not read and why.

A reader is its settings with two methods. A broken row costs that row alone; a broken file is bad input.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, ClassVar, cast

from pydantic import Field

from nearfield.config import KindSettings
from nearfield.errors import BadInputError
from nearfield.files import hash_file
from nearfield.kinds import Kinds

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


_TABLES = "nearfield.data.table_readers"
_IMAGES = "nearfield.data.image_readers"
_METHODS = "nearfield.methods"
READERS = Kinds(
    "readers",
    "nearfield.data.readers:ReaderBase",
    {
        "jsonl": (f"{_TABLES}:JsonlReader", "one JSON object a line"),
        "csv": (f"{_TABLES}:CsvReader", "comma- or tab-separated values with a header line"),
        "parquet": (f"{_TABLES}:ParquetReader", "Parquet files"),
        "hub": (f"{_TABLES}:HubReader", "a Hugging Face data set, on disk or on the hub"),
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
