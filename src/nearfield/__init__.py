"""Train and benchmark embedding models: planned batches, exact resume, scores with their uncertainty.

Everything here is imported when it is first used, so that ``import nearfield`` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfield.api import build_data, dry_run, mine, plan, report, train
    from nearfield.errors import BadInputError, NearfieldError
    from nearfield.evaluation import compare, evaluate
    from nearfield.recipe import Recipe

    __version__: str

__all__ = [
    "BadInputError",
    "NearfieldError",
    "Recipe",
    "build_data",
    "compare",
    "dry_run",
    "evaluate",
    "mine",
    "plan",
    "report",
    "train",
]

_HOMES = {
    "BadInputError": "nearfield.errors",
    "NearfieldError": "nearfield.errors",
    "Recipe": "nearfield.recipe",
    "build_data": "nearfield.api",
    "mine": "nearfield.api",
    "plan": "nearfield.api",
    "train": "nearfield.api",
    "dry_run": "nearfield.api",
    "evaluate": "nearfield.evaluation",
    "compare": "nearfield.evaluation",
    "report": "nearfield.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nearfield")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nearfield' has no attribute {name!r}")
