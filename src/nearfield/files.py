"""Files are written aside and renamed; contents are named by their hash."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nearfield.errors import BadInputError


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
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInputError(f"this {what} is not valid JSON ({error})", where=str(path)) from error


def inside(folder: Path, relative: str) -> Path:
    """The path of ``relative`` below ``folder``; a path that leaves the folder is refused."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadInputError(f"the path {relative!r} leaves its folder", where=str(folder))
    return path
