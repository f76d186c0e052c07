"""Tasks over files: a folder with ``meta.json`` and one Parquet file (or several) a subset and split, or a file of MMEB's."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from nearfield.data.config import ImagesConfig
from nearfield.data.images import ImageError, ImageRef, decode
from nearfield.errors import BadInputError, Notice, say
from nearfield.evaluation.tasks import (
    TYPES,
    RetrievalSplit,
    SuiteTask,
    columns_of,
    describe_task,
    items_table,
    make_task,
    official_class,
    retrieval_split,
)
from nearfield.files import fingerprint, hash_file, read_json

if TYPE_CHECKING:
    from nearfield.evaluation.config import MmebTask


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
    shape = _shape(base, task_type, meta, _schemas(files), folder) if official is None else _official_shape(base)
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


def _holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds a text in each row."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type holds images as ``datasets`` writes them."""
    return bool(pa.types.is_struct(kind)) and {"bytes", "path"} == {kind.field(i).name for i in range(kind.num_fields)}


def _official_shape(base: type[Any]) -> Shape:
    """An official class with the data of a folder: its own settings, but for those that are about how its data lie."""
    return Shape(base, {"parallel_subsets": False} if issubclass(base, AbsTaskBitextMining) else {})


def _shape(
    base: type[Any], task_type: str, meta: Mapping[str, Any], schemas: Mapping[str, pa.Schema], folder: Path
) -> Shape:
    """A task of no official class, by its type and the columns of its files."""
    category = TYPES[task_type].category
    if issubclass(base, AbsTaskRetrieval):
        return Shape(base, category="2".join(_letters(schemas[part], folder) for part in ("queries", "corpus")))
    schema = schemas[""]
    if issubclass(base, AbsTaskImageTextPairClassification):
        images = [name for name in schema.names if _holds_images(schema.field(name).type)]
        texts = [name for name in schema.names if _holds_text(schema.field(name).type) and name != "cluster"]
        return Shape(base, {"images_column_names": _one(images), "texts_column_names": _one(texts)})
    attributes: dict[str, Any] = {}
    if issubclass(base, AbsTaskSTS | AbsTaskSummarization):
        attributes = _scale(base, meta, folder)
    elif hasattr(base, "input_column_name"):
        column = next((n for n in (base.input_column_name, *_INPUTS) if n in schema.names), base.input_column_name)
        attributes = {"input_column_name": column}
        has_images = column in schema.names and _holds_images(schema.field(column).type)
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
        if name in texts and not _holds_text(column.type):
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
        if _holds_images(table.schema.field(name).type):
            data = data.cast_column(name, datasets.Image())
    return data


def _without_clusters(table: pa.Table, ids: Iterable[str], place: tuple[str, str], result: SuiteTask) -> pa.Table:
    """The table without the column of clusters, which become those of the task's units at the place."""
    if "cluster" not in table.column_names:
        return table
    pairs = zip(ids, table.column("cluster").to_pylist(), strict=True)
    result.clusters[place] = {unit: str(key) for unit, key in pairs if key is not None}
    return table.drop_columns(["cluster"])


def _holds_lists(file: Path, columns: Sequence[str]) -> bool:
    """Whether each of these columns holds a list in each row."""
    with _readable(file):
        schema = pq.read_schema(file)
    return all(name in schema.names and pa.types.is_list(schema.field(name).type) for name in columns)


def _columns_split(folder: Path, subset: str, split: str, result: SuiteTask) -> Any:
    file = folder / f"{subset}.{split}.parquet"
    columns = columns_of(result.task)
    texts = [name for name in columns if name in TEXT_COLUMNS and "image" not in result.task.metadata.modalities]
    # All pairs in one row, or sets of texts, are lists.
    lists = _holds_lists(file, columns)
    if isinstance(result.task, AbsTaskClusteringLegacy) or (
        isinstance(result.task, AbsTaskPairClassification) and lists
    ):
        texts = []
    table = _read(file, columns, texts)
    table = _without_clusters(table, map(str, range(table.num_rows)), (subset, split), result)
    if isinstance(result.task, AbsTaskPairClassification) and table.num_rows == 1 and not lists:
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
    unknown = {"queries": 0, "corpus": 0}
    for row, (query, document, score) in enumerate(zip(*columns, strict=True), start=1):
        for part, key in (("queries", query), ("corpus", document)):
            unknown[part] += key not in ids[part]
        if not isinstance(score, int) and score % 1:
            raise BadInputError(
                f"row {row} has the score {score!r}; a judgement is a whole number", where=str(files["qrels"])
            )
        relevant.setdefault(query, {})[document] = int(score)
    for part, what in (
        ("queries", "queries that are not there, and are left out"),
        ("corpus", "documents that are not in the corpus: the score counts them as never found"),
    ):
        if unknown[part]:
            counted = f"{unknown[part]:,} of {qrels.num_rows:,} judgements ({stem})"
            say(Notice("judgements-of-nothing", f"{counted} are of {what}"))
    queries = _without_clusters(queries, queries.column("id").to_pylist(), (subset, split), result)
    ranked = None
    if files["top_ranked"].is_file():
        table = _read(files["top_ranked"], ("query-id", "corpus-ids"), ("query-id",))
        ranked = dict(zip(table.column("query-id").to_pylist(), table.column("corpus-ids").to_pylist(), strict=True))
        for query, documents in ranked.items():
            missing = next((document for document in documents if document not in ids["corpus"]), None)
            if missing is not None:
                raise BadInputError(
                    f"the query {query!r} names {missing!r}, which is not in the corpus", where=str(files["top_ranked"])
                )
    keep = list(needed["corpus"])
    if "title" in corpus.column_names and "text" in keep:
        titles = pc.fill_null(corpus.column("title").cast(pa.large_string()), "")
        corpus = corpus.set_column(corpus.column_names.index("title"), "title", titles)
        keep.append("title")
    return retrieval_split(_dataset(queries), _dataset(corpus.select(keep)), relevant, ranked)


