"""A page: sections made of elements, one template with its style and script, and a security policy that allows these alone.

An element is a small class with a ``kind``, by which the template knows how to show it. All values are escaped and made
visible (:func:`nearfield.reporting.text.visible`) by the template.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import jinja2
from markupsafe import Markup

from nearfield.errors import BadInputError
from nearfield.files import write_text
from nearfield.reporting import text
from nearfield.reporting.text import Missing

if TYPE_CHECKING:
    from nearfield.reporting.svg import Figure

TEMPLATES = Path(__file__).parent / "templates"


class Element(Protocol):
    """A part of a section."""

    @property
    def kind(self) -> str: ...


Pairs = Sequence[tuple[str, str]]
"""Names with their values, in words."""


@dataclass(frozen=True)
class Facts:
    """Names with their values; ``code`` sets the values as code."""

    pairs: Pairs
    code: bool = False
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class WordTable:
    """A table of words under a caption; a row's first cell is its heading."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """Columns that hold words; those behind them hold numbers, which stand to the right."""
    tones: Sequence[str] = ()
    """A style for each row: better, worse, even, untested."""
    paths: Sequence[int] = ()
    """Columns that hold paths or hashes."""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Charts:
    """Charts beside each other."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Prose:
    """Paragraphs; ``style`` is a class of the style sheet."""

    lines: Sequence[str]
    style: str = ""
    kind: ClassVar[str] = "prose"


@dataclass(frozen=True)
class Notes:
    """Small remarks, one a line."""

    lines: Sequence[str]
    kind: ClassVar[str] = "notes"


@dataclass(frozen=True)
class Advice:
    """Facts that a reader must know, each with what to do about it."""

    pairs: Pairs
    kind: ClassVar[str] = "advice"


@dataclass(frozen=True)
class Tiles:
    """Large figures: label, figure, and a word about it."""

    tiles: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "tiles"


@dataclass(frozen=True)
class Source:
    """The text of a file as it is."""

    text: str
    kind: ClassVar[str] = "source"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    words: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Folded:
    """Elements that are shown when their summary is opened."""

    summary: str
    elements: Sequence[Element]
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Columns:
    """Groups of elements beside each other, each under its title (or none)."""

    groups: Sequence[tuple[str, Sequence[Element]]]
    kind: ClassVar[str] = "columns"


@dataclass(frozen=True)
class Section:
    """A section: its anchor, its name in the navigation, its title, and its elements (or why there are none)."""

    key: str
    short: str
    title: str
    elements: Sequence[Element] | Missing

    @property
    def reason(self) -> str | None:
        """Why the run lacks this part, if it does."""
        return self.elements.reason if isinstance(self.elements, Missing) else None


@dataclass(frozen=True)
class Finding:
    """A sentence, with ``better``, ``worse`` or ``even`` for its colour."""

    sentence: str
    tone: str


@dataclass(frozen=True)
class Page:
    """A page: ``name`` is what it is of, ``title`` says what it is (``nearfield report``)."""

    name: str
    title: str
    sections: Sequence[Section]
    verdict: Sequence[Finding] = ()
    """Sentences below the heading."""
    written: tuple[str, str] | None = None
    """The run folder that it was made from, and when."""


def check_place(out: Path) -> None:
    """Refuse a place where no page can be written."""
    if out.is_dir():
        raise BadInputError(
            "the page is one file, and this is a folder", where=str(out), hint="Name a file: --out FILE.html."
        )


def write_page(out: Path, page: Page, data: object = None) -> int:
    """Write a page aside and rename it; returns its bytes. It loads nothing from a network.

    ``data`` is what the page's script reads; without it the page has no script.
    """
    check_place(out)
    script = "" if data is None else (TEMPLATES / "report.js").read_text(encoding="utf-8")
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    html = (
        environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            policy=content_policy(script, style),
            style=Markup(style),
            script=Markup(script),
            data=embedded_json(data),
            version=importlib.metadata.version("nearfield"),
        )
    )
    try:
        write_text(out, html)
    except OSError as error:
        raise BadInputError(f"the page cannot be written ({error.strerror})", where=str(out)) from error
    return len(html.encode())


def embedded_json(value: object) -> Markup:
    """JSON that is safe inside a ``script`` element: ASCII only, without ``<``, ``>`` and ``&``; not-a-number is null."""
    source = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(source.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def content_hash(source: str) -> str:
    """The hash of an inline script or style as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def content_policy(script: str, style: str) -> str:
    """A policy that allows this script, this style, images inside the page and nothing else: no network, no frames, no forms, no base."""
    sources = f"script-src {content_hash(script)}; style-src {content_hash(style)}; img-src data:"
    return f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"


def _visible(value: object) -> object:
    """Every text that a template prints, with hidden characters written out; markup of the report's own stays."""
    return text.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def environment() -> jinja2.Environment:
    """Templates with autoescape; an undefined name is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        keep_trailing_newline=True,
    )
    made.filters.update(clip=text.clip, breakable=text.breakable, count=text.count, number=text.number)
    return made
