"""A leaderboard submission: what mteb asks of one, checked; its files, laid out and read back by mteb's own classes."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import yaml
from mteb.cache import ResultCache
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from pydantic import ValidationError

from nearfield.config import load_yaml
from nearfield.data.decontaminate import ContaminationStatement, read_statement
from nearfield.errors import BadInputError, Notice, from_file
from nearfield.evaluation.requirements import (
    ASKED,
    MAY_BE_NULL,
    RUN_SETTINGS,
    Check,
    Known,
    check_results,
    describe,
    in_words,
    missing_places,
    official_tasks,
)
from nearfield.evaluation.results import MANIFEST, check_scores, failed_tasks, read_manifest
from nearfield.evaluation.tasks import LOCAL, parts_of
from nearfield.files import atomic_path, read_json, write_text

_NO_WEIGHTS = ("I64", "I32", "BOOL")
"""Types of positions and masks that are kept beside the weights."""
CONTAMINATION = "## Benchmark texts in the training data"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Submission:
    """The folder that was written, what was checked, and what is left to do by hand."""

    folder: Path
    checks: tuple[Check, ...]
    steps: tuple[str, ...]
    unstated: tuple[str, ...] = ()
    """Fields of the description that are asked for and not known, each with an example: ``license: apache-2.0``."""
    notices: tuple[Notice, ...] = ()
    """Notices for readers of the submitted scores."""

    @property
    def complete(self) -> bool:
        """Whether nothing that is required is missing."""
        return all(check.ok for check in self.checks if check.required)


def submit(
    results: Path,
    out: Path,
    *,
    benchmark: str | None = None,
    facts: Path | None = None,
    model: Path | None = None,
    base: str | None = None,
) -> Submission:
    """Check a results folder ``<org>__<model>/<revision>`` and lay out a submission below ``out``.

    ``benchmark`` names the tasks that must be complete; without it those that are there count. ``facts`` is a YAML file
    with fields of mteb's ModelMeta that nobody but the author knows; ``model`` the model's folder, for its card and its
    parameters; ``base`` where the base of an adapter alone lies, if not where it says.
    Results of local data are left out: the leaderboard takes official tasks only.
    """
    if model is not None and not model.is_dir():
        raise BadInputError("there is no such folder", where=str(model), hint="Name the model's folder with --model.")
    stands_on = None if model is None else _base_of(model, base)
    counted = None if model is None else _counted(model, stands_on)
    meta = read_meta(results / "model_meta.json", facts, model, counted)
    scored = read_meta(results / "model_meta.json", None)
    by_task, local = _results(results)
    tasks = official_tasks(by_task)
    left_out = f"; left out, scored on local data: {', '.join(local)}" if local else ""
    said = {task: from_file(read_json(results / f"{task}.json", "result").get("notices")) for task in sorted(by_task)}
    stated = None if model is None else read_statement(_card(model))
    prompts, lacking = _known_prompts(results, sorted(by_task))
    known = Known(scored, counted, prompts, stated, frozenset(by_task))
    checks = [
        _named(meta, results),
        *describe(meta, known),
        _complete(by_task, tasks, benchmark),
        Check("official data", bool(by_task), f"{len(by_task)} results on official data{left_out}"),
        *check_results(by_task, tasks, results),
        _no_failures(results),
        _prompts(prompts, lacking, _unchecked(results, sorted(by_task))),
        _contamination(model, stated, sorted(by_task)),
        _noticed(said),
        *([] if stands_on is None else [_base(stands_on)]),
    ]
    name = str(meta.name).replace("/", "__").replace(" ", "_")
    with atomic_path(out) as aside:
        folder = aside / "results" / name / str(meta.revision)
        folder.mkdir(parents=True)
        for task in by_task:
            shutil.copyfile(results / f"{task}.json", folder / f"{task}.json")
        _copy_settings(results, folder, by_task)
        (folder / "model_meta.json").write_text(json.dumps(meta.to_dict(), indent=2, default=str) + "\n")
        write_text(aside / "model_meta.py", as_python(meta))
    checks.append(_read_back(out, meta, by_task))
    unstated = tuple(
        f"{field}: {example}"
        for field, example in ASKED.items()
        if getattr(meta, field) is None and field not in MAY_BE_NULL
    )
    notices = tuple(dict.fromkeys(notice for of in said.values() for notice in of))
    return Submission(out, tuple(checks), _steps(out, meta, name), unstated, notices)


@dataclass(frozen=True)
class _Base:
    """The base of an adapter saved alone, and its folder; None where that is not here."""

    name: str
    is_local: bool
    folder: Path | None


def _base_of(model: Path, given: str | None) -> _Base | None:
    """The base of an adapter that is alone in a model's folder; None for a whole model."""
    from nearfield.encoders.source import adapter_base, find_base

    stands_on = adapter_base(model)
    if stands_on is None:
        if given is not None:
            raise BadInputError(
                "this is a whole model, no adapter that was saved alone: it has no base", where=str(model)
            )
        return None
    place = None
    try:
        place = Path(find_base(stands_on, model, given))
    except BadInputError:
        if given is not None:
            raise
    return _Base(stands_on.name, stands_on.is_local, place)


