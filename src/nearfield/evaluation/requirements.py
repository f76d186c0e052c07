"""The leaderboard's demands on a submission, checked: the model's description, and results on mteb's own tasks.

Each field of the description is held against what the scored model, its folder and its card show; results are held
against mteb's description of their tasks and the rules of its results repository.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from packaging.version import InvalidVersion, Version

from nearfield.data.decontaminate import ContaminationStatement
from nearfield.errors import BadInputError

ASKED = {
    "release_date": "2026-01-31",
    "languages": "[eng-Latn]",
    "n_parameters": "22713216",
    "max_tokens": "256",
    "embed_dim": "384",
    "license": "apache-2.0",
    "open_weights": "true",
    "framework": "[Sentence Transformers, PyTorch]",
    "similarity_fn_name": "cosine",
    "use_instructions": "false",
    "training_datasets": "[MSMARCO]",
    "public_training_code": "https://github.com/organisation/name",
    "public_training_data": "https://huggingface.co/datasets/organisation/name",
}
"""Fields that a model's description must have, with an example."""
MAY_BE_NULL = ("public_training_code", "public_training_data")
_MEASURED = ("embed_dim", "max_tokens", "similarity_fn_name")
"""The metadata that mteb read off the model that was scored."""
_POSITIVE = ("n_parameters", "max_tokens", "embed_dim")
_SAYS_SOMETHING = ("languages", "framework", "license")


@dataclass(frozen=True)
class Check:
    """One thing that the leaderboard asks for. ``required`` ones must be ``ok`` before a submission is of use."""

    name: str
    ok: bool
    detail: str
    required: bool = True


# The model's description


@dataclass(frozen=True)
class Known:
    """Facts about a model that need no author: the one that was scored, its folder, its card."""

    scored: ModelMeta
    parameters: int | None
    """Numbers in the weights files of the model's folder, where that was named."""
    prompts: Mapping[str, Sequence[str]]
    """Task -> prompts that it was scored with."""
    contamination: ContaminationStatement | None
    """The card's words on benchmark texts in the training data."""
    tasks: frozenset[str]
    """Tasks that are submitted."""


def describe(meta: ModelMeta, known: Known) -> list[Check]:
    """A check of each field that is asked for."""
    checks = []
    for field in ASKED:
        value, may_be_null = getattr(meta, field), field in MAY_BE_NULL
        if value is None:
            detail = "not public, or not stated" if may_be_null else "not stated; state it in the file of --facts"
            checks.append(Check(field, may_be_null, detail, required=not may_be_null))
            continue
        problem = _problem(field, value, meta, known)
        shown = ", ".join(sorted(map(str, value))) or "none" if isinstance(value, set) else str(value)
        checks.append(Check(field, problem is None, f"{shown}: {problem}" if problem else shown, not may_be_null))
    return checks


def _problem(field: str, value: Any, meta: ModelMeta, known: Known) -> str | None:
    """The reason why a field's value is wrong, or None."""
    if field in _POSITIVE and any(number <= 0 for number in (value if isinstance(value, list | tuple) else [value])):
        return "it must be positive"
    if field in _SAYS_SOMETHING and not value:
        return "it says nothing"
    if field in _MEASURED:
        measured = getattr(known.scored, field)
        listed = isinstance(value, list | tuple) and measured in value
        return None if measured is None or value == measured or listed else f"the model that was scored has {measured}"
    special: dict[str, Callable[[], str | None]] = {
        "n_parameters": lambda: _parameters(value, known),
        "use_instructions": lambda: _instructions(bool(value), known),
        "training_datasets": lambda: _training_datasets(set(value), meta, known),
        "public_training_code": lambda: _link(value),
        "public_training_data": lambda: None if value is True else _link(value),
    }
    return special[field]() if field in special else None


def _parameters(value: int, known: Known) -> str | None:
    if known.parameters is None or known.parameters == value:
        return None
    return f"the weights files of the model's folder hold {known.parameters}"


def _instructions(stated: bool, known: Known) -> str | None:
    used = sorted({text for texts in known.prompts.values() for text in texts})
    if stated or not used:
        return None
    return f"texts were scored with {', '.join(map(repr, used[:3]))} before them, which counts as instructions"


def _training_datasets(stated: set[str], meta: ModelMeta, known: Known) -> str | None:
    """An empty set says that nothing of mteb was trained on: something must show it."""
    compared = known.contamination
    shared = sorted(set(compared.matched) - stated) if compared is not None else []
    if shared:
        return f"the card says that the training data hold texts of {', '.join(shared)}: name them"
    if stated:
        return None
    if compared is None:
        return (
            "an empty list says that the model saw no data of mteb, and nothing shows it: name the data sets, or compare the texts "
            "(nearfield data decontaminate) and name the model's folder with --model"
        )
    left = sorted(known.tasks - compared.tasks)
    if left:
        return f"an empty list says that the model saw no data of mteb, and {', '.join(left[:8])} was not compared with its texts"
    inherited = _datasets_of_base(meta)
    if inherited:
        return f"its base {meta.adapted_from} was trained on {', '.join(inherited[:8])}"
    return None


def _datasets_of_base(meta: ModelMeta) -> list[str]:
    """Data sets that mteb knows the base model to be trained on."""
    if meta.adapted_from is None:
        return []
    try:
        base = mteb.get_model_meta(meta.adapted_from, fetch_from_hf=False)
    except (KeyError, ValueError):
        return []
    return sorted(base.get_training_datasets() or ())


def _link(value: Any) -> str | None:
    fine = isinstance(value, str) and value.startswith(("https://", "http://"))
    return None if fine else "it is no address (https://...)"


# The results

