"""Results on disk: one place that writes, finds, checks and reads what an evaluation leaves.

A model's results folder is ``<org>__<model>/<revision>``. For each task it holds mteb's own ``<task>.json``, and beside
it ``<task>.units.parquet``: the scores of single queries, pairs and items, with what they were made of in its metadata;
for retrieval also ``<task>.top10.parquet``. ``manifest.jsonl`` has a line for each evaluation that scored something.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nearfield.errors import BadInputError, NearfieldError, Notice, from_file, in_file
from nearfield.evaluation.scores import (
    AVERAGE_PRECISION,
    CROSSED_MEAN,
    MATCH_F1,
    MEAN,
    MEAN_OF_EXPERIMENTS,
    NOTHING,
    SPEARMAN,
    Estimator,
    Key,
    TaskScores,
    dependent,
)
from nearfield.evaluation.statistics import Floats
from nearfield.files import (
    DamagedError,
    atomic_path,
    canonical_json,
    fingerprint,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from nearfield.provenance import device, now, versions

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta
    from mteb.results import TaskResult

logger = logging.getLogger("nearfield.evaluation")

UNITS_SUFFIX = ".units.parquet"
TOP_SUFFIX = ".top10.parquet"
BASELINES = {"bm25": "mteb/baseline-bm25s", "random": "mteb/baseline-random-encoder"}
"""Models that are always there, and the names that their results are filed under."""
MANIFEST = "manifest.jsonl"
"""mteb reads every ``*.json`` of the folder as a result, and leaves this alone."""
TOP = 10
EXPERIMENT = "accuracy_of_experiment_"
"""Metrics of an item: whether each of mteb's classifiers got it right."""
_METADATA_KEY, _CHECKSUM_KEY = b"nearfield", b"nearfield.checksum"
_AGAIN = "Score the task again with --overwrite."
_ROUNDING = 1e-5
"""mteb rounds retrieval scores to five decimals; a unit file's mean must agree with its main score this closely."""

UNIT_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("subset", pa.string()),
        ("split", pa.string()),
        ("unit", pa.string()),
        ("id", pa.string()),
        ("cluster", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("contents", pa.list_(pa.int32())),
    ]
)
"""``contents`` numbers the documents or texts of a unit, where units of a task share some."""
TOP_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("subset", pa.string()),
        ("split", pa.string()),
        ("query_id", pa.string()),
        ("rank", pa.int32()),
        ("doc_id", pa.string()),
        ("score", pa.float64()),
    ]
)