def _counted(model: Path, base: _Base | None) -> int | None:
    """The parameters of a model's folder, with those of the base that it needs; None where not all are at hand."""
    count = parameters(model)
    if base is None or count is None:
        return count
    below = None if base.folder is None else parameters(base.folder)
    return None if below is None else count + below


def _base(base: _Base) -> Check:
    """Whether others can load an adapter that is alone in its folder."""
    if not base.is_local:
        return Check("base of the adapter", True, base.name)
    words = f"{base.name.removeprefix('local/')} is a folder of this machine" + (
        "" if base.folder else ", and is not here (see --base)"
    )
    return Check("base of the adapter", False, f"{words}: nobody else can load the model; save it merged")


def read_meta(path: Path, facts: Path | None, model: Path | None = None, counted: int | None = None) -> ModelMeta:
    """mteb's description of a model from its file, with the author's facts in it, and its ``counted`` parameters."""
    value = read_json(path, "model description")
    if not isinstance(value, dict):
        raise BadInputError("this is no model description", where=str(path))
    value = {key: part for key, part in value.items() if key in ModelMeta.model_fields and key != "loader"}
    if value.get("n_parameters") is None:
        value["n_parameters"] = counted
    if model is not None and value.get("adapted_from") is None:
        value["adapted_from"] = base_of(_card(model))
    if facts is not None:
        try:
            stated = load_yaml(facts.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise BadInputError("these facts cannot be read", where=str(facts)) from error
        if not isinstance(stated, dict):
            raise BadInputError("facts are a mapping of fields of mteb's ModelMeta", where=str(facts))
        unknown = sorted(str(key) for key in stated if key not in ModelMeta.model_fields)
        if unknown:
            raise BadInputError(
                f"mteb's ModelMeta has no field {', '.join(unknown)}",
                where=str(facts),
                hint=f"Fields that are asked for: {', '.join(ASKED)}.",
            )
        value |= stated
    if value.get("release_date") is not None:
        value["release_date"] = str(value["release_date"])
    try:
        # Once more, since its own maker takes values as they are.
        return ModelMeta.model_validate(dict(ModelMeta.create_empty(value)))
    except (ValidationError, ValueError) as error:
        raise BadInputError(f"mteb does not accept this description: {error}", where=str(facts or path)) from error


def base_of(card: str) -> str | None:
    """The hub model that a card names as its base; of several the first."""
    front = card[4:].partition("\n---\n")[0] if card.startswith("---\n") else ""
    try:
        head = yaml.safe_load(front) if front else None
    except yaml.YAMLError:
        return None
    named = head.get("base_model") if isinstance(head, dict) else None
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) else None


