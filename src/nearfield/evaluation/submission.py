"""A leaderboard submission: what mteb asks of one, checked; its files, laid out and read back by mteb's own classes."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import yaml
from mteb.cache import ResultCache
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from pydantic import ValidationError

from nearfield import yaml12
from nearfield.errors import BadInputError
from nearfield.evaluation.local import LOCAL, parts_of
from nearfield.evaluation.manifest import MANIFEST, failed_tasks, read_manifest
from nearfield.files import atomic_path, read_json, write_text
from nearfield.notices import Notice, from_file

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
"""What a model's description must say, with an example. ``training_datasets`` may be an empty list, but not be left out."""
_NO_WEIGHTS = ("I64", "I32", "BOOL")
"""Types of positions and masks that are kept beside the weights."""
_MAY_BE_NULL = ("public_training_code", "public_training_data")
CONTAMINATION = "## Benchmark texts in the training data"


@dataclass(frozen=True)
class Check:
    """One thing that the leaderboard asks for. ``required`` ones must be ``ok`` before a submission is of use."""

    name: str
    ok: bool
    detail: str
    required: bool = True


@dataclass(frozen=True)
class Submission:
    """The folder that was written, what was checked, and what is left to do by hand."""

    folder: Path
    checks: tuple[Check, ...]
    steps: tuple[str, ...]
    unstated: tuple[str, ...] = ()
    """Fields of the description that are asked for and not known, each with an example: ``license: apache-2.0``."""
    notices: tuple[Notice, ...] = ()
    """What a reader of the submitted scores must know."""

    @property
    def complete(self) -> bool:
        """Whether nothing that is required is missing."""
        return all(check.ok for check in self.checks if check.required)


def submit(
    results: Path, out: Path, *, benchmark: str | None = None, facts: Path | None = None, model: Path | None = None
) -> Submission:
    """Check a results folder ``<org>__<model>/<revision>`` and lay out a submission below ``out``.

    ``benchmark`` names the tasks that must be complete; without it those that are there count. ``facts`` is a YAML file
    with fields of mteb's ModelMeta that nobody but the author knows; ``model`` the model's folder, for its card.
    Results of local data are left out: the leaderboard takes official tasks only.
    """
    if model is not None and not model.is_dir():
        raise BadInputError("there is no such folder", where=str(model), hint="Name the model's folder with --model.")
    meta = read_meta(results / "model_meta.json", facts, model)
    found, local = _results(results)
    said = {task: from_file(read_json(results / f"{task}.json", "result").get("notices")) for task in sorted(found)}
    checks = [
        _named(meta),
        *_described(meta),
        _complete(found, benchmark),
        Check("official data", bool(found), _counted(found, local)),
        _no_failures(results),
        _prompts(results, sorted(found)),
        _contamination(model),
        _noticed(said),
    ]
    name = str(meta.name).replace("/", "__").replace(" ", "_")
    with atomic_path(out) as aside:
        folder = aside / "results" / name / str(meta.revision)
        folder.mkdir(parents=True)
        for task in found:
            shutil.copyfile(results / f"{task}.json", folder / f"{task}.json")
        (folder / "model_meta.json").write_text(json.dumps(meta.to_dict(), indent=2, default=str) + "\n")
        write_text(aside / "model_meta.py", as_python(meta))
    checks.append(_read_back(out, meta, sorted(found)))
    unstated = tuple(
        f"{field}: {example}"
        for field, example in ASKED.items()
        if getattr(meta, field) is None and field not in _MAY_BE_NULL
    )
    notices = tuple(dict.fromkeys(notice for of in said.values() for notice in of))
    return Submission(out, tuple(checks), _steps(out, meta, name), unstated, notices)


def read_meta(path: Path, facts: Path | None, model: Path | None = None) -> ModelMeta:
    """mteb's description of a model from its file, with the author's facts in it, and the parameters of its folder."""
    value = read_json(path, "model description")
    if not isinstance(value, dict):
        raise BadInputError("this is no model description", where=str(path))
    value = {key: part for key, part in value.items() if key in ModelMeta.model_fields and key != "loader"}
    if model is not None and value.get("n_parameters") is None:
        value["n_parameters"] = parameters(model)
    if facts is not None:
        try:
            stated = yaml12.load(facts.read_text(encoding="utf-8"))
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
    return re.sub(r"loader=None", "loader=sentence_transformers_loader", code, count=1)


def _results(folder: Path) -> tuple[dict[str, TaskResult], list[str]]:
    found, local = {}, []
    for path in sorted(folder.glob("*.json")):
        if path.name == "model_meta.json":
            continue
        try:
            result = TaskResult.from_disk(path)
        except (ValueError, KeyError) as error:
            raise BadInputError(f"mteb cannot read this result ({error})", where=str(path)) from error
        if str(result.dataset_revision).startswith(LOCAL):
            local.append(str(result.task_name))
        else:
            found[str(result.task_name)] = result
    return found, local


