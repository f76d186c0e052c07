"""Local tasks: a folder with ``meta.json`` and one Parquet file (or several) a subset and split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskImageTextPairClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
    AbsTaskZeroShotClassification,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.types import PromptType

from nearfield.errors import BadInputError, Notice, say
from nearfield.evaluation.tasks import (
    TYPES,
    RetrievalSplit,
    SuiteTask,
    columns_of,
    describe_task,
    make_task,
    official_class,
)
from nearfield.files import fingerprint, hash_file, read_json

META = "meta.json"
TEXT_COLUMNS = {"text", "sentence1", "sentence2", "sentences", "id", "query-id", "corpus-id"}
_INPUTS = ("text", "sentences", "image")
_PARTS = {"corpus": ("id",), "queries": ("id",), "qrels": ("query-id", "corpus-id", "score")}


def task_folders(folder: Path, only: Sequence[str] | None = None) -> list[Path]:
    """The task folders at or below a folder, by name; ``only`` keeps the tasks named there."""
    if (folder / META).is_file():
        folders = [folder]
    elif folder.is_dir():
        folders = sorted(child for child in folder.iterdir() if (child / META).is_file())
    else:
        raise BadInputError("this folder does not exist", where=str(folder))
    if not folders:
        raise BadInputError(
            "this folder holds no task", where=str(folder), hint=f"A task is a folder with {META} and Parquet files."
        )
    if only is None:
        return folders
    names = {str(_meta(child)["task"]): child for child in folders}
    for name in only:
        if name not in names:
            raise BadInputError(
                f"there is no task {name!r} here", where=str(folder), hint=f"Tasks here: {', '.join(sorted(names))}."
            )
    return [names[name] for name in only]


def folder_task(folder: Path) -> SuiteTask:
    """The task of a folder. Its files are hashed now and read when the task runs."""
    meta = _meta(folder)
    name, task_type, split, subsets = str(meta["task"]), str(meta["type"]), str(meta["split"]), list(meta["subsets"])
    official = _official(folder, meta)
    base = TYPES[task_type].base if official is None else official
    retrieval = issubclass(base, AbsTaskRetrieval)
    files = _files(folder, meta, retrieval)
    shape = official_shape(base) if official is not None else own_shape(base, task_type, meta, _schemas(files), folder)
    result = SuiteTask(None, details={"folder": folder.name})

    def load() -> dict[str, Any]:
        if retrieval:
            return {s: {split: _retrieval_split(folder, s, split, result)} for s in subsets}
        splits = [split, *meta.get("extra_splits", [])]
        data = {s: {p: _columns_split(folder, s, p, result) for p in splits} for s in subsets}
        return data["default"] if subsets == ["default"] else data

    like = official_class(str(meta.get("mteb_class", name)))
    same_name = like is not None and like.metadata.name == name
    metadata = describe_task(
        name,
        task_type,
        str(meta.get("note") or f"Local copy of {name}"),
        fingerprint([[file.name, hash_file(file)] for file in files]),
        languages=_languages(folder, meta, like.metadata.eval_langs if like is not None and same_name else None),
        splits=[split],
        main_score=None if like is None else like.metadata.main_score,
        category=shape.category or (None if like is None else like.metadata.category),
    )
    if like is not None:
        result.details["scored_as"] = like.metadata.name
        if metadata.category == like.metadata.category:
            metadata = metadata.model_copy(update={"modalities": like.metadata.modalities})
    result.task = make_task(shape.base, metadata, load, shape.attributes)
    return result


def _official(folder: Path, meta: dict[str, Any]) -> type[Any] | None:
    """The official class that scores a folder's task; None where it is the one of its type."""
    task_type = str(meta["type"])
    base = official_class(str(meta.get("mteb_class", meta["task"])))
    if base is None and task_type not in TYPES:
        raise BadInputError(
            f"the task type {task_type!r} is not known", where=str(folder / META), hint=f"Types: {', '.join(TYPES)}."
        )
    if base is not None and base.metadata.type != task_type:
        raise BadInputError(
            f"the type is {task_type!r}, but mteb's {base.metadata.name} is of type {base.metadata.type!r}",
            where=str(folder / META),
        )
    # The data of a folder are of one task, not of the parts whose mean an aggregate is.
    if base is None and "mteb_class" in meta:
        what = f"mteb has no task {meta['mteb_class']!r}: the class of the type scores this one"
        say(Notice("unknown-class", what), str(meta["task"]))
    return None if base is not None and issubclass(base, AbsTaskAggregate) else base


def _schemas(files: Sequence[Path]) -> dict[str, pa.Schema]:
    """The columns of the first file of each part: ``corpus``, ``queries``, ...; ``""`` of a task with one file a split."""
    schemas: dict[str, pa.Schema] = {}
    for file in files:
        part = file.name.removesuffix(".parquet").rpartition(".")[2]
        with _readable(file):
            schemas.setdefault(part if part in (*_PARTS, "top_ranked") else "", pq.read_schema(file))
    return schemas


