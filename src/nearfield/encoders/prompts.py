"""The prompt contract: what a model was trained with is what it is evaluated with.

Prompts live in the model under the keys that mteb resolves: ``query`` and ``document`` for unseen tasks, and
``<TaskType>-query`` / ``<TaskType>-document`` for the types that training had. Beside them the model folder holds
``prompt_contract.json``, which lists what was trained, so that an evaluation with another prompt can be refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nearfield.encoders.config import PromptConfig
from nearfield.errors import BadInputError
from nearfield.files import read_json, write_json

CONTRACT_FILE = "prompt_contract.json"
CONTRACT_VERSION = 1
ROLES = ("query", "document")


class PromptedSource(Protocol):
    """What the contract needs to know of a training source."""

    @property
    def name(self) -> str: ...
    @property
    def task_type(self) -> str: ...
    @property
    def prompts(self) -> Any: ...


@dataclass(frozen=True)
class PromptContract:
    """Which prompt each source was trained with, and the prompts a model is saved with."""

    sources: dict[str, dict[str, str]]
    """Source name -> role -> prompt; an empty string is no prompt."""
    task_types: dict[str, str]
    """Source name -> mteb task type."""
    fallback: dict[str, str]
    model_prompts: dict[str, str]
    """The model's ``prompts``: mteb's key -> text."""

    stated: dict[str, set[str]]
    """Role -> prompts that the recipe names for evaluation: its fallback and those of ``prompts.types``."""

    def to_json(self) -> dict[str, Any]:
        """What ``prompt_contract.json`` holds; its ``prompts`` are those that an evaluation may use."""
        listed = {role: {prompts[role] for prompts in self.sources.values()} | self.stated[role] for role in ROLES}
        trained = {role: sorted(prompts) for role, prompts in listed.items()}
        tasks = {name: {"task_type": self.task_types[name], **prompts} for name, prompts in self.sources.items()}
        return {"version": CONTRACT_VERSION, "prompts": trained, "fallback": self.fallback, "tasks": tasks}

    def save(self, model_folder: Path) -> None:
        """Write the contract beside a saved model."""
        write_json(model_folder / CONTRACT_FILE, self.to_json())


def make_contract(
    sources: Sequence[PromptedSource], config: PromptConfig, base_prompts: dict[str, str]
) -> PromptContract:
    """The contract of a run.

    A source's prompt for a role is the first that is stated of: the source's own, the recipe's fallback, the base
    model's. Sources of one task type must agree on their prompts, unless the recipe states the type's prompt itself.
    """
    stated = {"query": config.fallback.query, "document": config.fallback.document}
    fallback = {role: _first(stated[role], base_prompts.get(role)) for role in ROLES}
    trained = {
        source.name: {role: _first(getattr(source.prompts, role), fallback[role]) for role in ROLES}
        for source in sources
    }
    model_prompts = dict(fallback)
    for task_type in sorted({source.task_type for source in sources} | set(config.types)):
        for role in ROLES:
            override = getattr(config.types[task_type], role) if task_type in config.types else None
            if override is not None:
                model_prompts[f"{task_type}-{role}"] = override
                continue
            texts = {trained[source.name][role] for source in sources if source.task_type == task_type}
            if len(texts) > 1:
                names = ", ".join(source.name for source in sources if source.task_type == task_type)
                raise BadInputError(
                    f"the sources {names} are all of type {task_type} but have different {role} prompts: {sorted(texts)}",
                    where="prompts",
                    hint=f"State the one to evaluate {task_type} tasks with under prompts.types.{task_type}.{role}.",
                )
            for text in texts:
                model_prompts[f"{task_type}-{role}"] = text
    named = [config.fallback, *config.types.values()]
    stated_texts = {role: {text for of in named if (text := getattr(of, role)) is not None} for role in ROLES}
    task_types = {source.name: source.task_type for source in sources}
    return PromptContract(trained, task_types, fallback, model_prompts, stated_texts)


def _first(*candidates: str | None) -> str:
    return next((text for text in candidates if text is not None), "")


def base_prompts(model_path: str) -> dict[str, str]:
    """The prompts that a model folder brings, without loading it; empty for a hub id that is not on this machine."""
    file = Path(model_path) / "config_sentence_transformers.json"
    if not file.is_file():
        return {}
    prompts = read_json(file, "model config").get("prompts") or {}
    return {str(key): str(text) for key, text in prompts.items() if text}