@dataclass
class Record:
    """The units of one task: rows for its two Parquet files and, where no interval can be given, the reason."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in UNIT_SCHEMA.names})
    top: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in TOP_SCHEMA.names})
    reasons: dict[str, str] = field(default_factory=dict)
    """``subset/split`` -> why its units carry no interval."""


# Writing


class ResultFolder:
    """The results folder of one model below ``out``, as an evaluation fills it."""

    def __init__(self, out: Path, meta: ModelMeta) -> None:
        self.path, self.meta = out / meta.model_name_as_path() / str(meta.revision), meta
        remove_leftovers(self.path)

    def result(self, task: str) -> TaskResult:
        """mteb's result of a task."""
        from mteb.results import TaskResult

        return TaskResult.from_disk(self.path / f"{task}.json")

    def reusable(self, task: str, made_of: str, packages: Mapping[str, str | None]) -> dict[str, Any] | None:
        """The metadata of a result that is here and was made of the same; None (and a line in the log) if it was not."""
        if not (self.path / f"{task}.json").is_file():
            return None
        try:
            _, metadata = read_units(self.path, task)
            check_scores(self.path, task)
            result = self.result(task)
        except (NearfieldError, ValueError, KeyError) as error:
            logger.warning("%s: the present result cannot be used and is scored anew (%s)", task, error)
            return None
        before = metadata.get("versions") or {"mteb": metadata.get("mteb_version")}
        changed = [f"{name} {before.get(name)}" for name, of in packages.items() if before.get(name) != of]
        if result.mteb_version != packages["mteb"] and not changed:
            changed = [f"mteb {result.mteb_version}"]
        if changed:
            logger.info("%s: the present result was made with %s; scored anew", task, ", ".join(changed))
            return None
        if metadata.get("fingerprint") != made_of:
            logger.info("%s: the present result is of another model, data or settings; scored anew", task)
            return None
        return metadata

    def file(
        self, result: TaskResult, notices: Sequence[Notice], record: Record | None, metadata: Mapping[str, Any]
    ) -> None:
        """Write a task's result; an aggregate has no ``record`` of units, only those of its parts have."""
        from mteb.cache import ResultCache

        task = str(result.task_name)
        self.path.mkdir(parents=True, exist_ok=True)
        cache = ResultCache(self.path)
        # mteb would put its files into a folder "results"; here they lie where they are told to.
        vars(cache)["get_task_result_path"] = lambda task_name, **_: self.path / f"{task_name}.json"
        cache.save_to_cache(result, self.meta)
        self._put_into_result(task, notices)
        if record is not None:
            filed = {"scores_checksum": _scores_checksum(self.path, task), "notices": in_file(notices)}
            write_record(self.path, task, record, {**metadata, **filed})

    def add_notices(self, task: str, metadata: Mapping[str, Any], notices: Sequence[Notice]) -> None:
        """File a present result with these notices instead of those that it has."""
        write_metadata(self.path, task, {**metadata, "notices": in_file(notices)})
        self._put_into_result(task, notices)

    def _put_into_result(self, task: str, notices: Sequence[Notice]) -> None:
        """Put notices into mteb's result file, under a key that mteb's readers pass over."""
        path = self.path / f"{task}.json"
        write_json(path, {**read_json(path, "result"), "notices": in_file(notices)})

    def add_to_manifest(
        self,
        tasks: Mapping[str, Any],
        failures: Mapping[str, str],
        notices: Mapping[str, Sequence[Notice]],
        about: Mapping[str, Any],
    ) -> None:
        """Add a line on the tasks that were scored now and on those that failed.

        ``notices`` is task (or ``""``) -> what was said; ``about`` says how they were scored.
        """
        if not tasks and not failures:
            return
        line = {
            "time": now(),
            "command": " ".join(["nearfield", *sys.argv[1:]]),
            "model": self.meta.name,
            "revision": self.meta.revision,
            "versions": versions(),
            "machine": device(),
            "tasks": dict(tasks),
            "failures": dict(failures),
            "notices": {
                task: in_file(said)
                for task, said in notices.items()
                if said and (not task or task in {*tasks, *failures})
            },
            **about,
        }
        path = self.path / MANIFEST
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_text(path, before + canonical_json(line) + "\n")


def write_record(folder: Path, task: str, record: Record, metadata: dict[str, Any]) -> None:
    """Write a task's unit file (always, it carries the metadata) and, for retrieval, the top results."""
    _write_units(
        folder, task, pa.table(record.columns, schema=UNIT_SCHEMA), {**metadata, "no_interval": record.reasons}
    )
    top = folder / f"{task}{TOP_SUFFIX}"
    if record.top["rank"]:
        _write_checked(top, pa.table(record.top, schema=TOP_SCHEMA), {})
    else:
        top.unlink(missing_ok=True)


def write_metadata(folder: Path, task: str, metadata: dict[str, Any]) -> None:
    """Write a task's unit file again, with other metadata."""
    _write_units(folder, task, read_units(folder, task)[0], metadata)


def _write_units(folder: Path, task: str, table: pa.Table, metadata: dict[str, Any]) -> None:
    text = json.dumps(metadata, ensure_ascii=False)
    _write_checked(folder / f"{task}{UNITS_SUFFIX}", table, {_METADATA_KEY: text.encode()})


def _write_checked(file: Path, table: pa.Table, metadata: Mapping[bytes, bytes]) -> None:
    """Write a Parquet file with the checksum of its content."""
    known = {**metadata, _CHECKSUM_KEY: _checksum(table, metadata)}
    with atomic_path(file) as aside:
        pq.write_table(table.replace_schema_metadata(known), aside, compression="zstd")