# Files of MMEB

Item = tuple[str, str]
"""(text, path of an image); one of them may be empty."""
_MARK = re.compile(r"<\|?image(_\d+)?\|?>|<image>")


def mmeb_task(config: MmebTask) -> SuiteTask:
    """The task of one of MMEB's evaluation files (arXiv 2410.05160). Rows are read now, images when the task runs.

    Each query has candidates of its own, of which the first is the right one; the score is hit@1 among them. Candidates go
    by the hash of their content, so that a tie is decided by that and never by the place of the right one, and a candidate
    that is named twice is one.
    """
    queries: dict[str, Item] = {}
    corpus: dict[str, Item] = {}
    relevant: dict[str, dict[str, int]] = {}
    ranked: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(config.file)):
        query, candidates = _row(row, number, config)
        ids = [fingerprint(list(item)) for item in candidates]
        corpus.update(zip(ids, candidates, strict=True))
        queries[f"q{number}"] = query
        relevant[f"q{number}"] = {ids[0]: 1}
        ranked[f"q{number}"] = sorted(set(ids))
    if not queries:
        raise BadInputError("this file has no rows", where=str(config.file))
    sides = _side(config, queries, "queries"), _side(config, corpus, "candidates")
    counts = [len(ids) for ids in ranked.values()]
    chance = sum(1 / count for count in counts) / len(counts)

    def table(items: Mapping[str, Item], letters: str) -> Any:
        texts, paths = zip(*items.values(), strict=True)
        return items_table(list(items), letters, lambda: list(texts), lambda: [_image(config, path) for path in paths])

    def load() -> dict[str, Any]:
        split = retrieval_split(table(queries, sides[0]), table(corpus, sides[1]), relevant, ranked)
        return {"default": {"test": split}}

    metadata = describe_task(
        config.name,
        "Any2AnyRetrieval",
        "Hit@1 among the candidates of each row, as MMEB scores it",
        fingerprint([hash_file(config.file), *sides]),
        languages={"default": [config.language]},
        main_score="hit_rate_at_1",
        category="2".join(sides),
    )
    task = make_task(TYPES["Any2AnyRetrieval"].base, metadata, load, {"k_values": (1, 3, 5, 10)})
    return SuiteTask(task, details={"queries": len(queries), "corpus": len(corpus), "chance": round(chance, 6)})


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if file.suffix == ".parquet":
            yield from pq.read_table(file).to_pylist()
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise BadInputError("a row is a mapping", where=f"{file}:{number}")
                yield row
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInputError(f"this file of rows cannot be read ({reason})", where=str(file)) from error


def _row(row: Mapping[str, Any], number: int, config: MmebTask) -> tuple[Item, list[Item]]:
    """A row's query and its candidates; texts without the marks of where an image stands."""
    where = f"{config.file}, row {number + 1}"
    text = " ".join(str(row.get(key) or "") for key in ("qry_inst", "qry_text"))
    query = (_words(text), str(row.get("qry_img_path") or ""))
    texts, paths = _list(row.get("tgt_text")), _list(row.get("tgt_img_path"))
    count = max(len(texts), len(paths))
    if count == 0 or {len(texts), len(paths)} - {0, count}:
        raise BadInputError("a row needs candidates: tgt_text, tgt_img_path, or both of one length", where=where)
    if not any(query):
        raise BadInputError("a row needs a query: qry_text, qry_img_path, or both", where=where)
    candidates = [
        (_words(str(texts[i] or "")) if texts else "", str(paths[i] or "") if paths else "") for i in range(count)
    ]
    if not all(any(item) for item in candidates):
        raise BadInputError("a candidate has neither text nor image", where=where)
    return query, candidates


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _words(text: str) -> str:
    return " ".join(_MARK.sub(" ", text).split())


def _side(config: MmebTask, items: Mapping[str, Item], name: str) -> str:
    """``t``, ``i`` or ``it``: what all items of a side are."""
    kinds = {("i" if path else "") + ("t" if text else "") for text, path in items.values()}
    if len(kinds) > 1:
        raise BadInputError(
            f"some {name} have a text or an image and others have not, which no task of mteb's can hold",
            where=str(config.file),
            hint="Make a file of each kind.",
        )
    return kinds.pop()


def _image(config: MmebTask, path: str) -> Any:
    rules = ImagesConfig()
    try:
        raw = ImageRef(path, path=path, folder=config.images or config.file.parent).read(rules.max_bytes)
        return decode(raw, rules).image
    except ImageError as error:
        raise BadInputError(f"the image {path!r} cannot be used: {error}", where=str(config.file)) from error
