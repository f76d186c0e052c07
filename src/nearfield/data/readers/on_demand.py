"""Data sets that are built on this machine when they are first asked for, and kept in the user's cache folder."""

from __future__ import annotations

import gzip
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from nearfield.data.readers.base import Row, hash_files
from nearfield.data.readers.jsonl import read_jsonl
from nearfield.files import atomic_path

logger = logging.getLogger("nearfield.data")


class OnDemand(ABC):
    """A reader of a file that is built when it is first asked for."""

    @abstractmethod
    def find(self) -> Path:
        """The packed JSONL file, built if it is missing."""

    @cached_property
    def _file(self) -> Path:
        return self.find()

    def inputs(self) -> dict[str, str]:
        return hash_files([self._file])

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        yield from read_jsonl(self._file)


def cache_folder(chosen: Path | None = None) -> Path:
    """The chosen folder, or nearfield's folder in the user's cache (XDG_CACHE_HOME, else ~/.cache)."""
    if chosen is not None:
        return chosen
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "nearfield" / "data"


def kept_file(path: Path, build: Callable[[], Iterable[Mapping[str, object]]]) -> Path:
    """The packed JSONL file at ``path``; its rows are built where it is missing. Delete it to build it again."""
    if path.is_file():
        logger.info("Using %s; delete it to build it again", path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as aside, aside.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for row in build():
            file.write((json.dumps(row, ensure_ascii=True) + "\n").encode())
    logger.info("Wrote %s", path)
    return path