def _checksum(table: pa.Table, metadata: Mapping[bytes, bytes]) -> bytes:
    """32 hex digits of the values of a table and its metadata, whatever the file's version and compression."""
    known = {key.decode(): value.decode() for key, value in metadata.items() if key != _CHECKSUM_KEY}
    return fingerprint([known, table.to_pydict()]).encode()


# Finding


def find_results(name: str, results: Path) -> Path:
    """The results folder of a command-line argument.

    It is a folder ``<org>__<model>/<revision>``, a folder ``<org>__<model>`` with one revision, or a model (a name or a
    folder) whose results lie below ``results``.
    """
    path = Path(name).expanduser()
    if path.is_dir() and any(path.glob(f"*{UNITS_SUFFIX}")):
        return path
    candidates = [path] if path.is_dir() else []
    filed = BASELINES.get(name, name)
    candidates.append(results / filed.replace("/", "__").replace(" ", "_"))
    if "/" not in filed:
        candidates += [results / f"local__{filed}", results / f"sentence-transformers__{filed}"]
    if path.is_dir():
        resolved = path.resolve()
        local = resolved.parent.name if resolved.name == "model" else resolved.name
        candidates.append(results / f"local__{local}")
    for candidate in candidates:
        revisions = _with_units(candidate)
        if len(revisions) == 1:
            return revisions[0]
        if revisions:
            raise BadInputError(
                f"there are results of {len(revisions)} revisions of {name}",
                where=str(candidate),
                hint=f"Give one of the folders: {', '.join(str(child) for child in revisions)}.",
            )
    known = ", ".join(child.name.replace("__", "/", 1) for child in _folders(results)) or "none"
    raise BadInputError(
        f"there are no results of {name!r}",
        where=str(results),
        hint=f"Models there: {known}. Score one with nearfield eval.",
    )


def all_results(results: Path) -> list[Path]:
    """Every results folder ``<org>__<model>/<revision>`` below a folder."""
    return [revision for model in _folders(results) for revision in _with_units(model)]


def _with_units(folder: Path) -> list[Path]:
    return [child for child in _folders(folder) if any(child.glob(f"*{UNITS_SUFFIX}"))]


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


# Reading


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of a results folder's manifest, oldest first; empty where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInputError(f"this manifest cannot be read ({error})", where=str(path)) from error


def failed_tasks(folder: Path) -> dict[str, str]:
    """Tasks whose last attempt failed, with what went wrong."""
    failed: dict[str, str] = {}
    for line in read_manifest(folder):
        failed = {task: reason for task, reason in failed.items() if task not in line.get("tasks", {})}
        failed |= line.get("failures", {})
    return failed


def read_checked(file: Path) -> pa.Table:
    """A Parquet file of results, whole; raise :class:`DamagedError` where it is not what was written.

    Files of earlier versions have no checksum and are taken as they are.
    """
    table = pq.read_table(file)
    metadata = table.schema.metadata or {}
    if metadata.get(_CHECKSUM_KEY, b"") not in (b"", _checksum(table, metadata)):
        raise DamagedError("this file is damaged", where=str(file), hint=_AGAIN)
    return table


def read_units(folder: Path, task: str) -> tuple[pa.Table, dict[str, Any]]:
    """A task's units and the metadata that were written with them."""
    file = folder / f"{task}{UNITS_SUFFIX}"
    try:
        table = read_checked(file)
        metadata = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except FileNotFoundError as error:
        raise BadInputError(
            f"the scores of single units of {task} are missing",
            where=str(file),
            hint="Score the model with nearfield eval: other tools keep means only.",
        ) from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise BadInputError(
            "this file of unit scores cannot be read", where=str(file), hint="Score the task again with --overwrite."
        ) from error
    if "contents" not in table.schema.names:  # a file of an earlier version
        table = table.append_column(UNIT_SCHEMA.field("contents"), pa.nulls(table.num_rows, pa.list_(pa.int32())))
    if table.schema.names != UNIT_SCHEMA.names or not isinstance(metadata, dict):
        raise BadInputError("this file has other columns than a file of unit scores", where=str(file))
    return table, metadata


