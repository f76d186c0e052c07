"""Debian's packages, fetched with apt-get into a temporary folder: no root, nothing installed."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nearfield.errors import BadInputError

HINT = "This data set needs a Debian (or a container of it) with apt-get and, once, its network."

logger = logging.getLogger("nearfield.data")


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
    """What the command writes; raise :class:`BadInputError` where it fails."""
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
