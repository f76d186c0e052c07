"""The origin of results: the time, the seed, the versions of packages, the machine.

All randomness comes from one seed through named generators, never from global state.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np


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


def require_bitsandbytes(what: str, device_type: str, where: str, otherwise: str) -> None:
    """Raise :class:`BadInputError` unless bitsandbytes is installed and the device is a CUDA one.

    ``what`` needs it, ``where`` names the setting and ``otherwise`` says what to do without it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInputError(
            f"{what} needs bitsandbytes, which is not installed",
            where=where,
            hint=f"Install it with: pip install bitsandbytes. {otherwise}",
        )
    if device_type != "cuda":
        raise BadInputError(f"{what} needs a CUDA device; this is {device_type}", where=where, hint=otherwise)


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on the run's seed and on the names, e.g. ``derive_seed(0, "plan", epoch)``."""
    text = "\0".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for one named use of the run's seed."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))