OLDEST = "2.0.0"
"""The first mteb whose results the results repository takes (its ``tests/run_settings_check.py``)."""
RUN_SETTINGS = "run_settings.jsonl"
_TOLERANCE = 1.5e-6
"""mteb rounds scores to six digits when it files them."""
_FROM_MINUS_ONE = ("spearman", "pearson", "kendall", "p-MRR", "ami", "alpha_auc", "mcc")
"""Metrics, or parts of their names, that reach from -1 to 1; all other main scores of mteb reach from 0 to 1."""

Results = Mapping[str, TaskResult]
Problems = dict[str, list[str]]
"""Task -> what the leaderboard would not take of its result; tasks without a problem are not in it."""


def official_task(name: str) -> Any | None:
    """mteb's task of this name with all its splits and subsets, or None if mteb has none."""
    try:
        return mteb.get_task(name)
    except KeyError:
        return None


def official_tasks(names: Mapping[str, Any]) -> dict[str, Any]:
    """mteb's tasks of these names, of those that it has."""
    return {name: task for name in names if (task := official_task(name)) is not None}


def check_results(results: Results, tasks: Mapping[str, Any], folder: Path) -> list[Check]:
    """Whether the leaderboard takes results as they are; ``folder`` holds mteb's file of run settings."""
    settled = _settled(folder / RUN_SETTINGS)
    known = {name: (result, tasks[name]) for name, result in results.items() if name in tasks}
    rules = (
        ("data revisions", "those of mteb", {n: _other_revision(r, tasks.get(n)) for n, r in results.items()}),
        ("mteb version", f"{OLDEST} or newer", {n: _old_versions(r) for n, r in results.items()}),
        ("splits and subsets", "those of the tasks", {n: _wrong_places(r, task) for n, (r, task) in known.items()}),
        ("scores", "each is its metric's value", {n: _wrong_scores(r, task) for n, (r, task) in known.items()}),
        ("run settings", "of each score", {n: _unsettled(n, r, settled) for n, r in results.items()}),
    )
    checks = []
    for name, fine, said in rules:
        problems = {task: words for task, words in said.items() if words}
        if problems:
            checks.append(Check(name, False, in_words(problems)))
        else:
            checks.append(Check(name, bool(results), fine if results else "there is no result"))
    return checks


def _entries(result: TaskResult) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(split, subset, scores) of a result."""
    for split, entries in result.scores.items():
        for entry in entries:
            yield split, entry["hf_subset"], entry


def _other_revision(result: TaskResult, task: Any | None) -> list[str]:
    """The result must be of a task that mteb has, on the data that mteb scores it on."""
    if task is None:
        return ["mteb has no task of this name"]
    ours, theirs = result.dataset_revision, task.metadata.revision
    return [] if ours == theirs else [f"revision {ours}, mteb has {theirs}"]


def _old_versions(result: TaskResult) -> list[str]:
    """Versions of mteb that the results repository no longer takes."""
    said = {result.mteb_version} | {entry.get("mteb_version") for _, _, entry in _entries(result)}
    # Several versions stand as a range in the result's own.
    versions = {part for version in said for part in ([version] if version is None else str(version).split("-"))}
    bad = sorted({str(version) for version in versions if _older(version)})
    return [f"mteb {', '.join(bad)}"] if bad else []


def _older(version: str | None) -> bool:
    if version is None:
        return True
    try:
        return Version(version) < Version(OLDEST)
    except InvalidVersion:
        return True


def _wrong_places(result: TaskResult, task: Any) -> list[str]:
    """Scores on splits and subsets that the task does not have, twice, or with other languages."""
    said = []
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
    return said


def _wrong_scores(result: TaskResult, task: Any) -> list[str]:
    """Main scores that are no numbers, out of the range of their metric, or not their metric's value."""
    metric, entries = str(task.metadata.main_score), list(_entries(result))
    said = [
        f"{subset}/{split}: {words}"
        for split, subset, entry in entries
        if (words := _wrong_score(entry.get("main_score"), entry.get(metric), metric)) is not None
    ]
    return said if entries else ["it holds no score"]


def _wrong_score(main: object, value: object, metric: str) -> str | None:
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


def _unsettled(name: str, result: TaskResult, settled: set[tuple[str, str, str]]) -> list[str]:
    """Scores without run settings."""
    return [f"{subset}/{split}" for split, subset, _ in _entries(result) if (name, split, subset) not in settled]


def _settled(file: Path) -> set[tuple[str, str, str]]:
    """(task, split, subset) of each score that mteb's file has the run settings of: its results repository asks for them."""
    from mteb.results.task_result import _expand_run_settings_entry

    settled: set[tuple[str, str, str]] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            if line.strip():
                settled |= {place for place, _, _ in _expand_run_settings_entry(json.loads(line))}
        except (ValueError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"line {number} of these run settings cannot be read ({error})", where=str(file)
            ) from error
    return settled


def missing_places(results: Results, tasks: Mapping[str, Any]) -> Problems:
    """Splits and subsets of a task that a result lacks; ``tasks`` may be cut to the ones of a benchmark."""
    made: Problems = {}
    for name, task in tasks.items():
        have = {(split, subset) for split, subset, _ in _entries(results[name])}
        subsets = ["default"] if task.is_aggregate else list(task.hf_subsets)
        lacking = [
            f"{subset}/{split}" for split in task.eval_splits for subset in subsets if (split, subset) not in have
        ]
        if lacking:
            made[name] = lacking
    return made


def in_words(problems: Problems, most: int = 8) -> str:
    """Problems in one line, of many tasks the first ones."""
    lines = [
        f"{task} ({', '.join(said[:4])}{f' and {len(said) - 4} more' if len(said) > 4 else ''})"
        for task, said in problems.items()
    ]
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} tasks more" if len(lines) > most else "")
