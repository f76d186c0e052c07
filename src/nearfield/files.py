"""Files are written aside and renamed; contents are named by their hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def hash_folder(folder: Path, keep: Callable[[Path], bool] = lambda file: True) -> str:
    """32 hex digits of the names and contents of the files below a folder, whatever its own name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and keep(file))
    return fingerprint([[str(file.relative_to(folder)), hash_file(file)] for file in files])


def fsync_path(path: Path) -> None:
    """Make a written file, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write a file or a folder to; rename it to ``path`` if the block ends well, remove it otherwise.

    A folder that stands at ``path`` is replaced; it is moved aside first, so that a crash leaves the old or the new one.
    """
    aside = _aside(path)
    try:
        yield aside
        if aside.is_dir():
            for file in sorted(aside.rglob("*")):
                if file.is_file():
                    fsync_path(file)
            old = _aside(path) if path.exists() else None
            if old is not None:
                path.rename(old)
            aside.rename(path)
            if old is not None:
                shutil.rmtree(old)
        else:
            fsync_path(aside)
            aside.replace(path)
        fsync_path(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


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
