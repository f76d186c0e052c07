"""What the columns of a folder's files say of its task: which of them mteb's class reads, and what the items are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskImageTextPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
    AbsTaskZeroShotClassification,
)

from nearfield.errors import BadInputError
from nearfield.evaluation.tasks import TYPES

TEXT_COLUMNS = {"text", "sentence1", "sentence2", "sentences", "id", "query-id", "corpus-id"}
_INPUTS = ("text", "sentences", "image")


@dataclass(frozen=True)
class Shape:
    """The class that scores a task, what it must be told, and the task's category (null: the class's own)."""

    base: type[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    category: str | None = None


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds a text in each row."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type holds pictures as ``datasets`` writes them."""
    return bool(pa.types.is_struct(kind)) and {"bytes", "path"} == {kind.field(i).name for i in range(kind.num_fields)}


def official_shape(base: type[Any]) -> Shape:
    """An official class with the data of a folder: its own settings, but for those that are about how its data lie."""
    attributes: dict[str, Any] = {}
    if issubclass(base, AbsTaskBitextMining):
        attributes["parallel_subsets"] = False
    return Shape(base, attributes)


def own_shape(
    base: type[Any], task_type: str, meta: Mapping[str, Any], schemas: Mapping[str, pa.Schema], folder: Path
) -> Shape:
    """A task of no official class, by its type and the columns of its files."""
    category = TYPES[task_type].category
    if issubclass(base, AbsTaskRetrieval):
        return Shape(base, category="2".join(_letters(schemas[part], folder) for part in ("queries", "corpus")))
    schema = schemas[""]
    if issubclass(base, AbsTaskImageTextPairClassification):
        images = [name for name in schema.names if holds_images(schema.field(name).type)]
        texts = [name for name in schema.names if holds_text(schema.field(name).type) and name != "cluster"]
        return Shape(base, {"images_column_names": _one(images), "texts_column_names": _one(texts)})
    attributes: dict[str, Any] = {}
    if issubclass(base, AbsTaskSTS | AbsTaskSummarization):
        attributes = _scale(base, meta, folder)
    elif hasattr(base, "input_column_name"):
        column = next((n for n in (base.input_column_name, *_INPUTS) if n in schema.names), base.input_column_name)
        attributes = {"input_column_name": column}
        pictures = column in schema.names and holds_images(schema.field(column).type)
        category = ("i" if pictures else "t") + category[1:]
        if issubclass(base, AbsTaskClustering):
            listed = column in schema.names and pa.types.is_list(schema.field(column).type)
            if listed:
                return Shape(AbsTaskClusteringLegacy, attributes, category)
            # mteb's class would draw 4 % of the items.
            attributes["max_fraction_of_documents_to_embed"] = None
        if issubclass(base, AbsTaskZeroShotClassification):
            labels = _candidates(meta, folder)
            attributes["get_candidate_labels"] = lambda self: list(labels)
    return Shape(base, attributes, category)


def _letters(schema: pa.Schema, folder: Path) -> str:
    found = "".join(letter for letter, name in (("i", "image"), ("t", "text")) if name in schema.names)
    if not found:
        raise BadInputError(
            "the queries or the corpus have neither a column 'text' nor 'image'",
            where=str(folder),
            hint=f"Columns there: {', '.join(schema.names)}.",
        )
    return found


def _one(names: Sequence[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _scale(base: type[Any], meta: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The least and the largest gold score: those stated, else the class's own."""
    scale = {name: meta.get(name, getattr(base, name, None)) for name in ("min_score", "max_score")}
    for name, value in scale.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInputError(f"{name!r} must be stated, as a number", where=str(folder / "meta.json"))
    if not scale["min_score"] < scale["max_score"]:
        raise BadInputError("'min_score' must be below 'max_score'", where=str(folder / "meta.json"))
    return scale


def _candidates(meta: Mapping[str, Any], folder: Path) -> list[str]:
    labels = meta.get("candidate_labels", meta.get("label_names"))
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise BadInputError(
            "'candidate_labels' must list the texts of the labels, in the order of their numbers",
            where=str(folder / "meta.json"),
        )
    return labels
