"""A leaderboard submission: what mteb asks of one, checked; its files, laid out and read back by mteb's own classes.

Each field of the model's description is held against what the scored model, its folder and its card show; results are
held against mteb's description of their tasks and the rules of its results repository.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import mteb
import yaml
from mteb.cache import ResultCache
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from nearfield.config import load_yaml
from nearfield.data.decontaminate import SECTION, ContaminationStatement, read_statement
from nearfield.errors import BadInputError, Notice, from_file
from nearfield.evaluation.results import MANIFEST, check_scores, failed_tasks, read_manifest
from nearfield.evaluation.tasks import LOCAL, parts_of
from nearfield.files import atomic_path, read_json, write_text

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


_NO_WEIGHTS = ("I64", "I32", "BOOL")
"""Types of positions and masks that are kept beside the weights."""
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
    local_base = None if model is None else local_base_of(_card(model))
    prompts, lacking = _known_prompts(results, sorted(by_task))
    known = Known(scored, counted, prompts, stated, frozenset(by_task), local_base)
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
        except (OSError, yaml.YAMLError, ValueError) as error:  # as of the 31st of June
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
    if value.get("embed_dim") == []:
        value["embed_dim"] = None
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


def local_base_of(card: str) -> str | None:
    """The model of a folder that a card says was trained further; None where it says none."""
    said = re.search(r"(?:Fine-tuned from|trained with nearfield on) `(local/[^`]+)`", card)
    return None if said is None else said[1]


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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    if SECTION not in _card(model):
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
    local_base: str | None = None
    """The model of a folder that it was trained from, by the card: nobody else knows it."""


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
        "release_date": lambda: "it is in the future" if str(value) > date.today().isoformat() else None,
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
    unknown = {name: _meant(name) for name in sorted(stated) if official_task(name) is None}
    misspelt = [f"{name} is {meant}" for name, meant in unknown.items() if meant is not None]
    if misspelt:
        return f"data sets go by the names of mteb's tasks: {', '.join(misspelt)}"
    if set(stated) - set(unknown):
        return None
    says = f"mteb has no task {', '.join(unknown)}: so the list" if unknown else "an empty list"
    says += " says that the model saw no data of mteb"
    if compared is None:
        return (
            f"{says}, and nothing shows it: name the data sets, or compare the texts (nearfield data decontaminate) and name the "
            "model's folder with --model"
        )
    left = sorted(known.tasks - compared.tasks)
    if left:
        return f"{says}, and {', '.join(left[:8])} was not compared with its texts"
    return _of_base(meta.adapted_from or known.local_base, says)


def _meant(name: str) -> str | None:
    """mteb's task whose name differs from this one in capitals and signs alone."""
    from mteb.get_tasks import _TASKS_REGISTRY

    def bare(text: str) -> str:
        return re.sub(r"\W|_", "", text).casefold()

    return next((each for each in sorted(_TASKS_REGISTRY) if bare(each) == bare(name)), None)


def _of_base(base: str | None, says: str) -> str | None:
    """The reason why a model that was trained from a base may have seen more than its own training shows."""
    if base is None:
        return None
    try:
        seen = mteb.get_model_meta(base, fetch_from_hf=False).get_training_datasets()
    except (KeyError, ValueError):
        seen = None
    if seen is None:
        return f"{says}, and nothing shows what its base {base} was trained on: name those data sets, too"
    return f"its base {base} was trained on {', '.join(sorted(seen)[:8])}" if seen else None


def _link(value: Any) -> str | None:
    fine = isinstance(value, str) and re.match(r"https?://[^/\s]+\.[^/\s.]+(/|$)", value)
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
    """Scores without run settings, or with those of an mteb that is too old."""
    return [f"{subset}/{split}" for split, subset, _ in _entries(result) if (name, split, subset) not in settled]


def _settled(file: Path) -> set[tuple[str, str, str]]:
    """(task, split, subset) of each score that mteb's file has the run settings of, by an mteb that its results repository takes:
    it asks for them."""
    from mteb.results.task_result import _expand_run_settings_entry

    settled: set[tuple[str, str, str]] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            if line.strip():
                places = list(_expand_run_settings_entry(json.loads(line)))
                # The last line of a score counts, as mteb reads them.
                settled -= {place for place, _, _ in places}
                settled |= {place for place, _, of in places if not _older((of.get("version") or {}).get("mteb"))}
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
