"""Embeddings -> loss. Objectives know tensors only: no model, no tokenizer, no data set.

The losses for sentence-transformers' trainer are imported when they are first used, so that settings stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nearfield.objectives.config import CombinedConfig, InfoNCEConfig, ObjectiveConfig, ObjectiveSettings

if TYPE_CHECKING:
    from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective
    from nearfield.objectives.sentence_transformers import CachedInfoNCELoss, InfoNCELoss

__all__ = [
    "CachedInfoNCELoss",
    "CombinedConfig",
    "ContrastiveBatch",
    "InfoNCEConfig",
    "InfoNCELoss",
    "LossSum",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSettings",
]

_HOMES = {
    "CachedInfoNCELoss": "sentence_transformers",
    "ContrastiveBatch": "batch",
    "InfoNCELoss": "sentence_transformers",
    "LossSum": "batch",
    "Objective": "batch",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"nearfield.objectives.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nearfield.objectives' has no attribute {name!r}")
