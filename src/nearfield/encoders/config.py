"""Settings of the encoder and of its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from nearfield.config import Config
from nearfield.data.in_context_config import InContextConfig


def resolve_model(model: str, info: ValidationInfo) -> str:
    """A folder beside the recipe becomes its absolute path; anything else is a hub id and stays as it is."""
    base = (info.context or {}).get("base")
    path = Path(model).expanduser()
    if base is not None and not path.is_absolute() and (base / path).is_dir():
        return str((base / path).resolve())
    if model.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"there is no folder {str(base / path if base else path)!r}")
    return model


class LoRAConfig(Config):
    """Train low-rank matrices beside the transformer's own, which stay as they are (LoRA, arXiv 2106.09685).

    Modules after the transformer (a dense layer, say) are trained whole.
    """

    kind: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1)] = 16
    """The rank."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """The product of the two low-rank matrices is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what enters the low-rank matrices."""
    targets: Literal["all-linear", "attention", "mlp"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """The matrices of the layers that get one, by role, or a list of module names or their endings."""
    use_dora: bool = False
    """Learn the length of each output's weights beside (DoRA, arXiv 2402.09353)."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the base in 4 or 8 bits (QLoRA, arXiv 2305.14314): CUDA and the package bitsandbytes."""
    save: Literal["merged", "adapter"] = "merged"
    """``merged`` saves a whole model with the adapter added to its weights; ``adapter`` the adapter alone, which loads where
    its base is found."""

    @model_validator(mode="after")
    def _quantized_bases_are_not_merged(self) -> LoRAConfig:
        if self.quantize != "none" and self.save == "merged":
            raise ValueError(
                f"an adapter merged into a base in {self.quantize} would be rounded to {self.quantize}; say save: adapter "
                "(it can be merged into the unrounded base afterwards)"
            )
        return self


class EncoderConfig(Config):
    """A sentence-transformers model, or a plain transformers encoder, by folder or hub id."""

    kind: Literal["sentence_transformer"] = "sentence_transformer"
    model: Annotated[str, AfterValidator(resolve_model)] = "sentence-transformers/all-MiniLM-L6-v2"
    """A folder (relative to the recipe) or a hub id."""
    revision: str | None = None
    """The commit of the hub model; null takes the newest, or the pinned one of the offline package."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """How token vectors become one; null keeps what the model says (mean for a plain transformers model)."""
    normalize: bool | None = None
    """Whether embeddings have length 1; null keeps what the model says."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Longest input in tokens, special tokens and prompt included; null keeps what the model says."""
    adapter: LoRAConfig | None = None
    """Train an adapter instead of the transformer's own weights."""
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
    in_context: InContextConfig | None = None
    """Examples of the training split before the prompts of queries."""
