"""Where results came from: the time, the versions of packages, the machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PACKAGES = (
    "nearfield",
    "torch",
    "transformers",
    "sentence-transformers",
    "accelerate",
    "mteb",
    "datasets",
    "numpy",
    "scipy",
    "pyarrow",
)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **versions_of(_PACKAGES)}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of some packages that are installed."""
    versions = {package: _version(package) for package in packages}
    return {package: version for package, version in versions.items() if version is not None}


@functools.cache
def _version(package: str) -> str | None:
    # Reading a package's description takes milliseconds, and a run asks for the same ones hundreds of times.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit of a repository of models that loading would take: from the hub, else the one that this machine keeps; None
    where neither is to be had. Asked once a process."""
    from huggingface_hub import HfApi, constants

    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    if not constants.HF_HUB_OFFLINE:
        # Whatever an unreachable hub or an unknown name raises: loading says it better.
        with contextlib.suppress(Exception):
            commit: str | None = HfApi().model_info(name, revision=revision, timeout=5).sha
            return commit
    cache = Path(os.environ.get("SENTENCE_TRANSFORMERS_HOME") or constants.HF_HUB_CACHE)
    reference = cache / f"models--{name.replace('/', '--')}" / "refs" / (revision or "main")
    return reference.read_text(encoding="ascii").strip() if reference.is_file() else None


def device() -> dict[str, Any]:
    """The device of this machine."""
    import torch

    about: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        about["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return about