def parameters(model: Path) -> int | None:
    """How many numbers a model's safetensors files hold, by their headers; null where there are none that can be read."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in sorted(model.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                parts = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
                total += sum(math.prod(part.get_shape()) for part in parts if part.get_dtype() not in _NO_WEIGHTS)
        except (OSError, SafetensorError):
            return None
    return total or None


def as_python(meta: ModelMeta) -> str:
    """The file that a pull request to mteb adds: the description as code."""
    name = re.sub(r"\W", "_", str(meta.name).rpartition("/")[2])
    return (
        "from mteb.models.model_meta import ModelMeta, ScoringFunction\n"
        "from mteb.models.sentence_transformer_wrapper import sentence_transformers_loader\n\n"
        f"{name} = {_with_loader(meta.to_python())}\n"
    )


def _with_loader(code: str) -> str:
    # mteb prints infinity as `inf`, which is no name in Python.
    code = re.sub(r"=inf\b", '=float("inf")', code)
    return re.sub(r"loader=None", "loader=sentence_transformers_loader", code, count=1)


def _results(folder: Path) -> tuple[dict[str, TaskResult], list[str]]:
    results, local = {}, []
    for path in sorted(folder.glob("*.json")):
        if path.name == "model_meta.json":
            continue
        try:
            result = TaskResult.from_disk(path)
        except (ValueError, KeyError) as error:
            raise BadInputError(f"mteb cannot read this result ({error})", where=str(path)) from error
        check_scores(folder, path.stem)
        if str(result.task_name) != path.stem:
            raise BadInputError(
                f"this is a result of the task {result.task_name}", where=str(path), hint="Rename it, or remove it."
            )
        if str(result.dataset_revision).startswith(LOCAL):
            local.append(str(result.task_name))
        else:
            results[str(result.task_name)] = result
    return results, local


def _named(meta: ModelMeta, results: Path) -> Check:
    name, revision = str(meta.name), str(meta.revision)
    on_hub = bool(_HUB_NAME.fullmatch(name)) and not name.startswith("local/")
    scored, detail = results.resolve(), f"{name} at {revision}"
    filed = f"{scored.parent.name}/{scored.name}"
    if not on_hub or not re.fullmatch(r"[0-9a-f]{40}", revision):
        wrong = ": a hub name (organisation/model) and the commit of its weights are asked for; see --name"
    elif filed != f"{name.replace('/', '__')}/{revision}":
        wrong = f", but the results are filed as {filed}"
    else:
        wrong = ""
    return Check("name and revision", not wrong, detail + wrong)


def _complete(results: Mapping[str, TaskResult], tasks: Mapping[str, Any], benchmark: str | None) -> Check:
    if benchmark is None:
        missing = missing_places(results, tasks)
        detail = f"{', '.join(sorted(results)) or 'none'} (no benchmark was named)"
        if missing:
            detail += f"; missing: {in_words(missing)}; if a benchmark has fewer, name it with --benchmark"
        return Check("tasks", bool(results) and not missing, detail)
    try:
        # An aggregate is a result of its own, beside those of its parts.
        asked = [
            each
            for task in mteb.get_benchmark(benchmark).tasks
            for each in {id(t): t for t in (task, *parts_of(task))}.values()
        ]
    except KeyError as error:
        raise BadInputError(f"mteb: {error.args[0]}", where="benchmark") from error
    named = {str(task.metadata.name): task for task in asked}
    incomplete = missing_places(results, {name: task for name, task in named.items() if name in results})
    missing_tasks = {name: incomplete.get(name, []) for name in named if name not in results or name in incomplete}
    words = [name + (f" ({', '.join(lacking)})" if lacking else "") for name, lacking in missing_tasks.items()]
    detail = f"{benchmark}: {len(named) - len(words)} of {len(named)} tasks"
    return Check("tasks", not words, detail + (f"; missing: {', '.join(words)}" if words else ""))


def _no_failures(folder: Path) -> Check:
    failed = failed_tasks(folder)
    return Check("no failed task", not failed, ", ".join(failed) or "none")


def _known_prompts(folder: Path, tasks: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Task -> the prompts that it was scored with, from the manifest; and the tasks of which that says nothing."""
    known: dict[str, Any] = {}
    for line in read_manifest(folder):
        known |= {task: facts.get("prompts") for task, facts in line.get("tasks", {}).items()}
    parts = {
        task: [part.metadata.name for part in parts_of(of)] for task, of in official_tasks(dict.fromkeys(tasks)).items()
    }
    made = {}
    for task in tasks:
        of_parts = [known[part] for part in parts.get(task, [task]) if part in known]
        if of_parts:
            made[task] = tuple(sorted({text for of in of_parts for text in (of or {}).values() if text}))
    return made, [task for task in tasks if task not in made]


