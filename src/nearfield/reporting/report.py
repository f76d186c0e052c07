"""The report of a run: its sections in their order, and those on the recipe, the manifest and the data."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfield.errors import BadInputError
from nearfield.reporting import text
from nearfield.reporting.analysis import TITLE as SHAPE
from nearfield.reporting.analysis import AnalysisSection, build_analysis
from nearfield.reporting.batches import build_batches
from nearfield.reporting.comparison import ComparisonSection, build_comparison
from nearfield.reporting.curves import Curves, build_curves
from nearfield.reporting.page import (
    Advice,
    Columns,
    Element,
    Facts,
    Folded,
    Heading,
    Notes,
    Page,
    Prose,
    Section,
    Source,
    Tiles,
    WordTable,
    check_place,
    write_page,
)
from nearfield.reporting.queries import Queries, build_queries
from nearfield.reporting.text import (
    AbsentError,
    Json,
    Missing,
    listing,
    load_object,
    logger,
    mapping,
    part,
    real,
    string,
    total,
)

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
class ReportResult:
    """The written page: its path, its size in bytes, and its sections with the reason for each that is missing."""

    path: Path
    size: int
    sections: dict[str, str | None]


def build_report(run: Path, out: Path | None = None) -> ReportResult:
    """Write the report of a run folder to ``out`` (default: ``run/report.html``).

    A part of the run that is missing or damaged is said in its section. Raises :class:`BadInputError` if ``run`` is no
    run folder or ``out`` cannot be a file.
    """
    run = Path(run)
    if not run.is_dir():
        raise BadInputError("this run folder does not exist", where=str(run), hint="Name a folder such as runs/NAME.")
    if not any((run / name).exists() for name in KNOWN_FILES):
        raise BadInputError(
            "this folder is not a run: it holds none of recipe.yaml, manifest.json, metrics.jsonl, comparison.json, plan, results",
            where=str(run),
            hint="Name a folder that nearfield train wrote, such as runs/NAME.",
        )
    out = Path(out or run / "report.html")
    check_place(out)
    page, data = read_page(run)
    size = write_page(out, page, data)
    return ReportResult(out, size, {section.key: section.reason for section in page.sections})


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
    batches = part("the plan", lambda: build_batches(run, sources, limit))
    made = manifest if isinstance(manifest, Missing) else part("the manifest", lambda: build_manifest(manifest, run))
    sections = [
        Section("trained", "What was trained", "What was trained on what", overview),
        Section("comparison", "Before and after", "Before and after", _whole(comparison)),
        Section("queries", "Queries", "Ten queries, before and after", _whole(queries)),
        Section("geometry", "Embeddings", SHAPE, geometry if isinstance(geometry, Missing) else geometry.elements),
        Section("curves", "Curves", "Training curves", curves if isinstance(curves, Missing) else curves.elements),
        Section("batches", "Batches", "Which examples met", batches),
        Section("data", "Data", "The data", part("the data", lambda: build_data(store))),
        Section("manifest", "Manifest", "Where everything came from", made),
    ]
    name = (None if isinstance(manifest, Missing) else string(manifest.get("name"))) or run.resolve().name
    verdict = [] if isinstance(comparison, Missing) else comparison.verdict
    written = run.resolve().name, f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    page = Page(name, "nearfield report", sections, verdict, written)
    return page, page_data(name, curves, comparison, queries, geometry)


def _whole(content: Element | Missing) -> list[Element] | Missing:
    """A section that is one element."""
    return content if isinstance(content, Missing) else [content]


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


SECTIONS = ("encoder", "objective", "batches", "training", "data", "prompts", "evaluation")
"""The recipe's parts that get a row of their own, in this order; any other follows."""

RECIPE_CHARACTERS = 60_000


@dataclass(frozen=True)
class RecipeText:
    """``recipe.yaml``: the parsed mapping and the text as it stands in the file."""

    values: dict[str, object]
    source: str


