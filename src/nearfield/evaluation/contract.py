"""The prompt contract: a model is scored with prompts that it was trained with, or the run stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mteb.abstasks import AbsTaskRetrieval
from mteb.models.abs_encoder import AbsEncoder, get_prompt
from mteb.types import PromptType

from nearfield.encoders.prompts import ROLES, SIDES, TEXT, has_roles, read_contract
from nearfield.encoders.source import CONTRACT_FILE
from nearfield.errors import BadInputError, Notice


def roles_of(task: Any) -> tuple[PromptType | None, ...]:
    """The roles whose texts a task encodes; None stands for texts without a role (pairs, items)."""
    if isinstance(task, AbsTaskRetrieval):
        return (PromptType.query, PromptType.document)
    if hasattr(task, "input1_prompt_type"):
        return tuple(dict.fromkeys([task.input1_prompt_type, task.input2_prompt_type]))
    return (None,)


class Prompting(Protocol):
    """Says what is put before texts: a model's wrapper, or prompts that a model will be saved with."""

    def prompt_for(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The string before each text of a role in a task."""
        ...


@dataclass(frozen=True)
class SavedPrompts:
    """A model's prompts without the model."""

    prompts: Mapping[str, str]
    default_prompt_name: str | None = None
    resolved: Mapping[str, str] | None = None
    """Those that mteb takes; null looks which of them it does."""

    def prompt_for(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The string that is put before a text of this role in this task; empty for none.

        The order is mteb's (task name and role, task name, task type and role, task type, role), then
        sentence-transformers' (the role's own prompt; for texts without a role the default prompt).
        """
        resolved = self.resolved
        if resolved is None:
            resolved = AbsEncoder.validate_task_to_prompt_name(dict(self.prompts), raise_for_invalid_keys=False)[0]
        prompt = get_prompt(None if resolved is None else dict(resolved), task_metadata, prompt_type)
        if prompt is None:
            keys = () if prompt_type is None else SIDES[prompt_type.value]
            name = next((key for key in keys if key in self.prompts), self.default_prompt_name)
            prompt = None if name is None else self.prompts.get(name)
        return prompt or ""


@dataclass(frozen=True)
class TrainedPrompts:
    """The prompts that the texts of a task may get, by those that a model was trained with."""

    listed: Mapping[str, Sequence[str]]
    """Role -> prompts of any source; an empty string is no prompt."""
    trained: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Task type of a source -> role (``text`` for none) -> prompts."""
    stated: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Task type that no source has, or task -> role -> prompts that it is saved with."""
    fallback: Mapping[str, str] = field(default_factory=dict)
    """Role -> prompt of all other types."""

    @classmethod
    def read(cls, folder: Path) -> TrainedPrompts | None:
        """Of a model's folder; null where it has no contract."""
        return cls.of(read_contract(folder)) if (folder / CONTRACT_FILE).is_file() else None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> TrainedPrompts:
        """Of a contract as its file holds it."""
        listed = {role: sorted({text or "" for text in texts}) for role, texts in data["prompts"].items()}
        if data["version"] == 1:
            # Where a source said nothing for documents, half of the texts of a type without roles had no prompt: that
            # is no reason to leave out the one that they had. And what such a model gave other types was not stated.
            trained = {name: {**of, **listed} for name, of in _by_type(data["tasks"], ("query",)).items()}
            return cls(listed, trained, fallback={TEXT: ""})
        fallback = {role: text or "" for role, text in data.get("fallback", {}).items()}
        return cls(listed, _by_type(data["tasks"], ROLES), data.get("types", {}), fallback)

    def knows(self, task_type: str) -> bool:
        """Whether a source was of this type."""
        return task_type in self.trained

    def allowed(self, task_metadata: Any, role: PromptType | None) -> list[str]:
        """The prompts that texts of a role may get in a task."""
        task_type, name = str(task_metadata.type), TEXT if role is None else role.value
        trained, stated = self.trained.get(task_type), set(self.stated.get(str(task_metadata.name), {}).get(name, ()))
        if trained is not None:
            return sorted(stated | set(trained.get(name, ())) | set(trained.get(TEXT, ())))
        stated |= {text for each in (name, TEXT) for text in self.stated.get(task_type, {}).get(each, ())}
        roles = ROLES if role is None else (name,)
        if name in self.fallback:
            stated.add(self.fallback[name])
        return sorted(stated | {text for each in roles for text in self.listed.get(each, ())})


def _by_type(tasks: Mapping[str, Mapping[str, Any]], sides: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Task type -> role -> what its sources were trained with; texts without a role may get what those ``sides`` had."""
    by_type: dict[str, dict[str, set[str]]] = {}
    for task in tasks.values():
        of, several = by_type.setdefault(task["task_type"], {}), task.get("phrasings", {})
        for role in ROLES:
            texts = {text or "" for text in several.get(role, [task.get(role)])}
            of.setdefault(role, set()).update(texts)
            if role in sides and not has_roles(task["task_type"]):
                of.setdefault(TEXT, set()).update(texts)
    return {task_type: {role: sorted(texts) for role, texts in of.items()} for task_type, of in by_type.items()}


def check_contract(encoder: Prompting, folder: Path, tasks: Sequence[Any]) -> TrainedPrompts | None:
    """The contract of a model's folder, if there is one.

    Raises :class:`BadInputError` if a task would be encoded with a prompt that it does not allow.
    """
    contract = TrainedPrompts.read(folder)
    hint = (
        "Add the prompt to the model's config_sentence_transformers.json under a key that mteb resolves ({key}), or score "
        "the model as it is with --prompts as-is."
    )
    if contract is not None:
        check_prompts(encoder, contract, tasks, where=str(folder / CONTRACT_FILE), hint=hint)
    return contract


def prompt_notices(
    encoder: Prompting, folder: Path, tasks: Sequence[Any], *, check: bool
) -> dict[str, tuple[Notice, ...]]:
    """Task -> what its score's readers must know of the prompts of a model's folder; under ``""`` what holds for all.

    ``check`` raises as :func:`check_contract` does; without it what would be refused is said.
    """
    contract = check_contract(encoder, folder, tasks) if check else TrainedPrompts.read(folder)
    notices = untrained_types(encoder, contract, tasks)
    if contract is not None and not check:
        notices[""] = (as_is_notice(encoder, contract, tasks),)
    return notices


def check_prompts(encoder: Prompting, contract: TrainedPrompts, tasks: Sequence[Any], *, where: str, hint: str) -> None:
    """Raise :class:`BadInputError` if a task would be encoded with a prompt that the contract does not allow.

    ``{key}`` in the hint becomes the key of the prompt.
    """
    for task in tasks:
        for role in roles_of(task):
            prompt = encoder.prompt_for(task.metadata, role)
            allowed = contract.allowed(task.metadata, role)
            if prompt not in allowed:
                what = role.value if role else "text without a role"
                known = ", ".join(map(_said, allowed)) or "nothing"
                key = f"{task.metadata.type}-{role.value}" if role else str(task.metadata.type)
                raise BadInputError(
                    f"the task {task.metadata.name} ({task.metadata.type}) would put {_said(prompt)} before each {what}, "
                    f"but the model was trained with {known}",
                    where=where,
                    hint=hint.format(key=key),
                )


def untrained_types(
    encoder: Prompting, contract: TrainedPrompts | None, tasks: Sequence[Any]
) -> dict[str, tuple[Notice, ...]]:
    """Task -> a notice that no source of the training was of its type, and what its texts get; empty without a contract."""
    notices: dict[str, tuple[Notice, ...]] = {}
    for task in tasks:
        name, task_type = str(task.metadata.name), str(task.metadata.type)
        if contract is None or contract.knows(task_type):
            continue
        puts = [
            f"{_said(encoder.prompt_for(task.metadata, role))} before {f'each {role.value}' if role else 'its texts'}"
            for role in roles_of(task)
        ]
        notices[name] = (
            Notice(
                "type-not-trained",
                f"type not trained: no source of the training was of type {task_type}; {name} puts {' and '.join(puts)}",
                f"Train with a source of the type, or state what such tasks get under prompts.types.{task_type} or "
                "prompts.fallback of the recipe.",
            ),
        )
    return notices


def as_is_notice(encoder: Prompting, contract: TrainedPrompts, tasks: Sequence[Any]) -> Notice:
    """The contract was not checked, and which tasks it would have refused."""
    broken = {
        f"{task.metadata.name} ({_said(prompt)})": None
        for task in tasks
        for role in roles_of(task)
        if (prompt := encoder.prompt_for(task.metadata, role)) not in contract.allowed(task.metadata, role)
    }
    what = "prompts as they are: the prompt contract was not checked"
    if broken:
        what += f"; it does not allow those of {', '.join(broken)}"
    return Notice("prompts-as-is", what, "Without --prompts as-is the model is scored with what it was trained with.")


def _said(prompt: str) -> str:
    return repr(prompt) if prompt else "no prompt"
