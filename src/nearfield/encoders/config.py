"""Settings of the encoder and of its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from nearfield.config import Config


def _resolve_model(model: str, info: ValidationInfo) -> str:
    """A folder beside the recipe becomes its absolute path; anything else is a hub id and stays as it is."""
    base = (info.context or {}).get("base")
    path = Path(model).expanduser()
    if base is not None and not path.is_absolute() and (base / path).is_dir():
        return str((base / path).resolve())
    if model.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"there is no folder {str(base / path if base else path)!r}")
    return model


class EncoderConfig(Config):
    """A sentence-transformers model, or a plain transformers encoder, by folder or hub id."""

    kind: Literal["sentence_transformer"] = "sentence_transformer"
    model: Annotated[str, AfterValidator(_resolve_model)] = "sentence-transformers/all-MiniLM-L6-v2"
    """A folder (relative to the recipe) or a hub id."""
    revision: str | None = None
    """The commit of the hub model; null takes the newest, or the pinned one of the offline package."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """How token vectors become one; null keeps what the model says (mean for a plain transformers model)."""
    normalize: bool | None = None
    """Whether embeddings have length 1; null keeps what the model says."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Longest input in tokens, special tokens and prompt included; null keeps what the model says."""
    trust_remote_code: bool = False
    """Run code from the model's folder or repository. Only for models that you trust."""


class RolePrompts(Config):
    """The text put before queries and before documents; null says nothing, an empty string says 'no prompt'."""

    query: str | None = None
    document: str | None = None


class PromptConfig(Config):
    """Prompts that live in the model under the keys that mteb resolves."""

    fallback: RolePrompts = RolePrompts()
    """For tasks of a type that no training source has; null takes the base model's own prompt of the role."""
    types: dict[str, RolePrompts] = {}
    """For an mteb task type, where the sources of that type do not agree on one prompt."""
