"""Files are written aside and renamed; contents are named by their hash; the files of an artifact have checksums.

Checksums, one for each block of 1 MiB, are kept beside the files. Each process checks a block once, before it uses it: a bit that
flipped on the disk is found by whoever would have used it, and opening a large artifact costs no reading of the whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from nearfield.arrays import Mask, Rows
from nearfield.errors import BadInputError

logger = logging.getLogger("nearfield.files")


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no white space, so that equal values have equal hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def fingerprint(value: Any) -> str:
    """32 hex digits (BLAKE2b, 128 bits) of a JSON-able value."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def hash_file(path: Path, algorithm: str = "blake2b") -> str:
    """Hex digest of a file's bytes: BLAKE2b of 128 bits, or any name that hashlib knows."""
    digest = hashlib.blake2b(digest_size=16) if algorithm == "blake2b" else hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, sorted; links to files and folders are followed."""
    files: list[Path] = []
    waiting = [(folder, frozenset((folder.resolve(),)))]
    while waiting:
        place, above = waiting.pop()
        for entry in place.iterdir():
            if entry.is_file():
                files.append(entry)
            elif entry.is_dir() and (real := entry.resolve()) not in above:
                waiting.append((entry, above | {real}))
    return sorted(files)


def hash_folder(folder: Path, keep: Callable[[Path], bool] = lambda file: True) -> str:
    """32 hex digits of the names and contents of the files below a folder, whatever its own name; ``keep`` is asked with the
    path of each below it."""
    files = [file for file in files_below(folder) if keep(file.relative_to(folder))]
    return fingerprint([[str(file.relative_to(folder)), hash_file(file)] for file in files])


def fsync_path(path: Path) -> None:
    """Make a written file, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")
"""A folder beside a path, in which what will stand there is written; its ``owner`` is locked by the process that writes."""
_EARLIER = re.compile(r"\.(?P<name>.+)\.(?P<process>[0-9]+)\.[0-9a-f]{1,8}\.tmp")
"""The same as earlier versions named it: a file or folder with the number of its process."""
_OWNER, _REPLACED = "owner", "replaced"
_FOREIGN_SECONDS = 86_400.0
"""Leftovers of a process of another machine, whose locks this one may not see, is left alone until it is a day old."""


def _machine() -> str:
    """The kernel's own name for this start of this machine: the processes of it see each other's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A folder of this process's own beside a path, removed afterwards; a killed process's is found by its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")
        folder.mkdir()
        try:
            owner = (folder / _OWNER).open("w", encoding="ascii")
        except FileNotFoundError:  # taken for a killed process's before it had a lock
            continue
        if _lock(owner) and (folder / _OWNER).exists():
            break
        owner.close()
    with owner:
        owner.write(_machine())
        owner.flush()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """A folder in ``folder`` that no other process uses, removed afterwards; a killed process's is removed first."""
    remove_leftovers(folder)
    with _aside(folder / name) as scratch:
        yield scratch


def _lock(file: IO[str]) -> bool:
    """Lock a file for this process; whether nobody else had it. Where there are no locks, as if nobody had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def remove_leftovers(folder: Path, depth: int = 0) -> int:
    """Remove what killed processes were writing in a folder, and in its subfolders down to ``depth``; how many there were.

    Files of living processes are left alone; a file that was moved aside for a successor that never came is put back.
    """
    if not folder.is_dir():
        return 0
    removed = 0
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:  # a living process has just removed it
        return 0
    for entry in entries:
        match, earlier = _ASIDE.fullmatch(entry.name), _EARLIER.fullmatch(entry.name)
        if match is not None and entry.is_dir() and not entry.is_symlink():
            removed += _remove_aside(entry, match["name"])
        elif earlier is not None and not _alive(int(earlier["process"])):
            _remove(entry)
            removed += 1
        elif depth and entry.is_dir() and not entry.is_symlink():
            removed += remove_leftovers(entry, depth - 1)
    return removed


def _remove_leftovers_of(path: Path) -> None:
    """Remove what killed processes wrote for one path."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path.parent):
            match = _ASIDE.fullmatch(entry.name) if entry.name.startswith(f".{path.name}.") else None
            if match is not None and match["name"] == path.name:
                _remove_aside(Path(entry.path), path.name)


def _remove_aside(entry: Path, name: str) -> bool:
    """Remove one folder that was written aside, unless its process lives."""
    try:
        return _remove_if_left(entry, name)
    except FileNotFoundError:  # its process has just done so
        return False


def _remove_if_left(entry: Path, name: str) -> bool:
    try:
        owner = (entry / _OWNER).open("r+", encoding="ascii")
    except FileNotFoundError:  # killed, or about to open it: a moment is enough for that
        if time.time() - entry.stat().st_mtime < _OPENING_SECONDS:
            return False
        shutil.rmtree(entry, ignore_errors=True)
        return True
    with owner:
        if not _lock(owner):
            return False
        machine = owner.read()
        if machine not in ("", _machine()) and time.time() - _newest(entry) < _FOREIGN_SECONDS:
            return False
        replaced, target = entry / _REPLACED, entry.with_name(name)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(entry, ignore_errors=True)
    return True