def _counted(found: Mapping[str, Any], local: Sequence[str]) -> str:
    left = f"; left out, scored on local data: {', '.join(local)}" if local else ""
    return f"{len(found)} results on official data{left}"


def _named(meta: ModelMeta) -> Check:
    name, revision = str(meta.name), str(meta.revision)
    fixed = bool(re.fullmatch(r"[0-9a-f]{40}", revision))
    ok = "/" in name and not name.startswith("local/") and fixed
    detail = f"{name} at {revision}"
    if not ok:
        detail += ": a hub name (organisation/model) and the commit of its weights are asked for; see --name"
    return Check("name and revision", ok, detail)


def _described(meta: ModelMeta) -> list[Check]:
    checks = []
    for field in ASKED:
        value = getattr(meta, field)
        known = value is not None or field in _MAY_BE_NULL
        shown = str(value)
        if value is None:
            shown = "not public, or not stated" if known else "not stated; state it in the file of --facts"
        checks.append(Check(field, known, shown, required=field not in _MAY_BE_NULL))
    return checks


def _complete(found: Mapping[str, TaskResult], benchmark: str | None) -> Check:
    if benchmark is None:
        return Check("tasks", bool(found), f"{', '.join(sorted(found)) or 'none'} (no benchmark was named)")
    try:
        tasks = [part for task in mteb.get_benchmark(benchmark).tasks for part in parts_of(task)]
    except KeyError as error:
        raise BadInputError(f"mteb: {error.args[0]}", where="benchmark") from error
    missing = []
    for task in tasks:
        result = found.get(task.metadata.name)
        have = {
            (split, entry["hf_subset"])
            for split, entries in (result.scores.items() if result is not None else ())
            for entry in entries
        }
        lacking = [f"{s}/{p}" for p in task.eval_splits for s in task.hf_subsets if (p, s) not in have]
        if lacking:
            missing.append(str(task.metadata.name) + (f" ({', '.join(lacking)})" if result is not None else ""))
    detail = f"{benchmark}: {len(tasks) - len(missing)} of {len(tasks)} tasks"
    return Check("tasks", not missing, detail + (f"; missing: {', '.join(missing)}" if missing else ""))


def _no_failures(folder: Path) -> Check:
    failed = failed_tasks(folder)
    return Check("no failed task", not failed, ", ".join(failed) or "none")


def _prompts(folder: Path, tasks: Sequence[str]) -> Check:
    """The prompts that each task was scored with, from the manifest."""
    known: dict[str, Any] = {}
    for line in read_manifest(folder):
        known |= {task: facts.get("prompts") for task, facts in line.get("tasks", {}).items()}
    lacking = [task for task in tasks if task not in known]
    texts = sorted({text for task in tasks for text in (known.get(task) or {}).values() if text})
    detail = f"recorded: {', '.join(map(repr, texts)) or 'no prompt is used'}"
    if lacking:
        detail = f"{MANIFEST} says nothing of {', '.join(lacking)}: score them with nearfield eval --overwrite"
    return Check("prompts", not lacking, detail)


def _noticed(said: Mapping[str, Sequence[Notice]]) -> Check:
    """What was said of the scores when they were made."""
    lines = [f"{task}: {notice.what}" for task, notices in said.items() for notice in notices]
    return Check("no notice", not lines, "; ".join(lines) or "none", required=False)


def _contamination(model: Path | None) -> Check:
    if model is None:
        return Check("contamination report", False, "name the model's folder with --model", required=False)
    card = model / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    ok = CONTAMINATION in text
    detail = f"in {card}" if ok else f"{card} has none: state 'decontamination' in the recipe"
    return Check("contamination report", ok, detail, required=False)


def _read_back(out: Path, meta: ModelMeta, tasks: Sequence[str]) -> Check:
    """mteb's own loader must find in the folder what was put there."""
    if not tasks:
        return Check("read back by mteb", False, "there is nothing to read")
    loaded = ResultCache(out).load_results(
        models=[str(meta.name)], tasks=list(tasks), include_remote=False, require_model_meta=True
    )
    read = sorted(str(result.task_name) for model in loaded.model_results for result in model.task_results)
    ok = read == sorted(tasks)
    return Check("read back by mteb", ok, f"{len(read)} of {len(tasks)} results")


def _steps(out: Path, meta: ModelMeta, name: str) -> tuple[str, ...]:
    return (
        "push the model to the hub, if it is not there, and score the commit that was pushed",
        f"add {out / 'model_meta.py'} to mteb/models/model_implementations/ of https://github.com/embeddings-benchmark/mteb "
        "(a pull request)",
        f"add {out / 'results' / name} to results/ of https://github.com/embeddings-benchmark/results (a pull request)",
        "mention in both that the results were made with nearfield, and link the manifest",
    )
