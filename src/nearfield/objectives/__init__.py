"""Embeddings -> loss. Objectives know tensors only: no model, no tokenizer, no data set.

The losses for sentence-transformers' trainer are imported when they are first used, so that settings stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nearfield.objectives.config import CombinedConfig, InfoNCEConfig, ObjectiveConfig

if TYPE_CHECKING:
    from nearfield.objectives.sentence_transformers import CachedInfoNCELoss, InfoNCELoss

__all__ = ["CachedInfoNCELoss", "CombinedConfig", "InfoNCEConfig", "InfoNCELoss", "ObjectiveConfig"]


def __getattr__(name: str) -> Any:
    if name in ("CachedInfoNCELoss", "InfoNCELoss"):
        return getattr(import_module("nearfield.objectives.sentence_transformers"), name)
    raise AttributeError(f"module 'nearfield.objectives' has no attribute {name!r}")