def moved_data(folders: Iterable[Path]) -> dict[str, tuple[str, str]]:
    """Official task -> the revision of its data that results were scored on, and the one that this mteb would score instead."""
    import mteb

    moved: dict[str, tuple[str, str]] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.json"))):
        result = read_json(file, "result")
        scored = result.get("dataset_revision") if isinstance(result, dict) else None
        if not isinstance(scored, str):
            continue
        try:
            now = mteb.get_task(file.stem).metadata.revision
        except KeyError:  # a task of a user's own, or one that mteb has no more
            continue
        if now != scored:
            moved[file.stem] = (scored, str(now))
    return moved


def check_scores(folder: Path, task: str) -> None:
    """Raise :class:`DamagedError` where the scores in mteb's file of a task are not those that were written with its units."""
    try:
        metadata = pq.read_schema(folder / f"{task}{UNITS_SUFFIX}").metadata or {}
        filed = json.loads(metadata.get(_METADATA_KEY, b"{}")).get("scores_checksum")
    except (pa.ArrowException, OSError, ValueError, AttributeError):
        return  # there are no units, or they cannot be read, which is said where they are asked for
    if filed is not None and filed != _scores_checksum(folder, task):
        where = str(folder / f"{task}.json")
        raise DamagedError("these scores are not those that were written", where=where, hint=_AGAIN)


def _scores_checksum(folder: Path, task: str) -> str:
    result = read_json(folder / f"{task}.json", "result")
    return fingerprint(result.get("scores") if isinstance(result, dict) else None)


