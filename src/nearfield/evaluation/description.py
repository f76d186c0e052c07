"""A model's description as the leaderboard asks for it: each field is held against what the scored model, its folder and its card show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from mteb.models.model_meta import ModelMeta

from nearfield.data.contamination import ContaminationStatement

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
"""What a model's description must say, with an example."""
MAY_BE_NULL = ("public_training_code", "public_training_data")
_MEASURED = ("embed_dim", "max_tokens", "similarity_fn_name")
"""What mteb read off the model that was scored."""
_POSITIVE = ("n_parameters", "max_tokens", "embed_dim")
_SAYS_SOMETHING = ("languages", "framework", "license")


@dataclass(frozen=True)
class Check:
    """One thing that the leaderboard asks for. ``required`` ones must be ``ok`` before a submission is of use."""

    name: str
    ok: bool
    detail: str
    required: bool = True


@dataclass(frozen=True)
class Known:
    """What is known of a model without its author: what was scored, its folder, its card."""

    scored: ModelMeta
    parameters: int | None
    """Numbers in the weights files of the model's folder, where that was named."""
    prompts: Mapping[str, Sequence[str]]
    """Task -> prompts that it was scored with."""
    contamination: ContaminationStatement | None
    """What the card says of benchmark texts in the training data."""
    tasks: frozenset[str]
    """Tasks that are submitted."""


def describe(meta: ModelMeta, known: Known) -> list[Check]:
    """A check of each field that is asked for."""
    checks = []
    for field in ASKED:
        value = getattr(meta, field)
        if value is None:
            may = field in MAY_BE_NULL
            shown = "not public, or not stated" if may else "not stated; state it in the file of --facts"
            checks.append(Check(field, may, shown, required=not may))
            continue
        problem = _problem(field, value, meta, known)
        checks.append(
            Check(
                field,
                problem is None,
                f"{_shown(value)}: {problem}" if problem else _shown(value),
                field not in MAY_BE_NULL,
            )
        )
    return checks


def _shown(value: Any) -> str:
    return ", ".join(sorted(map(str, value))) or "none" if isinstance(value, set) else str(value)


def _problem(field: str, value: Any, meta: ModelMeta, known: Known) -> str | None:
    """What is wrong with a field's value, or None."""
    if field in _POSITIVE and any(number <= 0 for number in (value if isinstance(value, list | tuple) else [value])):
        return "it must be positive"
    if field in _SAYS_SOMETHING and not value:
        return "it says nothing"
    if field in _MEASURED and (problem := _other_than_scored(field, value, known)):
        return problem
    special: dict[str, Callable[[], str | None]] = {
        "n_parameters": lambda: _parameters(value, known),
        "use_instructions": lambda: _instructions(bool(value), known),
        "training_datasets": lambda: _training_datasets(set(value), meta, known),
        "public_training_code": lambda: _link(value),
        "public_training_data": lambda: None if value is True else _link(value),
    }
    return special[field]() if field in special else None


def _other_than_scored(field: str, value: Any, known: Known) -> str | None:
    measured = getattr(known.scored, field)
    if measured is None or value == measured or (isinstance(value, list | tuple) and measured in value):
        return None
    return f"the model that was scored has {measured}"


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
    inherited = _of_base(meta)
    if inherited:
        return f"its base {meta.adapted_from} was trained on {', '.join(inherited[:8])}"
    return None


def _of_base(meta: ModelMeta) -> list[str]:
    """Data sets that mteb knows the base model to be trained on."""
    import mteb

    if meta.adapted_from is None:
        return []
    try:
        base = mteb.get_model_meta(meta.adapted_from, fetch_from_hf=False)
    except (KeyError, ValueError):
        return []
    return sorted(base.get_training_datasets() or ())


def _link(value: Any) -> str | None:
    return (
        None
        if isinstance(value, str) and value.startswith(("https://", "http://"))
        else "it is no address (https://...)"
    )


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
