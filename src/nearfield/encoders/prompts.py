"""The prompt contract: what a model was trained with is what it is evaluated with.

Prompts live in the model under the keys that mteb resolves: ``query`` and ``document`` for unseen tasks, and
``<TaskType>-query`` / ``<TaskType>-document`` for the types that training had. Beside them the model folder holds
``prompt_contract.json``, which lists what was trained, so that an evaluation with another prompt can be refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from nearfield.encoders.config import PromptConfig
from nearfield.encoders.stated import stated_settings
from nearfield.errors import BadInputError
from nearfield.files import write_json

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
    """Source name -> role -> prompt, the first of its phrasings; an empty string is no prompt."""
    task_types: dict[str, str]
    """Source name -> mteb task type."""
    fallback: dict[str, str]
    model_prompts: dict[str, str]
    """The model's ``prompts``: mteb's key -> text."""

    stated: dict[str, set[str]]
    """Role -> prompts that the recipe names for evaluation: its fallback and those of ``prompts.types``."""
    phrasings: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Source name -> role -> all phrasings, where there are several; the first is that of ``sources``."""

    def of(self, source: str, role: str) -> tuple[str, ...]:
        """All phrasings of a source's prompt for a role, the one that the model keeps first."""
        return self.phrasings.get(source, {}).get(role, (self.sources[source][role],))

    def inputs(self) -> object:
        """What tokens depend on: the prompts of each source, and the phrasings where there are several."""
        return [self.sources, self.phrasings] if self.phrasings else self.sources

    def to_json(self) -> dict[str, Any]:
        """What ``prompt_contract.json`` holds; its ``prompts`` are those that an evaluation may use."""
        listed = {role: {text for name in self.sources for text in self.of(name, role)} for role in ROLES}
        trained = {role: sorted(prompts | self.stated[role]) for role, prompts in listed.items()}
        tasks: dict[str, dict[str, Any]] = {
            name: {"task_type": self.task_types[name], **prompts} for name, prompts in self.sources.items()
        }
        for name, roles in self.phrasings.items():
            tasks[name]["phrasings"] = {role: list(texts) for role, texts in roles.items()}
        return {"version": CONTRACT_VERSION, "prompts": trained, "fallback": self.fallback, "tasks": tasks}

    def save(self, model_folder: Path) -> None:
        """Write the contract beside a saved model."""
        write_json(model_folder / CONTRACT_FILE, self.to_json())


def make_contract(
    sources: Sequence[PromptedSource], config: PromptConfig, base_prompts: dict[str, str]
) -> PromptContract:
    """The contract of a run.

    A source's prompt for a role is the first that is stated of: the source's own, the recipe's fallback, the base
    model's. Of several phrasings the first counts; all are trained, and the contract lists them. Sources of one task type must agree on their prompts, unless the recipe states the type's prompt itself.
    """
    stated = {"query": config.fallback.query, "document": config.fallback.document}
    fallback = {role: _first(stated[role], base_prompts.get(role)) for role in ROLES}
    trained = {
        source.name: {role: _first(_kept(getattr(source.prompts, role)), fallback[role]) for role in ROLES}
        for source in sources
    }
    phrasings = {
        source.name: {role: tuple(texts) for role in ROLES if _several(texts := getattr(source.prompts, role))}
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
    several = {name: roles for name, roles in phrasings.items() if roles}
    return PromptContract(trained, task_types, fallback, model_prompts, stated_texts, several)


def add_examples(contract: PromptContract, sets: Mapping[str, Sequence[str]], evaluated: bool) -> PromptContract:
    """The contract of queries that were trained with examples before their prompts, too: source -> texts of the sets.

    With ``evaluated`` the model keeps the first set before the prompt of the source's task type. Raises
    :class:`BadInputError` where two sources of a type would keep different ones.
    """
    sources = {name: dict(prompts) for name, prompts in contract.sources.items()}
    phrasings = {name: dict(roles) for name, roles in contract.phrasings.items()}
    model_prompts, kept = dict(contract.model_prompts), set()
    for name, texts in sets.items():
        plain, task_type = contract.of(name, "query"), contract.task_types[name]
        every = [*plain, *(text + phrasing for text in texts for phrasing in plain)]
        key = f"{task_type}-query"
        if evaluated and contract.model_prompts[key] == plain[0]:
            if key in kept:
                raise BadInputError(
                    f"two sources of type {task_type} have examples of their own, and a model keeps one prompt a type",
                    where="prompts.in_context",
                    hint="Set evaluated: plain, or name one source a type under sources.",
                )
            kept.add(key)
            first = texts[0] + plain[0]
            every.sort(key=lambda text: text != first)
            sources[name]["query"] = model_prompts[key] = first
        phrasings.setdefault(name, {})["query"] = tuple(dict.fromkeys(every))
    return replace(contract, sources=sources, phrasings=phrasings, model_prompts=model_prompts)


def _several(prompt: str | Sequence[str] | None) -> bool:
    return prompt is not None and not isinstance(prompt, str) and len(prompt) > 1


def _kept(prompt: str | Sequence[str] | None) -> str | None:
    """The phrasing that the model keeps: the first."""
    return prompt if prompt is None or isinstance(prompt, str) else prompt[0]


def _first(*candidates: str | None) -> str:
    return next((text for text in candidates if text is not None), "")


def base_prompts(model: str, revision: str | None = None) -> dict[str, str]:
    """The prompts that a model brings, without loading it; empty for one that is out of reach.

    Those of the roles are what sentence-transformers puts before queries and documents: a document's may be called
    ``passage`` or ``corpus``, and a role without one has the default prompt.
    """
    settings = stated_settings(model, revision)
    prompts = {str(key): str(text or "") for key, text in (settings.get("prompts") or {}).items()}
    default = prompts.get(str(settings.get("default_prompt_name")), "")
    roles = {
        "query": _first(prompts.get("query"), default),
        "document": _first(*map(prompts.get, ("document", "passage", "corpus")), default),
    }
    return {key: text for key, text in {**prompts, **roles}.items() if text}