def read_scores(folder: Path) -> dict[Key, TaskScores]:
    """All scores of a results folder that nearfield wrote, checked: the units must give the main score again."""
    scores_of: dict[Key, TaskScores] = {}
    for file in sorted(folder.glob(f"*{UNITS_SUFFIX}")):
        task = file.name.removesuffix(UNITS_SUFFIX)
        table, metadata = read_units(folder, task)
        try:
            entries = [
                (split, subset, float(score))
                for split, of in metadata["main_scores"].items()
                for subset, score in of.items()
            ]
            metric, revision = str(metadata["main_score"]), str(metadata["dataset_revision"])
            reasons = dict(metadata["no_interval"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInputError("the metadata of this file are damaged", where=str(file)) from error
        for split, subset, score in entries:
            reason = reasons.get(f"{subset}/{split}")
            rows = table.filter(pc.and_(pc.equal(table["subset"], subset), pc.equal(table["split"], split)))
            if reason is None and rows.num_rows == 0:
                reason = "no scores of single units were kept"
            if reason is None and not math.isfinite(score):
                reason = _undefined(rows)
            scores = TaskScores(metric, score, revision, reason)
            if reason is None:
                scores = _add_units(scores, rows, file)
            notices = (*from_file(metadata.get("notices")), *_unknown(metadata.get("version"), scores))
            scores_of[task, subset, split] = replace(
                scores, task_type=str(metadata.get("task_type", "")), notices=notices
            )
    return scores_of


def _add_units(scores: TaskScores, rows: pa.Table, file: Path) -> TaskScores:
    """The units of one subset and split; refused where they do not give the main score again."""
    estimator, truth, columns = _estimator(scores.metric, rows)
    read = [_column(rows, name, file) for name in columns]
    ids = read[0][0]
    values = read[0][1] if len(read) == 1 else np.stack([column for _, column in read])
    gold = NOTHING
    if truth is not None:
        gold_ids, gold = _column(rows, truth, file)
        if gold_ids != ids:
            raise _incomplete(file)
    again = estimator.value(gold, values)
    if not math.isclose(again, scores.score, abs_tol=_ROUNDING):
        raise BadInputError(
            f"the units give a score of {again:.6f}, but the task's main score is {scores.score:.6f}",
            where=str(file),
            hint="The files are not of one evaluation; score the task again with --overwrite.",
        )
    by_id = [dict(zip(rows["id"].to_pylist(), rows[of].to_pylist(), strict=True)) for of in ("cluster", "contents")]
    clusters, contents = ([of[i] for i in ids] for of in by_id)
    made = replace(scores, estimator=estimator, ids=ids, clusters=tuple(clusters), values=values, truth=gold)
    return dependent(replace(made, unit=rows["unit"][0].as_py()), contents)


def _undefined(rows: pa.Table) -> str:
    """Why a score is not a number."""
    reason = "the score is not a number"
    for metric, words in (("prediction", "predictions"), ("gold", "gold scores")):
        values = rows.filter(pc.equal(rows["metric"], metric))["value"].to_numpy()
        if len(values) and np.ptp(values) <= 0:
            return f"{reason}: all {words} are equal, and a correlation with a constant is not defined"
        if len(values) and not np.isfinite(values).all():
            return f"{reason}: {int((~np.isfinite(values)).sum()):,} of {len(values):,} {words} are not finite"
    return reason


def _estimator(metric: str, rows: pa.Table) -> tuple[Estimator, str | None, Sequence[str]]:
    """How the score is made of the rows: the metrics there that are its truth, and its values."""
    present = set(rows["metric"].to_pylist())
    experiments = sorted(
        (name for name in present if name.startswith(EXPERIMENT)), key=lambda name: int(name.removeprefix(EXPERIMENT))
    )
    if "gold" in present:
        return SPEARMAN, "gold", ["prediction"]
    if "label" in present:
        return AVERAGE_PRECISION, "label", ["prediction"]
    if "gold_match" in present and metric == "f1":
        return MATCH_F1, "gold_match", ["match"]
    if metric == "accuracy" and len(experiments) > 1:
        return CROSSED_MEAN, None, experiments
    return MEAN_OF_EXPERIMENTS if rows["unit"][0].as_py() == "experiment" else MEAN, None, [metric]


def _column(rows: pa.Table, metric: str, file: Path) -> tuple[tuple[str, ...], Floats]:
    of_metric = rows.filter(pc.equal(rows["metric"], metric))
    ids = tuple(of_metric["id"].to_pylist())
    if not ids or len(set(ids)) != len(ids):
        raise _incomplete(file)
    return ids, of_metric["value"].to_numpy().astype(np.float64)


def _incomplete(file: Path) -> BadInputError:
    return BadInputError("the units of this file are incomplete or stand twice", where=str(file))


_COMPONENTS_SINCE = 4
"""The version of results that keeps components of any size; earlier ones dropped large ones without a word."""


def _unknown(version: Any, of: TaskScores) -> list[Notice]:
    """Notices for readers of an earlier version's scores."""
    old = isinstance(version, int) and version < _COMPONENTS_SINCE
    if not old or of.reason is not None or of.estimator not in (MEAN, SPEARMAN, AVERAGE_PRECISION) or any(of.clusters):
        return []
    what = "scored by an earlier version, which took units for independent where many of them shared content"
    return [Notice("components-unknown", what, "Score the task again with --overwrite.")]


def read_published(folder: Path, wanted: Iterable[Key]) -> dict[str, dict[Key, tuple[float, str]]]:
    """Scores of other models in mteb's files below a folder, which have no units.

    Gives model -> (task, subset, split) -> (main score, data revision) for the keys that are wanted.
    """
    keys = set(wanted)
    names = {f"{task}.json" for task, _, _ in keys}
    published: dict[str, dict[Key, tuple[float, str]]] = {}
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
                    if key in keys and isinstance(score, int | float):
                        published.setdefault(label, {})[key] = (float(score), str(value.get("dataset_revision")))
    return published


def _label(folder: Path) -> str:
    """The model that a folder ``<org>__<model>/<revision>`` is of."""
    meta = folder / "model_meta.json"
    if meta.is_file():
        value = read_json(meta, "model description")
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            return f"{value['name']}@{folder.name[:8]}"
    return f"{folder.parent.name.replace('__', '/', 1)}@{folder.name[:8]}"
