"""Checksums of the files of an artifact, one for each block of 1 MiB, kept beside them and checked when a block is first read.

Each process checks a block once, before it uses it: a bit that flipped on the disk is found by whoever would have used it, and
opening a large artifact costs no reading of the whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfield.errors import BadInputError
from nearfield.files import files_below, fingerprint, read_json, write_json

logger = logging.getLogger("nearfield")

BLOCK = 1 << 20
SUMS = "checksums.json"
VERSION = 1

Ints = npt.NDArray[np.int64]


class DamagedError(BadInputError):
    """Bytes of an artifact are not those that were written."""


def seal(folder: Path) -> None:
    """Write the checksums of all files in a folder; its files must not change afterwards."""
    files = {
        str(file.relative_to(folder)): [file.stat().st_size, _sums_of(file)]
        for file in files_below(folder)
        if file.relative_to(folder) != Path(SUMS)
    }
    write_json(folder / SUMS, {"version": VERSION, "block": BLOCK, "files": files, "sum": fingerprint(files)})


def _sums_of(file: Path) -> list[str]:
    with file.open("rb") as stream:
        return [_sum(block) for block in iter(lambda: stream.read(BLOCK), b"")]


def _sum(block: bytes) -> str:
    return hashlib.blake2b(block, digest_size=8).hexdigest()


_checked: dict[tuple[Any, ...], npt.NDArray[np.bool_]] = {}
"""The blocks of a file that this process has checked; a file that was replaced is another one."""


class CheckedFile:
    """A file whose blocks are checked before they are used. Without ``sums`` nothing is checked."""

    def __init__(self, path: Path, size: int, sums: list[str] | None, hint: str) -> None:
        self.path, self.size, self.sums, self.hint = path, size, sums, hint
        self._done = np.empty(0, dtype=np.bool_)
        if sums is None:
            return
        try:
            status = path.stat()
        except OSError as error:
            raise self._damaged("is missing") from error
        if status.st_size != size or len(sums) != -(-size // BLOCK):
            raise self._damaged(f"has {status.st_size:,} bytes where {size:,} were written")
        key = (status.st_dev, status.st_ino, status.st_mtime_ns, size, fingerprint(sums))
        self._done = _checked.setdefault(key, np.zeros(len(sums), dtype=np.bool_))

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"this file {what}: it is damaged", where=str(self.path), hint=self.hint)

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Check the blocks of some bytes; raise :class:`DamagedError` where one is not what was written."""
        stop = self.size if stop is None else stop
        if self.sums is not None and stop > start:
            first, last = start // BLOCK, -(-stop // BLOCK)
            if not self._done[first:last].all():
                self._read(np.arange(first, last))

    def check_ranges(self, starts: Ints, stops: Ints) -> None:
        """The same for many pieces at a time."""
        if self.sums is None or not len(starts):
            return
        first, last = starts // BLOCK, np.maximum(stops - 1, starts) // BLOCK
        touched = np.zeros(len(self.sums) + 1, dtype=np.int64)
        np.add.at(touched, np.minimum(first, len(self.sums)), 1)
        np.add.at(touched, np.minimum(last + 1, len(self.sums)), -1)
        self._read(np.flatnonzero(touched.cumsum()[:-1] > 0))

    def check_outside(self, starts: Ints, stops: Ints) -> None:
        """Check all blocks but those that lie wholly in one of some pieces."""
        if self.sums is None:
            return
        inside = np.zeros(len(self.sums), dtype=np.bool_)
        for start, stop in zip((-(-starts // BLOCK)).tolist(), (stops // BLOCK).tolist(), strict=True):
            inside[start:stop] = True
        self._read(np.flatnonzero(~inside))

    def _read(self, blocks: Ints) -> None:
        wanted = blocks[~self._done[blocks]]
        if not len(wanted):
            return
        assert self.sums is not None
        with self.path.open("rb") as stream:
            for block in wanted.tolist():
                stream.seek(block * BLOCK)
                if _sum(stream.read(BLOCK)) != self.sums[block]:
                    raise self._damaged(f"does not have the checksum of its bytes from {block * BLOCK:,} on")
                self._done[block] = True


class Sealed:
    """A folder with the checksums that were written with it. One without them is read unchecked: ``known`` is false."""

    def __init__(self, folder: Path, hint: str) -> None:
        self.folder, self.hint = folder, hint
        self.files: dict[str, tuple[int, list[str]]] = {}
        self.known = (folder / SUMS).is_file()
        if not self.known:
            return
        try:
            value = read_json(folder / SUMS, "list of checksums")
            files = value["files"]
            if value["version"] != VERSION or value["block"] != BLOCK or value["sum"] != fingerprint(files):
                raise ValueError
            self.files = {name: (int(size), list(sums)) for name, (size, sums) in files.items()}
        except (BadInputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError("this list of checksums is damaged", where=str(folder / SUMS), hint=hint) from error

    def file(self, name: str, *, whole: bool = False) -> CheckedFile:
        """A file of the folder; ``whole`` checks all of it at once."""
        if self.known and name not in self.files:
            raise DamagedError(f"{name} is not in the list of checksums", where=str(self.folder), hint=self.hint)
        size, sums = self.files.get(name, (0, None))
        checked = CheckedFile(self.folder / name, size, sums, self.hint)
        if whole:
            checked.check()
        return checked

    def check_all(self) -> int:
        """Check every block that this process has not checked yet; how many bytes there are."""
        for name in self.files:
            self.file(name, whole=True)
        return sum(size for size, _ in self.files.values())


def damage(folder: Path, files: Iterable[str] = ()) -> str | None:
    """The fault of a sealed folder, in words; None where every byte is what was written and ``files`` are among them.

    A folder of an earlier version has no checksums, which is wrong too: nobody could tell.
    """
    try:
        sealed = Sealed(folder, "")
        if not sealed.known:
            return "it has no checksums: an earlier version wrote it"
        missing = [name for name in files if name not in sealed.files]
        if missing:
            return f"{missing[0]} is not in its list of checksums"
        sealed.check_all()
    except DamagedError as error:
        return f"{error.where}: {error.what}"
    return None
