"""All tasks of a comparison in tables by type, and the scores of vectors that were cut, by dimensions and type."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfield.evaluation.scores import MARK
from nearfield.reporting import text
from nearfield.reporting.run import AbsentError, Json, listing, load_object, mapping, real, string
from nearfield.reporting.svg import LineChart, Series

CUT = re.compile(r"^(?P<name>.+)-(?P<axes>dim|random|pca)(?P<dimensions>\d+)$")
AXES = {"dim": "first", "random": "random", "pca": "principal"}
"""What is in the name of a model that was cut -> which dimensions were kept."""
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


def suite_tables(
    scores: Sequence[Json], differences: Sequence[Json], marked: Collection[tuple[str, str]] = ()
) -> list[SuiteTable]:
    """A table a task type, in the order in which the types come; nothing for a single task.

    ``marked`` holds model and task of each score that a notice speaks of.
    """

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
        mark = MARK if (model, place(row)[0]) in marked else ""
        cell = Cell(("–" if value is None else text.score(value)) + mark, interval, tone)
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
    read = scores_by_type(results, scored[label]).get("first")
    if read is None:
        return None
    dimensions, types = read
    series = [
        Series(f"{kind} ({of[0]})", of[1], f"s{i + 1}") for i, (kind, of) in enumerate(list(types.items())[:TYPES])
    ]
    title = f"Mean score of {label} by the first dimensions kept"
    chart = LineChart("dimensions", title, [float(d) for d in dimensions], series, "dimensions", log=True)
    values = [{"label": one.label, "y": list(one.y)} for one in series]
    return chart, {"title": title, "x": list(chart.x), "series": values, "log": True, "unit": "dimensions"}


ByType = dict[str, tuple[int, list[float]]]
"""Task type -> its number of tasks, and their mean score at each number of dimensions."""


def scores_by_type(results: Path, whole: Path) -> dict[str, tuple[list[int], ByType]]:
    """Which dimensions were kept (``first``, ``random``, ``principal``) -> how many, ascending, and the scores by task type.

    ``whole`` is the folder of a model's results; those of cut vectors lie in folders of ``results`` called ``MODEL-dimN``,
    ``MODEL-randomN`` and ``MODEL-pcaN``. Only tasks that all of them have count, so that no mean is over other tasks than its
    neighbour.
    """
    folders: dict[str, dict[int, Path]] = defaultdict(dict)
    for folder in sorted(results.glob("*")):
        found = CUT.match(folder.name)
        if found and found["name"] == whole.parent.name and (folder / whole.name).is_dir():
            folders[AXES[found["axes"]]][int(found["dimensions"])] = folder / whole.name
    full = _dimensions(whole)
    if full is None:
        return {}
    read = {axes: {n: _main_scores(f) for n, f in sorted({**of, full: whole}.items())} for axes, of in folders.items()}
    everything = [set(tasks) for of in read.values() for tasks in of.values()]
    shared = sorted(set.intersection(*everything)) if everything else []
    made = {}
    for axes, of in read.items():
        by_type: dict[str, list[str]] = defaultdict(list)
        for task in shared:
            by_type[of[full][task][0]].append(task)
        types = {
            kind: (len(tasks), [sum(scores[t][1] for t in tasks) / len(tasks) for scores in of.values()])
            for kind, tasks in by_type.items()
        }
        if types and len(of) > 1:
            made[axes] = (list(of), types)
    return made


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
