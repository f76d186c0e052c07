"""Config -> sentence-transformers model: which weights, pooling, maximum length and prompts."""

from __future__ import annotations

from nearfield.encoders.adapters import activate, load_adapters, using
from nearfield.encoders.config import EncoderConfig, LoRAConfig, PromptConfig
from nearfield.encoders.load import LoadedEncoder, load_encoder

__all__ = [
    "EncoderConfig",
    "LoRAConfig",
    "LoadedEncoder",
    "PromptConfig",
    "activate",
    "load_adapters",
    "load_encoder",
    "using",
]
