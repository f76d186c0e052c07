"""The prompt contract: what a model was trained with is what it is evaluated with.

Prompts live in the model under the keys that mteb resolves: ``query`` and ``document`` carry what was trained, and so do
``<TaskType>-query`` and ``<TaskType>-document`` for types that ask for queries and documents, ``<TaskType>`` for types
whose texts have no role (classification, clustering, pairs, ...). Other texts without a role get the default prompt, if
there is one. Beside them the model folder holds ``prompt_contract.json``, which lists what was trained, so that an
evaluation with another prompt can be refused. A training begins with the prompts that its base model brings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

from nearfield.data.config import TaskType
from nearfield.encoders.source import CONTRACT_FILE, stated_file, stated_settings
from nearfield.errors import BadInputError, Notice
from nearfield.files import read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.config import PromptConfig, RolePrompts


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
        """The prompt that plain ``encode_query`` or ``encode_document`` puts before texts."""
        return next((self.prompts[key] for key in SIDES[role] if key in self.prompts), self.default or "")

    @property
    def types(self) -> frozenset[str]:
        """The task types that it was trained on, as far as its contract says."""
        return frozenset(str(task["task_type"]) for task in self.tasks.values())

    def text_of(self, task_type: str) -> str | None:
        """The prompt that it was trained with before texts of a type without roles, where that is one prompt."""
        texts = {str(task.get("query") or "") for task in self.tasks.values() if task["task_type"] == task_type}
        return texts.pop() if len(texts) == 1 else None


def base_prompts(model: str, revision: str | None = None) -> BasePrompts:
    """The prompts of a model by folder or hub id, without loading it; none where it states none or is out of reach.

    Where it states nothing for queries or documents there is no prompt: sentence-transformers gives a model that it loads both keys, so that
    neither ``passage`` nor a default prompt stands in for them.
    """
    settings = stated_settings(model, revision)
    stated = {str(key): str(text or "") for key, text in (settings.get("prompts") or {}).items()}
    prompts = {**dict.fromkeys(ROLES, ""), **stated} if stated else stated
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

    mteb is asked only where the key is no type of texts and images.
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


TEXT = "text"
"""Stands for the role of texts that have none."""
DEFAULT_KEY = "text"
"""The key of the default prompt where no other key has its text."""

_NO_TYPES = frozenset((DEFAULT_KEY, *(key for keys in SIDES.values() for key in keys)))

Statement = str | Sequence[str]
"""A prompt, or its phrasings."""
T = TypeVar("T")


class PromptedSource(Protocol):
    """The facts about a training source that the contract needs."""

    @property
    def name(self) -> str: ...
    @property
    def task_type(self) -> str: ...
    @property
    def prompts(self) -> Any: ...


@dataclass(frozen=True)
class PromptContract:
    """The prompt that each source was trained with, and those that the model is saved with."""

    sources: dict[str, dict[str, str]]
    """Source name -> role -> prompt, the first of its phrasings; an empty string is no prompt."""
    task_types: dict[str, str]
    """Source name -> mteb task type."""
    config: PromptConfig
    base: BasePrompts
    phrasings: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Source name -> role -> all phrasings, where there are several; the first is that of ``sources``."""
    examples: dict[str, str] = field(default_factory=dict)
    """Task type -> the query prompt with the first set of examples before it, where the model keeps that."""

    def of(self, source: str, role: str) -> tuple[str, ...]:
        """All phrasings of a source's prompt for a role, the one that the model keeps first."""
        return self.phrasings.get(source, {}).get(role, (self.sources[source][role],))

    def inputs(self) -> object:
        """The part that tokens depend on: the prompts of each source, and the phrasings where there are several."""
        return [self.sources, self.phrasings] if self.phrasings else self.sources

    @cached_property
    def by_type(self) -> dict[str, dict[str, str]]:
        """Task type of a source -> role -> the prompt that the model keeps; ``text`` of types without roles."""
        chosen: dict[str, dict[str, str]] = {}
        for task_type in sorted(set(self.task_types.values())):
            if has_roles(task_type):
                chosen[task_type] = {role: self._chosen(task_type, role) for role in ROLES}
                continue
            text = self._chosen(task_type, TEXT)
            chosen[task_type] = {TEXT: text, **{role: self._side(task_type, role, text) for role in ROLES}}
        return chosen

    def _of_type(self, task_type: str) -> list[str]:
        return [name for name, of in self.task_types.items() if of == task_type]

    def _stated(self, name: str, task_type: str, role: str) -> str | None:
        """The prompts that the recipe states for a type, or a task of one; of a type that sources have it must be trained."""
        stated = _stated(self.config.types.get(name), role)
        if stated is None or task_type not in self.task_types.values():
            return stated
        names, roles = self._of_type(task_type), (role,) if has_roles(task_type) else ROLES
        trained = sorted({text for source in names for each in roles for text in self.of(source, each)})
        if stated not in trained:
            raise BadInputError(
                f"{stated!r} is to be evaluated, and no source of type {task_type} is trained with it",
                where=f"prompts.types.{name}",
                hint=f"State one of {trained}, or train with it: 'prompts' of the sources {', '.join(names)}.",
            )
        return stated

    def _chosen(self, task_type: str, role: str) -> str:
        """The prompt of a type that sources have: the one that they agree on, or that the recipe states of several."""
        names, side = self._of_type(task_type), "query" if role == TEXT else role
        stated = self._stated(task_type, task_type, role)
        if stated is not None:
            return stated
        if side == "query" and task_type in self.examples:
            return self.examples[task_type]
        texts = dict.fromkeys(self.of(name, side)[0] for name in names)
        if len(texts) > 1:
            what = "prompts" if role == TEXT else f"{role} prompts"
            raise BadInputError(
                f"the sources {', '.join(names)} are all of type {task_type} but have different {what}: {sorted(texts)}",
                where="prompts",
                hint=f"State the one to evaluate {task_type} tasks with under prompts.types.{task_type}.{role}.",
            )
        return next(iter(texts))

    def _side(self, task_type: str, role: str, text: str) -> str:
        """The prompt of a role, where a task of a type without roles asks for one."""
        stated = self._stated(task_type, task_type, role)
        texts = {self.of(name, role)[0] for name in self._of_type(task_type)}
        if stated is not None:
            return stated
        return texts.pop() if len(texts) == 1 else text

    @cached_property
    def fallback(self) -> dict[str, str]:
        """Role -> the prompt of queries and documents of types that no source has: the model's ``query`` and ``document``."""
        return {role: self._fallback(role) for role in ROLES}

    def _fallback(self, role: str) -> str:
        stated, of_base = getattr(self.config.fallback, role), self.base.side(role)
        if stated is not None:
            return str(stated)
        asked = [prompts for task_type, prompts in self.by_type.items() if has_roles(task_type)]
        if not asked and any(map(self.base.side, ROLES)):
            return of_base  # which the base was trained with, and this training did not touch
        texts = {prompts[role] for prompts in asked} or {prompts[TEXT] for prompts in self.by_type.values()}
        if len(texts) == 1:
            return texts.pop()
        if of_base in texts or not asked:
            return of_base
        raise BadInputError(
            f"the {role} prompts of the task types differ ({sorted(texts)}), and the model's {role!r} prompt can be one alone",
            where="prompts",
            hint=f"State the one that other tasks and plain encode_{role} get under prompts.fallback.{role}.",
        )

    @cached_property
    def default_prompt(self) -> str:
        """The prompt of texts without a role in tasks of types that neither a source nor the model has a prompt for."""
        return self.base.default or "" if self.config.fallback.text is None else self.config.fallback.text

    @cached_property
    def unseen(self) -> dict[str, dict[str, str]]:
        """Task type (or task) that no source has -> role -> what the recipe, or else the base model, states for it."""
        of_types: dict[str, dict[str, str]] = {}
        named = {_split(key)[0] for key in self.base.prompts} | self.base.types
        for name in sorted((named - _NO_TYPES) | set(self.config.types)):
            task_type = type_of_key(name)
            if task_type is None and name in self.config.types:
                raise BadInputError(
                    f"mteb knows no task type and no task {name!r}, and would drop its prompt",
                    where=f"prompts.types.{name}",
                    hint="A task of one's own takes the prompt of its type, such as Retrieval or Classification.",
                )
            if task_type is None or name in self.by_type:
                continue
            of_base = {} if task_type in self.by_type else self._of_base(name, task_type)
            stated = {role: self._stated(name, task_type, role) for role in _roles_of(task_type)}
            prompts = {**of_base, **{role: text for role, text in stated.items() if text is not None}}
            if prompts:
                of_types[name] = prompts
        return of_types

    def _of_base(self, name: str, task_type: str) -> dict[str, str]:
        """Role -> what the base model's own keys say of a type or task, unless the recipe's fallback takes their place."""
        stated, prompts, trained = {}, self.base.prompts, task_type in self.base.types
        for role in _roles_of(task_type):
            text = prompts.get(name if role == TEXT else f"{name}-{role}")
            if text is None and has_roles(task_type):
                text = prompts.get(name)
            if text is None and role == TEXT and trained:
                text = self.base.text_of(name)
            replaced = getattr(self.config.fallback, role) if has_roles(task_type) else self.config.fallback.text
            if text is not None and (replaced is None or trained):
                stated[role] = text
        return stated

    @cached_property
    def model_prompts(self) -> dict[str, str]:
        """The model's ``prompts``: mteb's key -> text."""
        named = dict(self.fallback)
        for key, text in self.base.prompts.items():
            name, _ = _split(key)
            if name not in ROLES and (name in _NO_TYPES or type_of_key(name) is None):
                named[key] = text  # of no task: for those who name it
        for name, prompts in {**self.unseen, **self.by_type}.items():
            before = prompts.get(TEXT)
            if before is not None:
                named[name] = before
            named |= {f"{name}-{role}": prompts[role] for role in ROLES if prompts.get(role) not in (None, before)}
        if self.default_prompt and self.default_prompt not in named.values():
            named[DEFAULT_KEY] = self.default_prompt
        return named

    @property
    def default_prompt_name(self) -> str | None:
        """The key of the default prompt; null where there is none."""
        if not self.default_prompt:
            return None
        keys = [key for key, text in self.model_prompts.items() if text == self.default_prompt]
        return next((key for key in (DEFAULT_KEY, *ROLES) if key in keys), keys[0])

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Source -> task type and prompts, of this training and of those before it."""
        known: dict[str, dict[str, Any]] = {name: dict(task) for name, task in self.base.tasks.items()}
        for name, prompts in self.sources.items():
            known[name] = {"task_type": self.task_types[name], **prompts}
            if name in self.phrasings:
                known[name]["phrasings"] = {role: list(texts) for role, texts in self.phrasings[name].items()}
        return known

    def to_json(self) -> dict[str, Any]:
        """The content of ``prompt_contract.json``; its ``prompts`` are all of a role that an evaluation may use."""
        named = [self.config.fallback, *self.config.types.values()]
        listed = {}
        for role in ROLES:
            stated = {text for of in named if (text := getattr(of, role)) is not None}
            listed[role] = sorted(stated | {text for name in self.sources for text in self.of(name, role)})
        types = {name: {role: [text] for role, text in prompts.items()} for name, prompts in self.unseen.items()}
        fallback = {**self.fallback, TEXT: self.default_prompt}
        content = {"version": CONTRACT_VERSION, "prompts": listed, "fallback": fallback, "tasks": self.tasks}
        return {**content, "types": types} if types else content

    def save(self, model_folder: Path) -> None:
        """Write the contract beside a saved model."""
        write_json(model_folder / CONTRACT_FILE, self.to_json())

    def as_base(self) -> BasePrompts:
        """The prompts that the model that is saved with this contract brings to a training that starts from it."""
        return BasePrompts(self.model_prompts, self.default_prompt or None, self.tasks)

    def apply(self, model: SentenceTransformer) -> None:
        """Give a model the prompts that it is saved with."""
        model.prompts, model.default_prompt_name = dict(self.model_prompts), self.default_prompt_name

    def notices(self) -> list[Notice]:
        """Notices about prompts that are left open, or stand otherwise than one may think."""
        return [*_untrained_fallbacks(self), *_two_sided_texts(self), *_replaced_tasks(self)]


def _untrained_fallbacks(contract: PromptContract) -> Iterable[Notice]:
    for role in ROLES:
        trained = sorted({text for name in contract.sources for text in contract.of(name, role)})
        stated = getattr(contract.config.fallback, role)
        if stated is not None and stated not in trained:
            yield Notice(
                "fallback-prompt-not-trained",
                f"the {role} prompt for unseen tasks and plain encode_{role} ({stated!r}) is none that is trained",
                f"Set prompts.fallback.{role} to one of {trained}.",
            )


def _two_sided_texts(contract: PromptContract) -> Iterable[Notice]:
    for task_type, prompts in contract.by_type.items():
        if TEXT in prompts and prompts["document"] != prompts[TEXT]:
            yield Notice(
                "text-prompts-differ",
                f"the sources of type {task_type} are trained with {prompts['query']!r} before one side and "
                f"{prompts['document']!r} before the other; the texts of such tasks have no sides and get {prompts[TEXT]!r}",
                f"State which under prompts.types.{task_type}.text, or leave out 'document' in the sources' prompts: both "
                "sides then get the query's.",
            )


def _replaced_tasks(contract: PromptContract) -> Iterable[Notice]:
    names = {_split(key)[0] for key, text in contract.base.prompts.items() if text}
    names -= {*_NO_TYPES, *contract.by_type, *contract.unseen}
    gone = sorted(name for name in names if type_of_key(name) in contract.by_type)
    if gone:
        yield Notice(
            "base-prompts-replaced",
            f"the base model's prompts of {', '.join(gone)} are left out: tasks of their types are trained with others",
        )


def make_contract(sources: Sequence[PromptedSource], config: PromptConfig, base: BasePrompts) -> PromptContract:
    """The contract of a run.

    A source's prompt for a role is the first that is stated of: the source's own, the recipe's fallback, the base
    model's. Where texts have no role both sides of an example get one prompt, the first that is stated of: the source's
    own (for queries, or else for documents), the recipe's fallback for texts, that for queries, the base model's for such
    texts; unless the source states two. Of several phrasings the first counts; all are trained, and the contract lists
    them. Raises :class:`BadInputError` where the model could not keep what is trained: sources of one task type that
    disagree, or types that disagree on ``query`` or ``document``, where the recipe does not say which it is.
    """
    made = {source.name: _statements(source, config, base) for source in sources}
    prompts = {name: {role: _variants(of[role])[0] for role in ROLES} for name, of in made.items()}
    several = {
        name: {role: texts for role in ROLES if len(texts := _variants(of[role])) > 1} for name, of in made.items()
    }
    contract = PromptContract(
        prompts,
        {source.name: source.task_type for source in sources},
        config,
        base,
        {name: roles for name, roles in several.items() if roles},
    )
    assert contract.model_prompts is not None  # made now, so that what cannot be is said before anything is trained
    return contract


def _statements(source: PromptedSource, config: PromptConfig, base: BasePrompts) -> dict[str, Statement]:
    """Role -> what is put before the items of a source."""
    of_source: dict[str, Statement | None] = {role: getattr(source.prompts, role) for role in ROLES}
    if has_roles(source.task_type):
        stated = {"query": config.fallback.query, "document": config.fallback.document}
        return {role: _first(of_source[role], stated[role], base.of(source.task_type, role), "") for role in ROLES}
    if not getattr(source.prompts, "states_document", True):
        of_source["document"] = None
    text = _first(
        of_source["query"],
        of_source["document"],
        config.fallback.text,
        config.fallback.query,
        base.of(source.task_type, None),
        "",
    )
    return {role: _first(of_source[role], text) for role in ROLES}


def add_examples(contract: PromptContract, sets: Mapping[str, Sequence[str]], evaluated: bool) -> PromptContract:
    """The contract of queries that were trained with examples before their prompts, too: source -> texts of the sets.

    With ``evaluated`` the model keeps the first set before the prompt of the source's task type. Raises
    :class:`BadInputError` where two sources of a type would keep different ones.
    """
    sources = {name: dict(prompts) for name, prompts in contract.sources.items()}
    phrasings = {name: dict(roles) for name, roles in contract.phrasings.items()}
    examples: dict[str, str] = {}
    for name, texts in sets.items():
        plain, task_type = contract.of(name, "query"), contract.task_types[name]
        every = [*plain, *(text + phrasing for text in texts for phrasing in plain)]
        if evaluated and contract.by_type[task_type]["query" if has_roles(task_type) else TEXT] == plain[0]:
            if task_type in examples:
                raise BadInputError(
                    f"two sources of type {task_type} have examples of their own, and a model keeps one prompt a type",
                    where="prompts.in_context",
                    hint="Set evaluated: plain, or name one source a type under sources.",
                )
            first = examples[task_type] = texts[0] + plain[0]
            every.sort(key=lambda text: text != first)
            sources[name]["query"] = first
        phrasings.setdefault(name, {})["query"] = tuple(dict.fromkeys(every))
    return replace(contract, sources=sources, phrasings=phrasings, examples=examples)


def _roles_of(task_type: str) -> tuple[str, ...]:
    return ROLES if has_roles(task_type) else (TEXT, *ROLES)


def _split(key: str) -> tuple[str, str | None]:
    """A key of prompts without its role, and the role."""
    name, _, role = key.rpartition("-")
    return (name, role) if name and role in ROLES else (key, None)


def _stated(prompts: RolePrompts | None, role: str) -> str | None:
    """The prompt that a recipe states for a role; of texts without one, else what it states for queries."""
    if prompts is None:
        return None
    if role == TEXT and prompts.text is None:
        return prompts.query
    text: str | None = getattr(prompts, role)
    return text


def _variants(prompt: Statement) -> tuple[str, ...]:
    """The phrasings of a prompt; the model keeps the first."""
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def _first(*candidates: T | None) -> T:
    return next(text for text in candidates if text is not None)
