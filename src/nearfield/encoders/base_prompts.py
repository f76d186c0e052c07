"""What a model puts before texts before it is trained: the prompts that its folder or repository brings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from nearfield.data.config import TaskType
from nearfield.encoders.stated import stated_file, stated_settings
from nearfield.errors import BadInputError
from nearfield.files import read_json

CONTRACT_FILE = "prompt_contract.json"
CONTRACT_VERSION = 2
ROLES = ("query", "document")
SIDES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Role -> the keys that sentence-transformers looks for, in order."""
TYPES_WITH_ROLES = frozenset(
    {
        "Any2AnyMultilingualRetrieval",
        "Any2AnyReranking",
        "Any2AnyRetrieval",
        "AudioReranking",
        "DocumentUnderstanding",
        "InstructionReranking",
        "InstructionRetrieval",
        "Reranking",
        "Retrieval",
        "VideoCentricQA",
        "VisionCentricQA",
    }
)
"""The task types of mteb that ask for queries and documents; texts of all others have no role."""


def has_roles(task_type: str) -> bool:
    """Whether texts of a task type are queries and documents."""
    return task_type in TYPES_WITH_ROLES


@dataclass(frozen=True)
class BasePrompts:
    """The prompts of a model as it is before a training, and what trainings before this one put before texts."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    """Its keys as mteb reads them -> text; an empty string is a key that says 'no prompt'."""
    default: str | None = None
    """The text of its default prompt; null where it has none."""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Source -> what its prompt contract says of it."""

    def of(self, task_type: str, role: str | None) -> str | None:
        """The prompt that texts of a role get in a task of this type, by mteb and sentence-transformers; null for none."""
        keys = [task_type] if role is None else [f"{task_type}-{role}", task_type, *SIDES[role]]
        return next((self.prompts[key] for key in keys if key in self.prompts), self.default)

    def side(self, role: str) -> str:
        """What plain ``encode_query`` or ``encode_document`` puts before texts."""
        return next((self.prompts[key] for key in SIDES[role] if key in self.prompts), self.default or "")

    @property
    def types(self) -> frozenset[str]:
        """The task types that it was trained on, as far as its contract says."""
        return frozenset(str(task["task_type"]) for task in self.tasks.values())

    def text_of(self, task_type: str) -> str | None:
        """What it was trained with before texts of a type without roles, where that is one prompt."""
        texts = {str(task.get("query") or "") for task in self.tasks.values() if task["task_type"] == task_type}
        return texts.pop() if len(texts) == 1 else None


def base_prompts(model: str, revision: str | None = None) -> BasePrompts:
    """The prompts of a model by folder or hub id, without loading it; none where it states none or is out of reach."""
    settings = stated_settings(model, revision)
    prompts = {str(key): str(text or "") for key, text in (settings.get("prompts") or {}).items()}
    contract = stated_file(model, revision, CONTRACT_FILE)
    tasks = {} if contract is None else read_contract(contract.parent)["tasks"]
    return BasePrompts(prompts, prompts.get(str(settings.get("default_prompt_name"))), tasks)


def read_contract(folder: Path) -> dict[str, Any]:
    """``prompt_contract.json`` of a model folder, which must be there, with its parts looked at."""
    file = folder / CONTRACT_FILE
    data = read_json(file, "prompt contract")
    version = data.get("version") if isinstance(data, dict) else None
    if version not in (1, CONTRACT_VERSION):
        raise BadInputError(
            f"this prompt contract has version {version!r}; versions 1 and {CONTRACT_VERSION} are known",
            where=str(file),
        )
    hint = "The file is written when a model is saved; save the model again, or evaluate with --prompts as-is."
    if not isinstance(data.get("prompts"), dict) or not all(map(_are_texts, data["prompts"].values())):
        what = "'prompts' of this prompt contract must give a list of texts for each role"
        raise BadInputError(what, where=str(file), hint=hint)
    tasks, types = data.setdefault("tasks", {}), data.setdefault("types", {})
    fallback = data.setdefault("fallback", {})
    if not _are_tasks(tasks) or not _are_types(types) or not isinstance(fallback, dict):
        what = "'tasks', 'types' or 'fallback' of this prompt contract are damaged"
        raise BadInputError(what, where=str(file), hint=hint)
    return dict(data)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(text is None or isinstance(text, str) for text in value)


def _are_types(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(roles, dict) and all(map(_are_texts, roles.values())) for roles in value.values()
    )


def _are_tasks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(task, dict)
        and isinstance(task.get("task_type"), str)
        and all(isinstance(task.get(role) or "", str) for role in ROLES)
        and isinstance(task.get("phrasings", {}), dict)
        and all(map(_are_texts, task.get("phrasings", {}).values()))
        for task in value.values()
    )


def type_of_key(key: str) -> str | None:
    """The task type that a key of prompts (without its role) is of: a type of mteb, or a task's; null for any other.

    mteb is asked only where the key is no type of texts and pictures.
    """
    return key if key in get_args(TaskType) else _type_in_mteb(key)


@functools.cache
def _type_in_mteb(name: str) -> str | None:
    import logging
    import warnings

    import mteb
    from mteb.abstasks.task_metadata import TaskType as MtebType

    if name in get_args(MtebType):
        return name
    level = logging.getLogger("mteb").level
    logging.getLogger("mteb").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(mteb.get_task(name).metadata.type)
    except KeyError:
        return None
    finally:
        logging.getLogger("mteb").setLevel(level)