_OPENING_SECONDS = 60.0


def _newest(folder: Path) -> float:
    """When something in a folder was changed last."""
    return max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write a file or a folder to; rename it to ``path`` if the block ends well, remove it otherwise.

    A folder that stands at ``path`` is replaced; it is moved aside first, so that a crash leaves the old or the new one:
    :func:`remove_leftovers` puts back what lies aside without a successor, and removes what a killed process left.
    """
    _remove_leftovers_of(path)
    with _aside(path) as folder:
        aside = folder / "content"
        yield aside
        if aside.is_dir():
            for file in sorted(aside.rglob("*")):
                if file.is_file():
                    fsync_path(file)
            replaced = folder / _REPLACED
            if path.exists():
                path.rename(replaced)
            try:
                aside.rename(path)
            except OSError:
                if replaced.exists():
                    replaced.rename(path)
                raise
        else:
            fsync_path(aside)
            aside.replace(path)
        fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file (indented, for people) aside and rename it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path, what: str = "file") -> Any:
    """Read a JSON file; a missing or broken one is bad input with a clear message."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"this {what} does not exist", where=str(path)) from error
    except OSError as error:
        raise BadInputError(f"this {what} cannot be read ({error.strerror})", where=str(path)) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInputError(f"this {what} is not valid JSON ({error})", where=str(path)) from error


METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""Files in a run's folder: a line a step, and a line an evaluation."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file, empty where there is none; those that cannot be read are left out and their number is said.

    A kill may cut off the last line.
    """
    lines, unread = parse_metrics(path.read_bytes()) if path.is_file() else ([], 0)
    if unread:
        logger.warning("%d lines of %s cannot be read and are left out", unread, path)
    return lines


def parse_metrics(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines in the bytes of such a file, and the number of those that cannot be read."""
    lines, unread = [], 0
    for text in data.split(b"\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text, parse_int=_whole)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            unread += 1
    return lines, unread


def _whole(digits: str) -> float:
    """A whole number; one that no figure of a run has, of garbage, as a float, which is infinite where it must be."""
    return int(digits) if len(digits) < 19 else float(digits)


def inside(folder: Path, relative: str) -> Path:
    """The path of ``relative`` below ``folder``; a path that leaves the folder is refused."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadInputError(f"the path {relative!r} leaves its folder", where=str(folder))
    return path


# Checksums

BLOCK = 1 << 20
SUMS = "checksums.json"
SUMS_VERSION = 1


class DamagedError(BadInputError):
    """Bytes of an artifact are not those that were written."""


def seal(folder: Path) -> None:
    """Write the checksums of all files in a folder; its files must not change afterwards."""
    files = {
        str(file.relative_to(folder)): [file.stat().st_size, _sums_of(file)]
        for file in files_below(folder)
        if file.relative_to(folder) != Path(SUMS)
    }
    write_json(folder / SUMS, {"version": SUMS_VERSION, "block": BLOCK, "files": files, "sum": fingerprint(files)})


def _sums_of(file: Path) -> list[str]:
    with file.open("rb") as stream:
        return [_sum(block) for block in iter(lambda: stream.read(BLOCK), b"")]


def _sum(block: bytes) -> str:
    return hashlib.blake2b(block, digest_size=8).hexdigest()


_checked: dict[tuple[Any, ...], Mask] = {}
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

    def check_ranges(self, starts: Rows, stops: Rows) -> None:
        """The same for many pieces at a time."""
        if self.sums is None or not len(starts):
            return
        first, last = starts // BLOCK, np.maximum(stops - 1, starts) // BLOCK
        touched = np.zeros(len(self.sums) + 1, dtype=np.int64)
        np.add.at(touched, np.minimum(first, len(self.sums)), 1)
        np.add.at(touched, np.minimum(last + 1, len(self.sums)), -1)
        self._read(np.flatnonzero(touched.cumsum()[:-1] > 0))

    def check_outside(self, starts: Rows, stops: Rows) -> None:
        """Check all blocks but those that lie wholly in one of some pieces."""
        if self.sums is None:
            return
        inside = np.zeros(len(self.sums), dtype=np.bool_)
        for start, stop in zip((-(-starts // BLOCK)).tolist(), (stops // BLOCK).tolist(), strict=True):
            inside[start:stop] = True
        self._read(np.flatnonzero(~inside))

    def _read(self, blocks: Rows) -> None:
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
            if value["version"] != SUMS_VERSION or value["block"] != BLOCK or value["sum"] != fingerprint(files):
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
