"""The prompt contract: a model is scored with prompts that it was trained with, or the run stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mteb.abstasks import AbsTaskRetrieval
from mteb.types import PromptType

from nearfield.encoders.prompts import CONTRACT_FILE, CONTRACT_VERSION
from nearfield.errors import BadInputError
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.files import read_json


def roles_of(task: Any) -> tuple[PromptType | None, ...]:
    """The roles whose texts a task encodes; None stands for texts without a role (pairs, items)."""
    if isinstance(task, AbsTaskRetrieval):
        return (PromptType.query, PromptType.document)
    if hasattr(task, "input1_prompt_type"):
        return tuple(dict.fromkeys([task.input1_prompt_type, task.input2_prompt_type]))
    return (None,)


def read_contract(folder: Path) -> dict[str, list[str]] | None:
    """Role -> prompts that the model was trained with (an empty string is none), or None without a contract."""
    file = folder / CONTRACT_FILE
    if not file.is_file():
        return None
    data = read_json(file, "prompt contract")
    if not isinstance(data, dict) or data.get("version") != CONTRACT_VERSION:
        version = data.get("version") if isinstance(data, dict) else None
        raise BadInputError(
            f"this prompt contract has version {version!r}; version {CONTRACT_VERSION} is known", where=str(file)
        )
    prompts = data.get("prompts")
    if not isinstance(prompts, dict) or not all(
        isinstance(texts, list) and all(text is None or isinstance(text, str) for text in texts)
        for texts in prompts.values()
    ):
        raise BadInputError(
            "'prompts' of this prompt contract must give a list of texts for each role",
            where=str(file),
            hint="The file is written when a model is saved; save the model again, or evaluate with --prompts as-is.",
        )
    return {role: sorted({text or "" for text in texts}) for role, texts in prompts.items()}


def check_contract(encoder: TaskEncoder, folder: Path, tasks: Sequence[Any]) -> bool:
    """Raise :class:`BadInputError` if a task would be encoded with a prompt that the model's contract does not list.

    Texts without a role may take a prompt of either role. Returns whether there is a contract.
    """
    contract = read_contract(folder)
    if contract is None:
        return False
    hint = (
        "Add the prompt under a key that mteb resolves (query, document, <TaskType>-query, ...) to the model's "
        "config_sentence_transformers.json, or score the model as it is with --prompts as-is."
    )
    check_prompts(encoder, contract, tasks, where=str(folder / CONTRACT_FILE), hint=hint)
    return True


def check_prompts(
    encoder: TaskEncoder, contract: Mapping[str, Sequence[str]], tasks: Sequence[Any], *, where: str, hint: str
) -> None:
    """Raise :class:`BadInputError` if a task would be encoded with a prompt that ``contract`` (role -> prompts) lacks."""
    for task in tasks:
        for role in roles_of(task):
            prompt = encoder.prompt_for(task.metadata, role)
            listed = contract.get(role.value, []) if role else sorted({p for texts in contract.values() for p in texts})
            if prompt not in listed:
                what = role.value if role else "text without a role"
                known = ", ".join(repr(p) if p else "no prompt" for p in listed) or "nothing"
                raise BadInputError(
                    f"the task {task.metadata.name} ({task.metadata.type}) would put "
                    f"{repr(prompt) if prompt else 'no prompt'} before each {what}, but the model was trained with {known}",
                    where=where,
                    hint=hint,
                )