def _meta(folder: Path) -> dict[str, Any]:
    file = folder / META
    meta = read_json(file, "task description")
    if not isinstance(meta, dict):
        raise BadInputError("a task description is a mapping", where=str(file))
    for key, kind in (("task", str), ("type", str), ("split", str), ("subsets", list)):
        if not isinstance(meta.get(key), kind) or not meta[key]:
            raise BadInputError(
                f"the key {key!r} is missing or not a {kind.__name__}",
                where=str(file),
                hint="A task description has task, type, split and subsets.",
            )
    texts = [meta["task"], meta["split"], *meta["subsets"], *meta.get("extra_splits", [])]
    for text in texts:
        if not isinstance(text, str) or not text or "/" in text or text.startswith("."):
            raise BadInputError(f"{text!r} cannot be part of a file name", where=str(file))
    return meta


def _languages(folder: Path, meta: dict[str, Any], official: Any) -> dict[str, list[str]]:
    stated = meta.get("languages")
    if stated is not None and not isinstance(stated, dict):
        raise BadInputError("'languages' must map subsets to lists like [eng-Latn]", where=str(folder / META))
    known = official if isinstance(official, dict) else dict.fromkeys(meta["subsets"], official)
    known = {**known, **(stated or {})}
    return {subset: [str(language) for language in known.get(subset) or ["eng-Latn"]] for subset in meta["subsets"]}


def _files(folder: Path, meta: dict[str, Any], retrieval: bool) -> list[Path]:
    splits = [meta["split"], *([] if retrieval else meta.get("extra_splits", []))]
    stems = [f"{subset}.{split}" for subset in meta["subsets"] for split in splits]
    files = []
    for stem in stems:
        needed = [folder / f"{stem}.{part}.parquet" for part in _PARTS] if retrieval else [folder / f"{stem}.parquet"]
        for file in needed:
            if not file.is_file():
                raise BadInputError(
                    f"the file {file.name} is missing", where=str(folder), hint=f"{META} names this subset and split."
                )
        files += needed
        ranked = folder / f"{stem}.top_ranked.parquet"
        if retrieval and ranked.is_file():
            files.append(ranked)
    return files


# The task that the columns describe


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
    """Whether a column of this type holds images as ``datasets`` writes them."""
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
        has_images = column in schema.names and holds_images(schema.field(column).type)
        category = ("i" if has_images else "t") + category[1:]
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
    letters = "".join(letter for letter, name in (("i", "image"), ("t", "text")) if name in schema.names)
    if not letters:
        raise BadInputError(
            "the queries or the corpus have neither a column 'text' nor 'image'",
            where=str(folder),
            hint=f"Columns there: {', '.join(schema.names)}.",
        )
    return letters


