"""The page: sections in their order, the template, the hashes of its script and style, the figures as JSON."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from nearfield.errors import BadInputError
from nearfield.files import write_text
from nearfield.reporting import ReportResult, text
from nearfield.reporting.analysis import AnalysisSection, build_analysis
from nearfield.reporting.batches import build_batches
from nearfield.reporting.comparison import Comparison, Finding, build_comparison
from nearfield.reporting.curves import Curves, build_curves
from nearfield.reporting.dataset import build_data
from nearfield.reporting.overview import (
    build_manifest,
    build_overview,
    read_manifest,
    read_recipe,
    sources_of,
    store_folder,
)
from nearfield.reporting.queries import Queries, build_queries
from nearfield.reporting.run import Missing, mapping, part, real, string

FORMAT = 1
"""The version of the JSON that the page carries."""
KNOWN_FILES = (
    "recipe.yaml",
    "manifest.json",
    "metrics.jsonl",
    "comparison.json",
    "analysis.json",
    "plan",
    "results",
    "model",
    "checkpoints",
)
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """A section: ``key`` is its anchor and picks its template, ``content`` the object that the template shows."""

    key: str
    short: str
    title: str
    content: object

    @property
    def missing(self) -> bool:
        """Whether the run lacks this part."""
        return isinstance(self.content, Missing)


@dataclass(frozen=True)
class Page:
    """All that the template shows."""

    name: str
    folder: str
    written: str
    verdict: list[Finding]
    sections: list[Section]


def write_page(run: Path, out: Path | None) -> ReportResult:
    """Read the run, render the page and write it aside and renamed; see :func:`nearfield.reporting.build_report`."""
    if not run.is_dir():
        raise BadInputError("this run folder does not exist", where=str(run), hint="Name a folder such as runs/NAME.")
    if not any((run / name).exists() for name in KNOWN_FILES):
        raise BadInputError(
            "this folder is not a run: it holds none of recipe.yaml, manifest.json, metrics.jsonl, comparison.json, plan, results",
            where=str(run),
            hint="Name a folder that nearfield train wrote, such as runs/NAME.",
        )
    out = out or run / "report.html"
    if out.is_dir():
        raise BadInputError(
            "the report is one file, and this is a folder", where=str(out), hint="Name a file: --out FILE.html."
        )
    page, data = read_page(run)
    html = render(page, data)
    try:
        write_text(out, html)
    except OSError as error:
        raise BadInputError(f"the report cannot be written ({error.strerror})", where=str(out)) from error
    reasons = {
        section.key: section.content.reason if isinstance(section.content, Missing) else None
        for section in page.sections
    }
    return ReportResult(out, len(html.encode()), reasons)


def read_page(run: Path) -> tuple[Page, dict[str, object]]:
    """The page of a run folder, and the figures that go with it as JSON."""
    recipe = part("recipe.yaml", lambda: read_recipe(run))
    manifest = part("manifest.json", lambda: read_manifest(run))
    curves = part("metrics.jsonl", lambda: build_curves(run, {} if isinstance(recipe, Missing) else recipe.values))
    found = part("the data store", lambda: store_folder(manifest, run))
    store = None if isinstance(found, Missing) else found
    listed = part("the store's sources", lambda: sources_of(store))
    sources = [] if isinstance(listed, Missing) else listed
    training = {} if isinstance(recipe, Missing) else mapping(recipe.values.get("training"))
    limit = real(training.get("max_steps"))
    comparison = part("comparison.json", lambda: build_comparison(run))
    queries = part("the queries", lambda: build_queries(run, manifest, store))
    geometry = part("analysis.json", lambda: build_analysis(run))
    overview = part("the overview", lambda: build_overview(run, recipe, manifest, curves, sources))
    made = manifest if isinstance(manifest, Missing) else part("the manifest", lambda: build_manifest(manifest, run))
    sections = [
        Section("trained", "What was trained", "What was trained on what", overview),
        Section("comparison", "Before and after", "Before and after", comparison),
        Section("queries", "Queries", "Ten queries, before and after", queries),
        Section("geometry", "Embeddings", "Shape of the embeddings", geometry),
        Section("curves", "Curves", "Training curves", curves),
        Section(
            "batches", "Batches", "Which examples met", part("the plan", lambda: build_batches(run, sources, limit))
        ),
        Section("data", "Data", "The data", part("the data", lambda: build_data(store))),
        Section("manifest", "Manifest", "Where everything came from", made),
    ]
    name = (None if isinstance(manifest, Missing) else string(manifest.get("name"))) or run.resolve().name
    verdict = [] if isinstance(comparison, Missing) else comparison.verdict
    page = Page(
        name, run.resolve().name, f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC", verdict, sections
    )
    return page, figures(name, curves, comparison, queries, geometry)


def figures(
    name: str,
    curves: Curves | Missing,
    comparison: Comparison | Missing,
    queries: Queries | Missing,
    geometry: AnalysisSection | Missing,
) -> dict[str, object]:
    """What the page's script and other programs read: curves, scores and queries, not cut and not made visible."""
    charts: dict[str, object] = {}
    if not isinstance(curves, Missing):
        for chart in curves.charts:
            charts[chart.key] = {
                "title": chart.title,
                "x": chart.x,
                "series": [{"label": label, "y": [float(f"{value:.5g}") for value in y]} for label, y in chart.series],
            }
    charts |= {} if isinstance(comparison, Missing) else comparison.charts
    charts |= {} if isinstance(geometry, Missing) else geometry.charts
    return {
        "format": FORMAT,
        "run": name,
        "charts": charts,
        "maps": {} if isinstance(geometry, Missing) else geometry.maps,
        "comparison": [] if isinstance(comparison, Missing) else comparison.raw,
        "queries": [] if isinstance(queries, Missing) else queries.raw,
    }


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
    """A policy that allows this script, this style, pictures inside the page and nothing else: no network, no frames, no forms, no base."""
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


def render(page: Page, data: Mapping[str, object]) -> str:
    """The HTML of a page."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            policy=content_policy(script, style),
            style=Markup(style),
            script=Markup(script),
            data=embedded_json(data),
            version=importlib.metadata.version("nearfield"),
        )
    )
