"""The report of a run: its sections in their order, each of what the folder holds."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from nearfield.errors import BadInputError
from nearfield.reporting import ReportResult
from nearfield.reporting.analysis import AnalysisSection, build_analysis
from nearfield.reporting.batches import build_batches
from nearfield.reporting.comparison import ComparisonSection, Finding, build_comparison
from nearfield.reporting.curves import Curves, build_curves
from nearfield.reporting.overview import (
    build_data,
    build_manifest,
    build_overview,
    read_manifest,
    read_recipe,
    sources_of,
    store_folder,
)
from nearfield.reporting.page import check_place, write_page
from nearfield.reporting.queries import Queries, build_queries
from nearfield.reporting.reading import Missing, mapping, part, real, string

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


def write_report(run: Path, out: Path | None) -> ReportResult:
    """Read the run and write its page; see :func:`nearfield.reporting.build_report`."""
    if not run.is_dir():
        raise BadInputError("this run folder does not exist", where=str(run), hint="Name a folder such as runs/NAME.")
    if not any((run / name).exists() for name in KNOWN_FILES):
        raise BadInputError(
            "this folder is not a run: it holds none of recipe.yaml, manifest.json, metrics.jsonl, comparison.json, plan, results",
            where=str(run),
            hint="Name a folder that nearfield train wrote, such as runs/NAME.",
        )
    out = out or run / "report.html"
    check_place(out)
    page, data = read_page(run)
    size = write_page("report.html.j2", out, data, name=page.name, page=page)
    reasons = {
        section.key: section.content.reason if isinstance(section.content, Missing) else None
        for section in page.sections
    }
    return ReportResult(out, size, reasons)


def read_page(run: Path) -> tuple[Page, dict[str, object]]:
    """The page of a run folder, and the figures that go with it as JSON."""
    recipe = part("recipe.yaml", lambda: read_recipe(run))
    manifest = part("manifest.json", lambda: read_manifest(run))
    curves = part("metrics.jsonl", lambda: build_curves(run, {} if isinstance(recipe, Missing) else recipe.values))
    data_store = part("the data store", lambda: store_folder(manifest, run))
    store = None if isinstance(data_store, Missing) else data_store
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
    return page, page_data(name, curves, comparison, queries, geometry)


def page_data(
    name: str,
    curves: Curves | Missing,
    comparison: ComparisonSection | Missing,
    queries: Queries | Missing,
    geometry: AnalysisSection | Missing,
) -> dict[str, object]:
    """The figures for the page's script and other programs: curves, scores and queries, uncut."""
    figures = [] if isinstance(curves, Missing) else [*curves.figures]
    figures += [] if isinstance(comparison, Missing) else comparison.truncation
    figures += [] if isinstance(geometry, Missing) else geometry.figures
    return {
        "format": FORMAT,
        "run": name,
        "charts": {figure.key: figure.values for figure in figures if figure.values is not None},
        "maps": {} if isinstance(geometry, Missing) else geometry.maps,
        "comparison": [] if isinstance(comparison, Missing) else comparison.raw,
        "queries": [] if isinstance(queries, Missing) else queries.raw,
    }
