"""The Parquet files that keep the scores of single queries, pairs and items. Nothing here imports mteb."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.errors import BadInputError
from nearfield.evaluation.config import UNITS_SUFFIX
from nearfield.files import atomic_path

EXPERIMENT = "accuracy_of_experiment_"
"""Metrics of an item: whether each of mteb's classifiers got it right."""
TOP_SUFFIX = ".top10.parquet"
METADATA_KEY = b"nearfield"
TOP = 10

UNIT_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("subset", pa.string()),
        ("split", pa.string()),
        ("unit", pa.string()),
        ("id", pa.string()),
        ("cluster", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)
TOP_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("subset", pa.string()),
        ("split", pa.string()),
        ("query_id", pa.string()),
        ("rank", pa.int32()),
        ("doc_id", pa.string()),
        ("score", pa.float64()),
    ]
)


@dataclass
class Record:
    """What was kept of one task: rows for the two files and, where no interval can be given, the reason."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in UNIT_SCHEMA.names})
    top: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in TOP_SCHEMA.names})
    reasons: dict[str, str] = field(default_factory=dict)
    """``subset/split`` -> why its units carry no interval."""


def write_record(folder: Path, task: str, record: Record, metadata: dict[str, Any]) -> None:
    """Write a task's unit file (always, it carries the metadata) and, for retrieval, the top results."""
    _write(folder, task, pa.table(record.columns, schema=UNIT_SCHEMA), {**metadata, "no_interval": record.reasons})
    top = folder / f"{task}{TOP_SUFFIX}"
    if record.top["rank"]:
        with atomic_path(top) as aside:
            pq.write_table(pa.table(record.top, schema=TOP_SCHEMA), aside, compression="zstd")
    else:
        top.unlink(missing_ok=True)


def write_metadata(folder: Path, task: str, metadata: dict[str, Any]) -> None:
    """Write a task's unit file again, with other metadata."""
    _write(folder, task, read_units(folder, task)[0], metadata)


def _write(folder: Path, task: str, table: pa.Table, metadata: dict[str, Any]) -> None:
    text = json.dumps(metadata, ensure_ascii=False)
    with atomic_path(folder / f"{task}{UNITS_SUFFIX}") as aside:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: text.encode()}), aside, compression="zstd")


def read_units(folder: Path, task: str) -> tuple[pa.Table, dict[str, Any]]:
    """A task's units and the metadata that were written with them."""
    file = folder / f"{task}{UNITS_SUFFIX}"
    try:
        table = pq.read_table(file)
        metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
    except FileNotFoundError as error:
        raise BadInputError(
            f"the scores of single units of {task} are missing",
            where=str(file),
            hint="Score the model with nearfield eval: other tools keep means only.",
        ) from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise BadInputError(
            "this file of unit scores cannot be read", where=str(file), hint="Score the task again with --overwrite."
        ) from error
    if table.schema.names != UNIT_SCHEMA.names or not isinstance(metadata, dict):
        raise BadInputError("this file has other columns than a file of unit scores", where=str(file))
    return table, metadata
