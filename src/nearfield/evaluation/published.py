"""Where a model stands against published results: mteb's result files, which hold no scores of single queries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nearfield.errors import BadInputError
from nearfield.evaluation import scores, statistics
from nearfield.evaluation.comparison import drawn_scores, open_models, title_of
from nearfield.evaluation.noticed import score_notices
from nearfield.evaluation.scores import Key, TaskScores
from nearfield.files import read_json

CAVEAT = (
    "Published results have no scores of single queries, so nothing is paired: the intervals hold the uncertainty of ours "
    "only, and a published score outside of one is a hint, no test."
)
REPOSITORY = "mteb"


@dataclass(frozen=True)
class PublishedRow:
    """A score of ours beside a published one. ``position`` is above, below, inside (our interval) or no interval."""

    task: str
    subset: str
    split: str
    metric: str
    model: str
    score: float
    low: float | None
    high: float | None
    published_model: str
    published: float
    published_revision: str
    data_revision: str
    position: str
    sentence: str


@dataclass(frozen=True)
class Standing:
    """Rows for each task and published model, ours in its place among theirs for each task, and what to keep in mind."""

    model: str
    rows: tuple[PublishedRow, ...]
    places: dict[str, tuple[int, int]]
    """Task title -> (place of ours among all, number of all)."""
    notes: tuple[str, ...] = (CAVEAT,)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {"version": 1, "kind": "published", **asdict(self)}


def published_folder(name: str) -> Path:
    """The folder of published results: a folder, or ``mteb`` for mteb's results repository, fetched if reachable."""
    if name != REPOSITORY or Path(name).is_dir():
        if not Path(name).is_dir():
            raise BadInputError(
                "this folder of results does not exist",
                where=name,
                hint="Give a folder of mteb's result files, or 'mteb' for its results repository.",
            )
        return Path(name)
    from mteb.cache import ResultCache

    try:
        return Path(ResultCache().download_from_remote())
    except Exception as error:
        raise BadInputError(
            f"mteb's results repository cannot be reached ({str(error).splitlines()[0][:200]})",
            where="--against",
            hint="Clone https://github.com/embeddings-benchmark/results where there is a network, and name that folder.",
        ) from error


def read_published(folder: Path, wanted: Mapping[Key, TaskScores]) -> dict[str, dict[Key, tuple[float, str]]]:
    """Model -> (task, subset, split) -> (main score, data revision) of the wanted tasks in mteb's files below a folder."""
    names = {f"{task}.json" for task, _, _ in wanted}
    found: dict[str, dict[Key, tuple[float, str]]] = {}
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(names & set(files)):
            path = Path(place) / file
            value = read_json(path, "result")
            if not isinstance(value, dict) or not isinstance(value.get("scores"), dict):
                continue
            label = _label(path.parent)
            for split, entries in value["scores"].items():
                for entry in entries if isinstance(entries, list) else []:
                    key = (file.removesuffix(".json"), str(entry.get("hf_subset")), str(split))
                    score = entry.get("main_score")
                    if key in wanted and isinstance(score, int | float):
                        found.setdefault(label, {})[key] = (float(score), str(value.get("dataset_revision")))
    return found


def _label(folder: Path) -> str:
    """The model that a folder ``<org>__<model>/<revision>`` is of."""
    meta = folder / "model_meta.json"
    if meta.is_file():
        value = read_json(meta, "model description")
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            return f"{value['name']}@{folder.name[:8]}"
    return f"{folder.parent.name.replace('__', '/', 1)}@{folder.name[:8]}"


def compare_published(
    results: Path, against: Path, *, label: str | None = None, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Standing:
    """Set the scores of a results folder beside those published below ``against``, task by task."""
    (model,) = open_models([results], None if label is None else [label])
    ours = scores.read_scores(results)
    theirs = read_published(against, ours)
    resolved = results.resolve()
    if not theirs:
        raise BadInputError("there are no results of these tasks", where=str(against), hint="Name mteb's result files.")
    rows: list[PublishedRow] = []
    places: dict[str, tuple[int, int]] = {}
    for key, of in sorted(ours.items()):
        low = high = None
        for _, drawn in drawn_scores(key, {model.label: of}, samples, seed):
            interval = statistics.percentile_interval(scores.score_draws(of, drawn), level, of.freedom)
            low, high = interval.low, interval.high
        known = {name: found[key] for name, found in theirs.items() if key in found}
        if resolved.is_relative_to(against.resolve()):
            known.pop(f"{model.name}@{resolved.name[:8]}", None)
        for name, (score, revision) in sorted(known.items(), key=lambda item: -item[1][0]):
            rows.append(_row(key, of, model.label, (low, high), name, score, revision))
        if known:
            places[title_of(key)] = (1 + sum(score > of.score for score, _ in known.values()), len(known) + 1)
    notes = [CAVEAT]
    if any(row.published_revision != row.data_revision for row in rows):
        notes.append("Some of the published scores are of another revision of the data than ours.")
    notes += [notice.sentence for notice in score_notices({model.label: ours}, sorted(ours))]
    return Standing(model.label, tuple(rows), places, tuple(notes))


def _row(
    key: Key,
    of: TaskScores,
    label: str,
    ends: tuple[float | None, float | None],
    name: str,
    score: float,
    revision: str,
) -> PublishedRow:
    low, high = ends
    if low is None or high is None:
        position, where = "no interval", f"ours has no interval ({of.reason})"
    elif score < low:
        position, where = "above", f"below our interval [{low:.4f}, {high:.4f}]"
    elif score > high:
        position, where = "below", f"above our interval [{low:.4f}, {high:.4f}]"
    else:
        position, where = "inside", f"inside our interval [{low:.4f}, {high:.4f}]"
    sentence = f"{label} on {title_of(key)}: {of.score:.4f}; {name} published {score:.4f}, {where}."
    return PublishedRow(
        *key, of.metric, label, of.score, low, high, name, score, revision, of.data_revision, position, sentence
    )
