"""Score models on benchmark suites through mteb, keep every score of every query, and compare models by them.

Importing this package imports neither mteb nor torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfield.evaluation.comparison import ModelComparison, compare, label_results
    from nearfield.evaluation.config import FolderTasks, HeldOutTask, MtebTasks, SuiteConfig
    from nearfield.evaluation.runner import EvaluationResult, evaluate, open_model

_HOMES = {
    "ModelComparison": "comparison",
    "compare": "comparison",
    "label_results": "comparison",
    "EvaluationResult": "runner",
    "evaluate": "runner",
    "open_model": "runner",
    "FolderTasks": "config",
    "HeldOutTask": "config",
    "MtebTasks": "config",
    "SuiteConfig": "config",
}

__all__ = [
    "EvaluationResult",
    "FolderTasks",
    "HeldOutTask",
    "ModelComparison",
    "MtebTasks",
    "SuiteConfig",
    "compare",
    "evaluate",
    "label_results",
    "open_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
