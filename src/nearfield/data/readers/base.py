"""What all readers share: rows, the opening of packed files, and the hashes of what is read."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from nearfield.errors import BadInputError
from nearfield.files import hash_file

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Row:
    """A row that was read: its values by column, or the reason why there are none."""

    file: str
    line: int
    """Counted from 1; the number of the row where the file has no lines."""
    values: Mapping[str, object] | None
    reason: str = ""
    excerpt: str = ""


class Reader(Protocol):
    """What the build asks of a reader."""

    def inputs(self) -> dict[str, str]:
        """Names of what is read, each with a hash of its content (or a revision): part of the store's fingerprint."""
        ...

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows, one after the other. ``columns`` are those that the recipe names."""
        ...


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
        found = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(suffixes))
        if found:
            return found
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
