"""Vectors that cannot be used as they are: rows that are not finite, and rows of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Rows
from nearfield.errors import BadInputError

_BLOCK = 65_536
_SHOWN = 60


def not_finite(vectors: npt.NDArray[Any]) -> Rows:
    """The rows of (n, d) vectors that hold a value that is not a finite number."""
    parts = [
        start + np.flatnonzero(~np.isfinite(vectors[start : start + _BLOCK]).all(axis=1))
        for start in range(0, len(vectors), _BLOCK)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)


def zeros(vectors: npt.NDArray[Any]) -> Rows:
    """The rows of (n, d) vectors that are zero in every dimension: they have no direction and are alike to nothing."""
    parts = [
        start + np.flatnonzero(~vectors[start : start + _BLOCK].any(axis=1)) for start in range(0, len(vectors), _BLOCK)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)


def shown(text: object) -> str:
    """A text as messages quote it: short, on one line; a thing that is no text is said to be an image."""
    if not isinstance(text, str):
        return "an image"
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…")


def require_finite(vectors: npt.NDArray[Any], item: Callable[[int], object], where: str, things: str = "texts") -> None:
    """Raise :class:`BadInputError` with their number where vectors (n, d) are not finite; ``item`` gives what a row is of."""
    bad = not_finite(vectors)
    if len(bad):
        verb = "a vector that is" if len(bad) == 1 else "vectors that are"
        raise BadInputError(
            f"{len(bad):,} of {len(vectors):,} {things} have {verb} not finite (NaN or infinity); "
            f"the first is {shown(item(int(bad[0])))}",
            where=where,
            hint="Look for weights that are not finite, or for a precision in which the model overflows.",
        )
