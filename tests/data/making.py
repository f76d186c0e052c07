"""Small data recipes for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfield.data import DataConfig, Store, build_data

RETRIEVAL = {"kind": "retrieval", "query": "query", "positives": "positives", "negatives": "negatives"}
GRADED = {"kind": "graded", "first": "first", "second": "second", "score": "score"}
LABELLED = {"kind": "labelled", "item": "text", "label": "label"}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A source of retrieval examples that are all in one split."""
    return {
        "name": "pairs",
        "task_type": "Retrieval",
        "reader": {"kind": "jsonl", "path": str(path)},
        "examples": RETRIEVAL,
        "split": {"kind": "all", "name": "train"},
    } | changes


def config(*sources: Mapping[str, Any], **changes: Any) -> DataConfig:
    return DataConfig.model_validate_json(json.dumps({"name": "test", "sources": list(sources)} | changes), strict=True)


def build_rows(folder: Path, rows: Sequence[Mapping[str, object]], **changes: Any) -> Store:
    """The store of rows of one source, in ``folder/store``."""
    path = write_rows(folder / "rows.jsonl", rows)
    build_data(config(source(path, **changes)), folder / "store")
    return Store.open(folder / "store")


def examples_of(store: Store) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Query, positives and negatives as texts."""
    return [
        (store.texts([e["query"]])[0], tuple(store.texts(e["positives"])), tuple(store.texts(e["negatives"])))
        for e in store.examples.to_pylist()
    ]
