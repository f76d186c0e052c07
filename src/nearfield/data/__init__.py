"""Items and examples: readers, cleaning, deduplication, splits, and the store on disk.

The names below are imported when they are first used, so that reading a config does not import pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfield.data.build import build_data, ensure_store, prepare_store
    from nearfield.data.config import DataConfig
    from nearfield.data.readers import ReaderBase, Row
    from nearfield.data.store import DataSummary, SourceInfo, Store

__all__ = [
    "DataConfig",
    "DataSummary",
    "ReaderBase",
    "Row",
    "SourceInfo",
    "Store",
    "build_data",
    "ensure_store",
    "prepare_store",
]

_HOMES = {
    "DataConfig": "config",
    "DataSummary": "store",
    "ReaderBase": "readers",
    "Row": "readers",
    "SourceInfo": "store",
    "Store": "store",
    "build_data": "build",
    "ensure_store": "build",
    "prepare_store": "build",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"nearfield.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nearfield.data' has no attribute {name!r}")
