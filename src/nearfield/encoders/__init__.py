"""Config -> sentence-transformers model: which weights, pooling, maximum length and prompts."""

from __future__ import annotations

from nearfield.encoders.build import LoadedEncoder, load_encoder
from nearfield.encoders.config import EncoderConfig, LoRAConfig, PromptConfig

__all__ = ["EncoderConfig", "LoRAConfig", "LoadedEncoder", "PromptConfig", "load_encoder"]
