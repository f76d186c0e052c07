"""The page builder: a template with its style, its script, a security policy that allows these alone, and figures as JSON."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from nearfield.errors import BadInputError
from nearfield.files import write_text
from nearfield.reporting import text

TEMPLATES = Path(__file__).parent / "templates"


def check_place(out: Path) -> None:
    """Refuse a place where no page can be written."""
    if out.is_dir():
        raise BadInputError(
            "the page is one file, and this is a folder", where=str(out), hint="Name a file: --out FILE.html."
        )


def write_page(template: str, out: Path, data: object = None, **content: object) -> int:
    """Render a template and write it aside and renamed; returns the bytes of the page.

    ``data`` is what the page's script reads; without it the page has no script.
    """
    check_place(out)
    script = "" if data is None else (TEMPLATES / "report.js").read_text(encoding="utf-8")
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    html = (
        environment()
        .get_template(template)
        .render(
            policy=content_policy(script, style),
            style=Markup(style),
            script=Markup(script),
            data=embedded_json(data),
            version=importlib.metadata.version("nearfield"),
            **content,
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
