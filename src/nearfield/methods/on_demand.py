"""Data sets that are built on this machine when they are first asked for, and kept in the user's cache folder.

Debian's packages are fetched with apt-get into a temporary folder: no root, nothing installed.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from nearfield.config import ConfigPath
from nearfield.data.readers import ReaderBase, Row, hash_files, read_jsonl
from nearfield.errors import BadInputError
from nearfield.files import atomic_path

HINT = "This data set needs a Debian (or a container of it) with apt-get and, once, its network."

logger = logging.getLogger("nearfield.data")


class OnDemandReader(ReaderBase):
    """The base of readers of a file that is built when it is first asked for."""

    cache: ConfigPath | None = None
    """The folder where the built file is kept; null is nearfield's folder in the user's cache."""

    def find(self) -> Path:
        """The file, built if it is missing."""
        raise NotImplementedError

    @cached_property
    def file(self) -> Path:
        """The file."""
        return self.find()

    def inputs(self) -> dict[str, str]:
        return hash_files([self.file])

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        yield from read_jsonl(self.file)


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


def own_lists(folder: Path) -> list[str]:
    """Options that make apt-get work in a folder of its own, without root, with English translations."""
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    settings = {
        "Dir::State::Lists": f"{folder}/lists",
        "Dir::Cache": f"{folder}/cache",
        "Debug::NoLocking": "true",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "en",
        "Acquire::http::Timeout": "60",
    }
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def run_apt(command: Sequence[str], check: bool = True, cwd: Path | None = None) -> str:
    """The output of the command; raise :class:`BadInputError` where it fails."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=check, timeout=600, cwd=cwd
        )
    except (OSError, subprocess.SubprocessError) as error:
        message = str(getattr(error, "stderr", "") or error).strip()[-300:]
        raise BadInputError(f"{command[0]} failed: {message}", where=" ".join(command[:2]), hint=HINT) from error
    return result.stdout


@contextlib.contextmanager
def unpacked(packages: Sequence[str]) -> Iterator[Path]:
    """A temporary folder with the files of some packages, as they would lie under ``/``."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise BadInputError("there is no apt here, so Debian's packages cannot be fetched", hint=HINT)
    with tempfile.TemporaryDirectory(prefix="nearfield-apt-") as name:
        folder = Path(name)
        (folder / "debs").mkdir()
        logger.info("Fetching %s with apt-get into a temporary folder", ", ".join(packages))
        download = ["apt-get", "download", "-q", *packages]
        try:
            run_apt(download, cwd=folder / "debs")
        except BadInputError:
            # No lists yet, or old ones.
            options = own_lists(folder)
            run_apt(["apt-get", "update", "-q", *options], check=False)
            run_apt([*download, *options], cwd=folder / "debs")
        for file in sorted((folder / "debs").glob("*.deb")):
            run_apt(["dpkg-deb", "-x", str(file), str(folder / "root")])
        yield folder / "root"
