"""Results that the leaderboard takes: held against mteb's own description of their tasks, and the rules of its results repository."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mteb
from mteb.results import TaskResult
from packaging.version import InvalidVersion, Version

from nearfield.errors import BadInputError

OLDEST = "2.0.0"
"""The first mteb whose results the results repository takes (its ``tests/run_settings_check.py``)."""
RUN_SETTINGS = "run_settings.jsonl"
_TOLERANCE = 1.5e-6
"""mteb rounds scores to six digits when it files them."""
_FROM_MINUS_ONE = ("spearman", "pearson", "kendall", "p-MRR", "ami", "alpha_auc", "mcc")
"""Metrics, or parts of their names, that reach from -1 to 1; all other main scores of mteb reach from 0 to 1."""

Problems = dict[str, list[str]]
"""Task -> what the leaderboard would not take of its result."""


def described(name: str) -> Any | None:
    """mteb's task of this name with all its splits and subsets, or None if mteb has none."""
    try:
        return mteb.get_task(name)
    except KeyError:
        return None


def all_tasks(found: Mapping[str, TaskResult]) -> dict[str, Any]:
    """mteb's tasks of these results, of those that it has."""
    return {name: task for name in found if (task := described(name)) is not None}


def other_revisions(found: Mapping[str, TaskResult], tasks: Mapping[str, Any]) -> Problems:
    """Results of tasks that mteb does not have, or of data that it does not score on."""
    made: Problems = {}
    for name, result in found.items():
        if name not in tasks:
            made[name] = ["mteb has no task of this name"]
        elif result.dataset_revision != tasks[name].metadata.revision:
            made[name] = [f"revision {result.dataset_revision}, mteb has {tasks[name].metadata.revision}"]
    return made


def old_versions(found: Mapping[str, TaskResult]) -> Problems:
    """Results of an mteb that the results repository no longer takes."""
    made: Problems = {}
    for name, result in found.items():
        said = {result.mteb_version} | {entry.get("mteb_version") for _, entry in _entries(result)}
        # Several versions stand as a range in the result's own.
        versions = {part for version in said for part in ([version] if version is None else str(version).split("-"))}
        bad = sorted({str(version) for version in versions if _older(version)})
        if bad:
            made[name] = [f"mteb {', '.join(bad)}"]
    return made


def _older(version: str | None) -> bool:
    if version is None:
        return True
    try:
        return Version(version) < Version(OLDEST)
    except InvalidVersion:
        return True


def wrong_places(found: Mapping[str, TaskResult], tasks: Mapping[str, Any]) -> Problems:
    """Scores on splits and subsets that the task does not have, twice, or with other languages."""
    made: Problems = {}
    for name, task in tasks.items():
        result, said = found[name], []
        subsets = ["default"] if task.is_aggregate else list(task.metadata.hf_subsets)
        languages = {} if task.is_aggregate else task.metadata.hf_subsets_to_langscripts
        for split, entries in result.scores.items():
            if split not in task.metadata.eval_splits:
                said.append(f"split {split!r} is not one that is scored ({', '.join(task.metadata.eval_splits)})")
            for subset, times in Counter(entry["hf_subset"] for entry in entries).items():
                if subset not in subsets:
                    said.append(f"subset {subset!r} is none of the task")
                if times > 1:
                    said.append(f"subset {subset!r} stands {times} times in split {split!r}")
            for entry in entries:
                wanted = languages.get(entry["hf_subset"])
                if wanted is not None and sorted(entry["languages"]) != sorted(wanted):
                    said.append(f"subset {entry['hf_subset']!r} is said to be in {', '.join(entry['languages'])}")
        if said:
            made[name] = said
    return made


def missing_places(found: Mapping[str, TaskResult], tasks: Mapping[str, Any]) -> Problems:
    """Splits and subsets of a task that a result lacks; ``tasks`` may be cut to the ones of a benchmark."""
    made: Problems = {}
    for name, task in tasks.items():
        have = {(split, entry["hf_subset"]) for split, entry in _entries(found[name])}
        subsets = ["default"] if task.is_aggregate else list(task.hf_subsets)
        lacking = [
            f"{subset}/{split}" for split in task.eval_splits for subset in subsets if (split, subset) not in have
        ]
        if lacking:
            made[name] = lacking
    return made


def wrong_scores(found: Mapping[str, TaskResult], tasks: Mapping[str, Any]) -> Problems:
    """Main scores that are no numbers, out of the range of their metric, or not their metric's value."""
    made: Problems = {}
    for name, task in tasks.items():
        metric = str(task.metadata.main_score)
        said = [
            f"{entry['hf_subset']}/{split}: {words}"
            for split, entry in _entries(found[name])
            if (words := _wrong_score(entry, metric)) is not None
        ]
        if not any(True for _ in _entries(found[name])):
            said.append("it holds no score")
        if said:
            made[name] = said
    return made


def _wrong_score(entry: Mapping[str, Any], metric: str) -> str | None:
    main, value = entry.get("main_score"), entry.get(metric)
    if not _is_number(main):
        return f"the main score {main!r} is no number"
    assert isinstance(main, int | float)
    low = -1.0 if any(part in metric for part in _FROM_MINUS_ONE) else 0.0
    if not low - _TOLERANCE <= main <= 1 + _TOLERANCE:
        return f"the main score {main:g} is not between {low:g} and 1, as {metric} is"
    if not _is_number(value):
        return f"there is no {metric}, which is the task's main score"
    assert isinstance(value, int | float)
    if not math.isclose(main, value, rel_tol=0, abs_tol=_TOLERANCE):
        return f"the main score {main:g} is not its {metric}, {value:g}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unsettled(found: Mapping[str, TaskResult], folder: Path) -> Problems:
    """Scores whose run settings mteb's file does not hold: the results repository asks for them."""
    from mteb.results.task_result import _expand_run_settings_entry

    file, settled = folder / RUN_SETTINGS, set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            settled |= (
                {place for place, _, _ in _expand_run_settings_entry(json.loads(line))} if line.strip() else set()
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"line {number} of these run settings cannot be read ({error})", where=str(file)
            ) from error
    made: Problems = {}
    for name, result in found.items():
        lacking = [
            f"{e['hf_subset']}/{split}" for split, e in _entries(result) if (name, split, e["hf_subset"]) not in settled
        ]
        if lacking:
            made[name] = lacking
    return made


def _entries(result: TaskResult) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(split, scores of a subset) of a result."""
    for split, entries in result.scores.items():
        for entry in entries:
            yield split, entry


def in_words(problems: Problems, most: int = 8) -> str:
    """Problems in one line, of many tasks the first ones."""
    lines = [
        f"{task} ({', '.join(said[:4])}{f' and {len(said) - 4} more' if len(said) > 4 else ''})"
        for task, said in problems.items()
    ]
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} tasks more" if len(lines) > most else "")