def _one(names: Sequence[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _scale(base: type[Any], meta: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The least and the largest gold score: those stated, else the class's own."""
    scale = {name: meta.get(name, getattr(base, name, None)) for name in ("min_score", "max_score")}
    for name, value in scale.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInputError(f"{name!r} must be stated, as a number", where=str(folder / META))
    if not scale["min_score"] < scale["max_score"]:
        raise BadInputError("'min_score' must be below 'max_score'", where=str(folder / META))
    return scale


def _candidates(meta: Mapping[str, Any], folder: Path) -> list[str]:
    labels = meta.get("candidate_labels", meta.get("label_names"))
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise BadInputError(
            "'candidate_labels' must list the texts of the labels, in the order of their numbers",
            where=str(folder / META),
        )
    return labels


# Reading


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(
            f"this is no readable Parquet file ({str(error).splitlines()[0]})", where=str(file)
        ) from error


def _read(file: Path, columns: Sequence[str], texts: Sequence[str]) -> pa.Table:
    """A table with these columns, no cell of which is empty; ``texts`` are those that hold text."""
    with _readable(file):
        table = pq.read_table(file).replace_schema_metadata(None)
    for name in columns:
        if name not in table.column_names:
            raise BadInputError(
                f"the column {name!r} is missing",
                where=str(file),
                hint=f"Columns here: {', '.join(table.column_names)}.",
            )
        column = table.column(name)
        if name in texts and not holds_text(column.type):
            raise BadInputError(f"the column {name!r} must hold text; it holds {column.type}", where=str(file))
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise BadInputError(f"the column {name!r} is empty in row {row + 1}", where=str(file))
        if pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column)).as_py():
            raise BadInputError(f"the column {name!r} holds a value that is no finite number", where=str(file))
    if table.num_rows == 0:
        raise BadInputError("this file has no rows", where=str(file))
    return table


def _dataset(table: pa.Table) -> Any:
    import datasets
    from datasets.table import InMemoryTable

    data = datasets.Dataset(InMemoryTable(table))
    for name in table.column_names:
        if holds_images(table.schema.field(name).type):
            data = data.cast_column(name, datasets.Image())
    return data


def _columns_split(folder: Path, subset: str, split: str, result: SuiteTask) -> Any:
    file = folder / f"{subset}.{split}.parquet"
    columns = columns_of(result.task)
    texts = [name for name in columns if name in TEXT_COLUMNS and "image" not in result.task.metadata.modalities]
    if isinstance(result.task, AbsTaskClusteringLegacy):
        texts = []
    table = _read(file, columns, texts)
    if "cluster" in table.column_names:
        keys = table.column("cluster").to_pylist()
        result.clusters[subset, split] = {str(i): str(key) for i, key in enumerate(keys) if key is not None}
        table = table.drop_columns(["cluster"])
    if isinstance(result.task, AbsTaskPairClassification) and table.num_rows == 1:
        # One row is to mteb all pairs in lists.
        table = pa.table({name: [table.column(name).to_pylist()] for name in columns})
    data = _dataset(table)
    names = read_json(folder / META, "task description").get("label_names")
    label = getattr(result.task, "label_column_name", "label")
    if isinstance(names, list) and label in data.features and pa.types.is_integer(table.schema.field(label).type):
        import datasets

        data = data.cast_column(label, datasets.ClassLabel(names=[str(name) for name in names]))
    return data


def _texts(part: str, file: Path) -> list[str]:
    """The columns of a retrieval task's part that hold text; a query may also be a conversation, a list of turns."""
    with _readable(file):
        schema = pq.read_schema(file)
    turns = part == "queries" and "text" in schema.names and pa.types.is_list(schema.field("text").type)
    return [name for name in TEXT_COLUMNS if not (turns and name == "text")]


def _retrieval_split(folder: Path, subset: str, split: str, result: SuiteTask) -> RetrievalSplit:
    stem = f"{subset}.{split}"
    files = {part: folder / f"{stem}.{part}.parquet" for part in (*_PARTS, "top_ranked")}
    metadata = result.task.metadata
    needed = {
        "corpus": ("id", *metadata.get_modalities(PromptType.document)),
        "queries": ("id", *metadata.get_modalities(PromptType.query)),
        "qrels": _PARTS["qrels"],
    }
    corpus, queries, qrels = (
        _read(files[part], columns, _texts(part, files[part])) for part, columns in needed.items()
    )
    ids = {"corpus": set(corpus.column("id").to_pylist()), "queries": set(queries.column("id").to_pylist())}
    for part, table in (("corpus", corpus), ("queries", queries)):
        if len(ids[part]) != table.num_rows:
            raise BadInputError("the column 'id' holds an id twice", where=str(files[part]))
    relevant: dict[str, dict[str, int]] = {}
    columns = (qrels.column(name).to_pylist() for name in _PARTS["qrels"])
    for row, (query, document, score) in enumerate(zip(*columns, strict=True), start=1):
        for part, key in (("queries", query), ("corpus", document)):
            if key not in ids[part]:
                raise BadInputError(f"row {row} names {key!r}, which is not in the {part}", where=str(files["qrels"]))
        if not isinstance(score, int) and score % 1:
            raise BadInputError(
                f"row {row} has the score {score!r}; a judgement is a whole number", where=str(files["qrels"])
            )
        relevant.setdefault(query, {})[document] = int(score)
    if "cluster" in queries.column_names:
        pairs = zip(queries.column("id").to_pylist(), queries.column("cluster").to_pylist(), strict=True)
        result.clusters[subset, split] = {query: str(key) for query, key in pairs if key is not None}
        queries = queries.drop_columns(["cluster"])
    ranked = None
    if files["top_ranked"].is_file():
        table = _read(files["top_ranked"], ("query-id", "corpus-ids"), ("query-id",))
        ranked = dict(zip(table.column("query-id").to_pylist(), table.column("corpus-ids").to_pylist(), strict=True))
        for query, documents in ranked.items():
            unknown = next((document for document in documents if document not in ids["corpus"]), None)
            if unknown is not None:
                raise BadInputError(
                    f"the query {query!r} names {unknown!r}, which is not in the corpus", where=str(files["top_ranked"])
                )
    keep = list(needed["corpus"])
    if "title" in corpus.column_names and "text" in keep:
        titles = pc.fill_null(corpus.column("title").cast(pa.large_string()), "")
        corpus = corpus.set_column(corpus.column_names.index("title"), "title", titles)
        keep.append("title")
    return {
        "corpus": _dataset(corpus.select(keep)),
        "queries": _dataset(queries),
        "relevant_docs": relevant,
        "top_ranked": ranked,
    }
