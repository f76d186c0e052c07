"""Values of a run folder: read so that a damaged one raises nothing, and put into words.

A report is wanted most when a run went wrong. So every section is built behind :func:`part`: what cannot be read becomes a
:class:`Missing` with the reason, in the words that the section will show.

Escaping for HTML is the template's work (autoescape). Here text is made *visible*: a control character or a bidi override
in a document would otherwise vanish, or turn around the words after it.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from markupsafe import Markup

logger = logging.getLogger("nearfield.reporting")
T = TypeVar("T")
Json = Mapping[str, object]


@dataclass(frozen=True)
class Missing:
    """A part of the run that is not there or cannot be read, and why."""

    reason: str
    kind: ClassVar[str] = "missing"


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


# Words

_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e0fff]"
)

_SPACES = re.compile("[ \t\r\n]+")
_JOINTS = re.compile(r"(?<=[._/\\-])(?=\w)")


def visible(text: str) -> str:
    """The text with control characters, bidi overrides, invisible characters and lone surrogates written out.

    Each becomes its code: NUL is ``[U+0000]``, a right-to-left override ``[U+202E]``. Line feeds, carriage returns and
    tabs stay. A zero-width joiner stays as well: emoji and several scripts need it.
    """
    return _HIDDEN.sub(lambda match: f"[U+{ord(match.group()):04X}]", text)


def clip(text: str, length: int = 400) -> str:
    """The visible text on one line, cut after ``length`` characters with the number that the whole text has."""
    head = text[: 4 * length + 1000]
    line = _SPACES.sub(" ", visible(head)).strip(" ")
    if len(head) == len(text) and len(line) <= length:
        return line
    return f"{_cut(line, length)}… ({count(len(text))} characters)"


def breakable(text: str) -> Markup:
    """The escaped, visible text with places to break lines after dots, slashes, hyphens and underscores: for keys and paths."""
    return Markup("<wbr>").join(part for part in _JOINTS.split(visible(text)) if part)


def _cut(text: str, length: int) -> str:
    """At most ``length`` characters, never between a letter and the marks that stand on it."""
    while length < len(text) and length > 1 and unicodedata.combining(text[length]):
        length -= 1
    return text[:length].rstrip()


def count(value: float) -> str:
    """A whole number with thin groups: ``92 012`` with narrow no-break spaces."""
    return f"{round(value):,}".replace(",", "\u202f") if math.isfinite(value) else "not finite"


def number(value: float, digits: int = 4) -> str:
    """A number for reading: at most four significant digits, a true minus sign, powers of ten where it is tiny or huge."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return count(value).replace("-", "−")
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    if size >= digits:
        return count(value).replace("-", "−")
    words = f"{value:.{max(digits - 1 - size, 0)}f}".replace("-", "−")
    return words.rstrip("0").rstrip(".") if "." in words else words


def score(value: float) -> str:
    """A score with four decimals, as result tables have it."""
    return f"{value:.4f}".replace("-", "−") if math.isfinite(value) else "not finite"


def signed(value: float) -> str:
    """A difference of scores with its sign: ``+0.0312``, ``−0.0040``."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:+.4f}".replace("-", "−") if round(value, 4) else "0.0000"


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: ``850 ms``, ``42.1 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(number_of_bytes: int) -> str:
    """Bytes in decimal units."""
    value = float(number_of_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def percent(part: float, whole: float) -> str:
    """A share: ``4.2 %``; never ``0 %`` for what is not nothing."""
    if not whole:
        return "–"
    share = 100 * part / whole
    return "under 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"


def moment(value: object) -> str:
    """A time stamp (ISO text or seconds since 1970) as ``2026-11-23 20:05 UTC``; anything else as it is."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{datetime.datetime.fromtimestamp(value, datetime.UTC):%Y-%m-%d %H:%M} UTC"
        parsed = datetime.datetime.fromisoformat(str(value))
    except (ValueError, OverflowError, OSError):
        return str(value)
    zone = f" {parsed.tzname()}" if parsed.tzinfo else ""
    return f"{parsed:%Y-%m-%d %H:%M}{zone}"


def plain(value: object) -> str:
    """Any scalar of a JSON or YAML file as words; a text with spaces at its ends in quotes; a list as its items."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    words = str(value)
    return words if words and words == words.strip(" \t\r\n") else f"“{words}”"