def _unchecked(folder: Path, tasks: Sequence[str]) -> list[str]:
    """Tasks that were last scored with prompts as they are, whatever the model was trained with."""
    mode: dict[str, Any] = {}
    for line in read_manifest(folder):
        mode |= dict.fromkeys(line.get("tasks", {}), line.get("prompts"))
    return [task for task in tasks if mode.get(task) == "as-is"]


def _prompts(known: Mapping[str, Sequence[str]], lacking: Sequence[str], unchecked: Sequence[str]) -> Check:
    texts = sorted({text for of in known.values() for text in of})
    detail = f"recorded: {', '.join(map(repr, texts)) or 'no prompt is used'}"
    if unchecked:
        detail += f"; not held against what was trained (--prompts as-is): {', '.join(unchecked)}"
    if lacking:
        detail = f"{MANIFEST} says nothing of {', '.join(lacking)}: score them with nearfield eval --overwrite"
    return Check("prompts", not lacking, detail)


def _noticed(said: Mapping[str, Sequence[Notice]]) -> Check:
    """The notices of the scores when they were made."""
    lines = [f"{task}: {notice.what}" for task, notices in said.items() for notice in notices]
    return Check("no notice", not lines, "; ".join(lines) or "none", required=False)


def _card(model: Path) -> str:
    card = model / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def _contamination(model: Path | None, stated: ContaminationStatement | None, tasks: Sequence[str]) -> Check:
    """Whether the card says what the training texts share with the texts of the tasks that are submitted."""

    def check(ok: bool, detail: str) -> Check:
        return Check("contamination report", ok, detail, required=False)

    if model is None:
        return check(False, "name the model's folder with --model")
    card = model / "README.md"
    if CONTAMINATION not in _card(model):
        return check(False, f"{card} has none: compare the texts with nearfield data decontaminate")
    if stated is None:
        what = "the training texts were not compared: run nearfield data decontaminate, then train again"
        return check(False, f"{card} says that {what}")
    left = [task for task in tasks if task not in stated.tasks]
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        what = f"{', '.join(left[:8])}{more}: compare with the texts of what is submitted"
        return check(False, f"{card} does not speak of {what}")
    shared = ", ".join(f"{task} ({count} texts)" for task, count in stated.matched.items()) or "no text is shared"
    return check(True, f"in {card}: {shared}")


def _copy_settings(results: Path, folder: Path, tasks: Collection[str]) -> None:
    """The lines of mteb's run settings that are of these tasks."""
    file = results / RUN_SETTINGS
    if file.is_file():
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        settings = [line for line in lines if json.loads(line).get("task") in tasks]
        write_text(folder / RUN_SETTINGS, "".join(f"{line}\n" for line in settings))


def _read_back(out: Path, meta: ModelMeta, results: Mapping[str, TaskResult]) -> Check:
    """mteb's own loader must find in the folder what was put there, and keep its scores when it checks them."""
    name = "read back by mteb"
    if not results:
        return Check(name, False, "there is nothing to read")
    known = sorted(official_tasks(results))
    loaded = ResultCache(out).load_results(
        models=[str(meta.name)], tasks=known, include_remote=False, require_model_meta=True, validate_and_filter=True
    )
    read = {str(result.task_name): result for model in loaded.model_results for result in model.task_results}
    same = [task for task in known if task in read and _main_scores(read[task]) == _main_scores(results[task])]
    detail = f"{len(same)} of {len(results)} results"
    other = sorted(set(results) - set(same))
    return Check(name, not other, detail + (f"; not as they are: {', '.join(other)}" if other else ""))


def _main_scores(result: TaskResult) -> dict[tuple[str, str], float]:
    return {(split, entry["hf_subset"]): entry["main_score"] for split, of in result.scores.items() for entry in of}


def _steps(out: Path, meta: ModelMeta, name: str) -> tuple[str, ...]:
    return (
        "push the model to the hub, if it is not there, and score the commit that was pushed",
        f"add {out / 'model_meta.py'} to mteb/models/model_implementations/ of https://github.com/embeddings-benchmark/mteb "
        "(a pull request)",
        f"add {out / 'results' / name} to results/ of https://github.com/embeddings-benchmark/results (a pull request)",
        "mention in both that the results were made with nearfield, and link the manifest",
    )
