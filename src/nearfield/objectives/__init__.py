"""Embeddings -> loss. Objectives know tensors only: no model, no tokenizer, no data set."""

from __future__ import annotations

from nearfield.objectives.config import InfoNCEConfig, ObjectiveConfig

__all__ = ["InfoNCEConfig", "ObjectiveConfig"]