def read_recipe(run: Path) -> RecipeText:
    """Parse ``recipe.yaml`` safely."""
    import yaml

    from nearfield.config import load_yaml

    try:
        source = (run / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise AbsentError("No recipe.yaml: the folder does not say what was run.") from error
    try:
        values = load_yaml(source)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        logger.warning("report: recipe.yaml is not valid YAML: %s", error)
        return RecipeText({}, source)
    return RecipeText(mapping(values), source)


def read_manifest(run: Path) -> dict[str, object]:
    """The object of ``manifest.json``."""
    return load_object(run / "manifest.json", "No manifest.json: where the parts of this run came from is not known.")


def flatten(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, words) pairs; lists of scalars stay on one line; empty parts say ``none``."""
    if isinstance(value, dict) and value:
        return [
            pair for key, item in value.items() for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [
            pair
            for number, item in enumerate(value)
            for pair in flatten(item, f"{prefix}.{number}" if prefix else str(number))
        ]
    return [(prefix, "none" if value in ({}, [], None) else text.plain(value))]


def build_manifest(manifest: Json, run: Path) -> list[Element]:
    """The section, from the manifest's object."""
    facts = [(label, words) for label, words in (
        ("run", string(manifest.get("name"))),
        ("created", text.moment(manifest["created"]) if manifest.get("created") is not None else None),
        ("command", _command(manifest.get("command"))),
        ("seed", string(manifest.get("seed"))),
    ) if words is not None]  # fmt: skip
    shown: list[Element] = [Facts(facts)]
    stages = {name: mapping(value) for name, value in mapping(manifest.get("stages")).items()}
    if stages:
        rows, details = [], []
        for name, stage in stages.items():
            seconds, path = real(stage.get("seconds")), _relative(string(stage.get("path")) or "–", run.resolve())
            time = text.duration(seconds) if seconds is not None else "–"
            rows.append([name, string(stage.get("fingerprint")) or "–", path, time])
            others = [(key, one) for key, one in stage.items() if key not in ("fingerprint", "path", "seconds")]
            details.append((name, [pair for key, one in others for pair in flatten(one, key)]))
        caption = "Stages; a fingerprint names all that a stage was made from"
        heads = ["stage", "fingerprint", "written to", "time"]
        said = Columns([(name, [Facts(pairs, code=True)]) for name, pairs in details if pairs])
        shown += [
            WordTable(caption, heads, rows, words=3, paths=(1, 2)),
            Folded("What each stage says of itself", [said]),
        ]
    named = {"Versions": manifest.get("versions"), "Device": manifest.get("device")}
    shown.append(Columns([(title, [Facts(flatten(value))]) for title, value in named.items() if value]))
    known = {"name", "created", "command", "seed", "versions", "device", "stages", "notices"}
    rest = [pair for key, value in manifest.items() if key not in known for pair in flatten(value, key)]
    return [*shown, *([Folded("The rest of the manifest", [Facts(rest, code=True)])] if rest else [])]


def _relative(path: str, run: Path) -> str:
    """A path in the run, or beside it, as seen from the run; any other as it is."""
    for home, prefix in ((run, ""), (run.parent, "../")):
        if path.startswith(f"{home}/"):
            return prefix + path[len(str(home)) + 1 :]
    return path


def _command(value: object) -> str | None:
    return " ".join(str(item) for item in value) if isinstance(value, list) else string(value)


def device_words(manifest: Json) -> str | None:
    """The device of the training in a few words."""
    trained = string(mapping(mapping(manifest.get("stages")).get("train")).get("device"))
    device = mapping(manifest.get("device"))
    gpus = [str(gpu) for gpu in listing(device.get("gpus"))]
    if gpus and trained != "cpu":
        names = dict.fromkeys(gpus)
        return ", ".join(f"{gpus.count(name)} × {name}" if gpus.count(name) > 1 else name for name in names)
    threads, machine = real(device.get("threads")), string(device.get("machine"))
    if threads and trained in (None, "cpu"):
        return (
            f"{text.count(threads)} CPU {'thread' if threads == 1 else 'threads'}{f' ({machine})' if machine else ''}"
        )
    return trained or string(manifest.get("device"))


def planned_steps(run: Path, recipe: Json) -> float | None:
    """The steps that the run is to have: those of its plan, at most the recipe's ``max_steps``; None if not known."""
    plan = load_object(run / "plan" / "summary.json", "No plan.")
    steps, limit = real(plan.get("steps")), real(mapping(recipe.get("training")).get("max_steps"))
    return min(steps, limit) if steps is not None and limit is not None else steps


def build_overview(
    run: Path, recipe: RecipeText | Missing, manifest: Json | Missing, curves: Curves | Missing, sources: list[str]
) -> list[Element]:
    """The section: a sentence, tiles with figures, and the recipe by parts. It needs one of the three files at least."""
    if isinstance(recipe, Missing) and isinstance(manifest, Missing) and isinstance(curves, Missing):
        raise AbsentError(recipe.reason)
    values = {} if isinstance(recipe, Missing) else recipe.values
    made = {} if isinstance(manifest, Missing) else manifest
    notes = [part.reason for part in (recipe, manifest) if isinstance(part, Missing)]
    unseen = string(mapping(mapping(mapping(made.get("stages")).get("train")).get("contamination")).get("unseen"))
    notes += [f"Benchmark texts in the training data: {unseen}."] if unseen else []
    if not isinstance(recipe, Missing) and not values:
        notes.append("recipe.yaml cannot be read as YAML; its text stands below.")
    planned = part("the plan", lambda: planned_steps(run, values))
    tiles: list[tuple[str, str, str]] = []
    if not isinstance(curves, Missing):
        tiles.append(
            (
                "steps",
                text.count(curves.steps),
                f"mean loss of the first and last tenth: {text.number(curves.first_loss, 3)} → {text.number(curves.last_loss, 3)}",
            )
        )
        if curves.rows_seen and curves.every_step:
            tiles.append(("examples", text.count(curves.rows_seen), ""))
        if curves.tokens and curves.every_step:
            computed = (
                f"{text.percent(curves.padded - curves.tokens, curves.padded)} padding"
                if curves.padded >= curves.tokens
                else ""
            )
            tiles.append(("tokens", text.count(curves.tokens), computed))
    stages = {name: mapping(stage) for name, stage in mapping(made.get("stages")).items()}
    finished = real(stages.get("train", {}).get("seconds"))
    trained = finished or (curves.seconds if not isinstance(curves, Missing) and curves.every_step else None)
    if trained:
        device = device_words(made)
        tiles.append(("training time", text.duration(trained), f"on {text.clip(device, 40)}" if device else ""))
    whole = total(stage.get("seconds") for stage in stages.values())
    if finished and whole > finished:
        tiles.append(("all stages", text.duration(whole), ""))
    sentence = _sentence(values, made, curves, sources, None if isinstance(planned, Missing) else planned)
    shown: list[Element] = [Prose([sentence], "lead"), Tiles(tiles), Notes(notes)]
    notices = _notices(made)
    if notices:
        shown += [Heading("Notices"), Advice(notices)]
    shown.append(Columns([(name, [Facts(pairs)]) for name, pairs in _parts(values)]))
    if not isinstance(recipe, Missing):
        shown.append(Folded("The whole recipe, as it was resolved", [Source(_source(recipe.source))]))
    return shown


def _notices(manifest: Json) -> list[tuple[str, str]]:
    notices = [mapping(one) for one in listing(manifest.get("notices"))]
    return [(words, string(one.get("hint")) or "") for one in notices if (words := string(one.get("what")))]


def _parts(values: Json) -> list[tuple[str, list[tuple[str, str]]]]:
    names = [name for name in SECTIONS if name in values] + [name for name in values if name not in SECTIONS]
    parts: list[tuple[str, list[tuple[str, str]]]] = []
    single: list[tuple[str, str]] = []
    for name in names:
        value = _without_nulls(values[name])
        if isinstance(value, dict):
            parts += [(name, flatten(value))] if value else []
        elif value is not None:
            single += flatten(value, name)
    return [("run", single), *parts] if single else parts


def _without_nulls(value: object) -> object:
    """A setting without what is null or empty in it; the whole recipe stands below."""
    if isinstance(value, dict):
        values = {key: _without_nulls(item) for key, item in value.items()}
        return {key: item for key, item in values.items() if item not in (None, {}, [])}
    return value


def _source(source: str) -> str:
    if len(source) <= RECIPE_CHARACTERS:
        return source
    return f"{source[:RECIPE_CHARACTERS]}\n… ({text.count(len(source))} characters)"


def _sentence(recipe: Json, manifest: Json, curves: Curves | Missing, sources: list[str], planned: float | None) -> str:
    objective, batches = mapping(recipe.get("objective")), mapping(recipe.get("batches"))
    words = [string(mapping(recipe.get("encoder")).get("model")) or "An encoder", "was trained"]
    chosen = [str(name) for name in listing(recipe.get("sources"))] or sources
    if chosen:
        words.append(f"on {' and '.join(', '.join(chosen).rsplit(', ', 1))}")
    elif string(recipe.get("data")):
        words.append(f"on {Path(str(recipe['data'])).name}")
    if string(objective.get("kind")):
        settings = [
            f"{key.replace('_', ' ')} {text.plain(value)}"
            for key, value in objective.items()
            if key == "temperature" and string(value)
        ]
        words.append(f"with the objective {objective['kind']}{' (' + ', '.join(settings) + ')' if settings else ''}")
    if not isinstance(curves, Missing):
        of = f" of {text.count(planned)}" if planned is not None and planned > curves.steps else ""
        words.append(f"for {text.count(curves.steps)}{of} {'step' if curves.steps == 1 and not of else 'steps'}")
    if string(batches.get("batch_size")):
        words.append(f"of {text.plain(batches['batch_size'])} examples")
    created = manifest.get("created")
    if created is not None:
        words.append(f"({text.moment(created)})")
    return text.clip(" ".join(words), 600) + "."


def sources_of(folder: Path | None) -> list[str]:
    """The names of the store's sources in order; empty where the store is gone."""
    if folder is None or not (folder / "store.json").is_file():
        return []
    store = load_object(folder / "store.json", "")
    return [string(mapping(one).get("name")) or str(number) for number, one in enumerate(listing(store.get("sources")))]


def store_folder(manifest: Json | Missing, run: Path) -> Path | None:
    """The data store that the manifest names, absolute or relative to the run, its parent or the current folder."""
    if isinstance(manifest, Missing):
        return None
    named = string(mapping(mapping(manifest.get("stages")).get("data")).get("path")) or string(
        mapping(manifest.get("data")).get("path")
    )
    if not named or "\0" in named:
        return None
    return next((base for base in (run / named, run.parent / named, Path(named)) if base.is_dir()), None)


EXAMPLES = 10
"""Quarantined rows and conflicts that are shown, at most."""


def build_data(store: Path | None) -> list[Element]:
    """The section of a store folder (None: the manifest names none, or it is gone)."""
    if store is None:
        raise AbsentError("The data store that this run was made from is not at hand, so its summary cannot be shown.")
    summary = load_object(store / "summary.json", "The data store has no summary.json.")
    sources = [mapping(one) for one in listing(summary.get("sources"))]
    facts = [(label, words) for label, words in (
        ("store", string(summary.get("name"))),
        ("fingerprint", string(summary.get("fingerprint"))),
        ("items", _count(summary.get("items"))),
        ("examples", _count(summary.get("examples"))),
    ) if words is not None]  # fmt: skip
    quarantine = part("the quarantine", lambda: _quarantine(store, sources))
    findings = _findings(summary, sources)
    silent = Missing("The store's summary says nothing of duplicates or conflicts.")
    conflicts = _conflicts(mapping(summary.get("conflicts")))
    return [
        Facts(facts),
        _source_table(sources),
        Heading("Quarantine"),
        *([quarantine] if isinstance(quarantine, Missing) else quarantine),
        Heading("Duplicates and conflicts"),
        Prose(findings) if findings else silent,
        *(
            [Folded("The first contradictions", [Columns([("", [Facts(one)]) for one in conflicts])])]
            if conflicts
            else []
        ),
    ]


def _count(value: object) -> str | None:
    number = real(value)
    return None if number is None else text.count(number)


def _source_table(sources: Sequence[Json]) -> WordTable:
    splits = list(dict.fromkeys(split for source in sources for split in mapping(source.get("splits"))))
    counted = ["rows", "examples", "duplicates", "groups", "clusters"]
    rows = []
    for source in sources:
        of_split = mapping(source.get("splits"))
        row = [string(source.get(name)) or "–" for name in ("name", "kind", "task_type")]
        row += [_count(source.get(name)) or "–" for name in counted]
        rows.append(row + [_count(of_split.get(split)) or "0" for split in splits])
    heads = ["source", "examples are", "task type", "rows read", *counted[1:], *splits]
    return WordTable("Sources of the store", heads, rows, words=3)


def _quarantine(store: Path, sources: Sequence[Json]) -> list[Element]:
    """Rows set aside: how many of how many, by reason, and the first ones."""
    reasons: dict[str, float] = {}
    for source in sources:
        for reason, value in mapping(source.get("quarantined")).items():
            reasons[reason] = reasons.get(reason, 0.0) + (real(value) or 0.0)
    bad, read = sum(reasons.values()), total(source.get("rows") for source in sources)
    if bad:
        sentence = f"{text.count(bad)} of {text.count(read)} rows ({text.percent(bad, read)}) cannot be used and are kept in quarantine.jsonl."
    else:
        sentence = f"All {text.count(read)} rows that were read can be used."
    counted = [(reason, text.count(value)) for reason, value in sorted(reasons.items(), key=lambda item: -item[1])]
    first_rows = _first_rows(store / "quarantine.jsonl")
    rows = WordTable("Rows in quarantine", ["where", "reason", "excerpt"], first_rows, words=3)
    return [
        Prose([sentence]),
        WordTable("Rows that cannot be used, by reason", ["reason", "rows"], counted),
        *([Folded("The first of them", [rows])] if first_rows else []),
    ]


def _first_rows(path: Path) -> list[tuple[str, str, str]]:
    """The first rows of the quarantine as (file and line, reason, excerpt); empty where there is no file."""
    rows: list[tuple[str, str, str]] = []
    if not path.is_file():
        return rows
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = mapping(json.loads(line))
            except (ValueError, RecursionError):
                continue
            place = f"{Path(string(row.get('file')) or '?').name}:{string(row.get('line')) or '?'}"
            excerpt = row.get("excerpt")
            shown = excerpt if isinstance(excerpt, str) else json.dumps(excerpt, ensure_ascii=False)
            rows.append((place, string(row.get("reason")) or "?", shown))
            if len(rows) == EXAMPLES:
                break
    return rows


def _findings(summary: Json, sources: Sequence[Json]) -> list[str]:
    findings = []
    if any("duplicates" in source for source in sources):
        duplicates = total(source.get("duplicates") for source in sources)
        read = total(source.get("rows") for source in sources)
        findings.append(
            f"{text.count(duplicates)} rows ({text.percent(duplicates, read)}) say the same as an earlier row and were merged with it."
            if duplicates
            else "No row says the same as another."
        )
    conflicts = mapping(summary.get("conflicts"))
    counts = [
        (
            real(conflicts.get("positive_and_negative")),
            "pairs of a query and a text are called positive and negative; the positive counts",
        ),
        (real(conflicts.get("labels")), "items bear more than one label"),
        (real(conflicts.get("scores")), "pairs have more than one score"),
    ]
    findings += [f"{text.count(value)} {words}." for value, words in counts if value]
    if conflicts and not any(value for value, _ in counts):
        findings.append("No two statements of the data contradict each other.")
    shared = {pair: real(value) or 0.0 for pair, value in mapping(summary.get("shared_between_splits")).items()}
    findings += [
        f"{text.count(value)} items are in examples of two splits: {pair.replace('+', ' and ')}."
        for pair, value in shared.items()
        if value
    ]
    return findings


def _conflicts(conflicts: Json) -> list[list[tuple[str, str]]]:
    return [
        [(name, string(value) or text.plain(value)) for name, value in mapping(one).items()]
        for one in listing(conflicts.get("first"))[:EXAMPLES]
    ]
