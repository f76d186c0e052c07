"""All tasks of a comparison in tables by type, and the scores of vectors that were cut, by dimensions and type."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfield.reporting import text
from nearfield.reporting.run import AbsentError, Json, listing, load_object, mapping, real, string
from nearfield.reporting.svg import LineChart, Series

CUT = re.compile(r"^(?P<name>.+)-dim(?P<dimensions>\d+)$")
TYPES = 4
"""Task types that have a curve."""


@dataclass(frozen=True)
class Cell:
    """A score with its interval; ``tone`` is even (shaded: not separable from the baseline), apart, or nothing."""

    value: str
    interval: str
    tone: str


@dataclass(frozen=True)
class SuiteTable:
    """The tasks of one type: a row a task, a cell a model."""

    type: str
    models: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def suite_tables(scores: Sequence[Json], differences: Sequence[Json]) -> list[SuiteTable]:
    """A table a task type, in the order in which the types come; nothing for a single task."""

    def place(row: Json) -> tuple[str, str, str]:
        return string(row.get("task")) or "?", string(row.get("subset")) or "", string(row.get("split")) or ""

    models = list(dict.fromkeys(string(row.get("model")) or "?" for row in scores))
    verdicts = {(place(row), string(row.get("model"))): string(row.get("verdict")) for row in differences}
    types: dict[str, dict[tuple[str, str, str], dict[str, Cell]]] = defaultdict(lambda: defaultdict(dict))
    for row in scores:
        model, value = string(row.get("model")) or "?", real(row.get("score"))
        low, high = real(row.get("low")), real(row.get("high"))
        verdict = verdicts.get((place(row), model))
        tone = "even" if verdict == "not separable" else "apart" if verdict in ("better", "worse") else ""
        interval = "" if low is None or high is None else f"{text.score(low)} to {text.score(high)}"
        cell = Cell("–" if value is None else text.score(value), interval, tone)
        types[string(row.get("type")) or "Tasks"][place(row)][model] = cell
    if sum(len(tasks) for tasks in types.values()) < 2:
        return []
    tables = []
    for kind, tasks in types.items():
        rows: list[tuple[str, list[Cell | None]]] = []
        for (task, subset, split), cells in tasks.items():
            more = [part for part, usual in ((subset, "default"), (split, "test")) if part and part != usual]
            rows.append((" ".join([task, *more]), [cells.get(model) for model in models]))
        tables.append(SuiteTable(kind, models, rows))
    return tables


def dimension_chart(results: Path, scored: Mapping[str, Path]) -> tuple[LineChart, dict[str, object]] | None:
    """The mean score of each task type by the dimensions that are kept, of the trained model (else of the first one).

    ``scored`` is label -> the folder of whole vectors; cut ones lie beside it, in folders called ``MODEL-dimN``. Only tasks
    that all of them have count, so that no mean is over other tasks than its neighbour.
    """
    label = "after" if "after" in scored else next(iter(scored), None)
    if label is None:
        return None
    whole = scored[label]
    folders: dict[int, Path] = {}
    for folder in sorted(results.glob("*")):
        found = CUT.match(folder.name)
        if found and found["name"] == whole.parent.name and (folder / whole.name).is_dir():
            folders[int(found["dimensions"])] = folder / whole.name
    full = _dimensions(whole)
    if not folders or full is None:
        return None
    folders[full] = whole
    read = {dimensions: _main_scores(folder) for dimensions, folder in sorted(folders.items())}
    shared = set.intersection(*(set(tasks) for tasks in read.values()))
    by_type: dict[str, list[str]] = defaultdict(list)
    for task in sorted(shared):
        by_type[read[full][task][0]].append(task)
    series = [
        Series(
            f"{kind} ({len(tasks)})", [sum(of[t][1] for t in tasks) / len(tasks) for of in read.values()], f"s{i + 1}"
        )
        for i, (kind, tasks) in enumerate(list(by_type.items())[:TYPES])
    ]
    if not series or len(read) < 2:
        return None
    title = f"Mean score of {label} by the first dimensions kept"
    chart = LineChart("dimensions", title, [float(d) for d in read], series, "dimensions", log=True)
    values = [{"label": one.label, "y": list(one.y)} for one in series]
    return chart, {"title": title, "x": list(chart.x), "series": values, "log": True, "unit": "dimensions"}


def _dimensions(folder: Path) -> int | None:
    try:
        found = real(load_object(folder / "model_meta.json", "no description").get("embed_dim"))
    except AbsentError:
        return None
    return int(found) if found else None


def _main_scores(folder: Path) -> dict[str, tuple[str, float]]:
    """Task -> its type and the mean of its main scores, from mteb's result files."""
    found: dict[str, tuple[str, float]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            value = load_object(file, "gone")
        except AbsentError:
            continue
        main = [
            real(mapping(entry).get("main_score"))
            for split in mapping(value.get("scores")).values()
            for entry in listing(split)
        ]
        known = [score for score in main if score is not None and score == score]
        if known and len(known) == len(main):
            found[file.stem] = (_type(folder, file.stem), sum(known) / len(known))
    return found


def _type(folder: Path, task: str) -> str:
    """A task's type, from the file of its unit scores."""
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(folder / f"{task}.units.parquet").metadata or {}
        return str(json.loads(metadata[b"nearfield"]).get("task_type") or "Tasks")
    except (OSError, KeyError, ValueError):
        return "Tasks"
