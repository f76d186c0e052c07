"""Reading a run folder that may be half finished or damaged: a part that is missing says so, and nothing is raised.

A report is wanted most when a run went wrong. So every section is built behind :func:`part`: what cannot be read
becomes a :class:`Missing` with the reason, in the words that the section will show.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger("nearfield.reporting")
T = TypeVar("T")
Json = Mapping[str, object]


@dataclass(frozen=True)
class Missing:
    """A part of the run that is not there or cannot be read, and why."""

    reason: str


class AbsentError(Exception):
    """A file of the run is not there; the message is the sentence that the section shows."""


def part(name: str, build: Callable[[], T]) -> T | Missing:
    """The result of ``build``, or a :class:`Missing` that says why there is none; an unexpected fault is logged as a warning."""
    try:
        return build()
    except AbsentError as error:
        return Missing(str(error))
    except Exception as error:  # any damage of the folder must leave the other sections readable
        logger.warning("report: %s cannot be read: %s: %s", name, type(error).__name__, error)
        return Missing(f"This part of the run cannot be read ({type(error).__name__}: {error}).")


def load_json(path: Path, absent: str) -> object:
    """The value of a JSON file; ``AbsentError(absent)`` where there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AbsentError(absent) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AbsentError(f"{path.name} is not valid JSON ({error}).") from error


def load_object(path: Path, absent: str) -> dict[str, object]:
    """The object of a JSON file."""
    value = load_json(path, absent)
    if not isinstance(value, dict):
        raise AbsentError(f"{path.name} holds no JSON object.")
    return value


def mapping(value: object) -> dict[str, object]:
    """The value if it is an object, otherwise an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def listing(value: object) -> list[object]:
    """The value if it is a list, otherwise an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def real(value: object) -> float | None:
    """The value as a float if it is a number (not-a-number included), otherwise None; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def string(value: object) -> str | None:
    """The value as text if it is a scalar, otherwise None."""
    return None if value is None or isinstance(value, dict | list) else str(value)


def first(source: Json, *names: str) -> object:
    """The value of the first of these keys that the object has and that is not null."""
    for name in names:
        if source.get(name) is not None:
            return source[name]
    return None


def total(values: Iterable[object]) -> float:
    """The sum of those values that are finite numbers."""
    numbers = [real(value) for value in values]
    return math.fsum(value for value in numbers if value is not None and math.isfinite(value))
