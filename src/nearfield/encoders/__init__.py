"""Config -> sentence-transformers model: which weights, pooling, maximum length and prompts."""

from __future__ import annotations

from nearfield.encoders.config import BottleneckConfig, EncoderConfig, LoRAConfig, PromptConfig
from nearfield.encoders.domains import activate, load_adapters, using
from nearfield.encoders.load import LoadedEncoder, load_encoder

__all__ = [
    "BottleneckConfig",
    "EncoderConfig",
    "LoRAConfig",
    "LoadedEncoder",
    "PromptConfig",
    "activate",
    "load_adapters",
    "load_encoder",
    "using",
]
