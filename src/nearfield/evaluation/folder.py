"""Local tasks: a folder with ``meta.json`` and one Parquet file (or several) a subset and split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nearfield.errors import BadInputError
from nearfield.evaluation.local import TYPES, RetrievalSplit, SuiteTask, make_task, official_class
from nearfield.files import fingerprint, hash_file, read_json

META = "meta.json"
_PARTS = {"corpus": ("id", "text"), "queries": ("id", "text"), "qrels": ("query-id", "corpus-id", "score")}
_TEXT_COLUMNS = {"text", "sentence1", "sentence2", "sentences", "id", "query-id", "corpus-id"}


def task_folders(folder: Path, only: Sequence[str] | None = None) -> list[Path]:
    """The task folders at or below a folder, by name; ``only`` keeps the tasks named there."""
    if (folder / META).is_file():
        found = [folder]
    elif folder.is_dir():
        found = sorted(child for child in folder.iterdir() if (child / META).is_file())
    else:
        raise BadInputError("this folder does not exist", where=str(folder))
    if not found:
        raise BadInputError(
            "this folder holds no task", where=str(folder), hint=f"A task is a folder with {META} and Parquet files."
        )
    if only is None:
        return found
    names = {str(_meta(child)["task"]): child for child in found}
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
    base = official_class(str(meta.get("mteb_class", name)))
    if task_type not in TYPES and base is None:
        raise BadInputError(
            f"the task type {task_type!r} is not known", where=str(folder / META), hint=f"Types: {', '.join(TYPES)}."
        )
    if base is not None and base.metadata.type != task_type:
        raise BadInputError(
            f"the type is {task_type!r}, but mteb's {base.metadata.name} is of type {base.metadata.type!r}",
            where=str(folder / META),
        )
    retrieval = TYPES[task_type].columns == () if task_type in TYPES else False
    files = _files(folder, meta, retrieval)
    result = SuiteTask(None, details={"folder": folder.name})

    def load() -> dict[str, Any]:
        if retrieval:
            return {s: {split: _retrieval_split(folder, s, split, result)} for s in subsets}
        splits = [split, *meta.get("extra_splits", [])]
        data = {s: {p: _columns_split(folder, s, p, task_type, result) for p in splits} for s in subsets}
        return data["default"] if subsets == ["default"] else data

    same_name = base is not None and base.metadata.name == name
    result.task = make_task(
        base or TYPES[task_type].base,
        name=name,
        task_type=task_type,
        description=str(meta.get("note") or f"Local copy of {name}"),
        content_hash=fingerprint([[file.name, hash_file(file)] for file in files]),
        languages=_languages(folder, meta, base.metadata.eval_langs if base is not None and same_name else None),
        splits=[split],
        load=load,
        like=base.metadata if base is not None else None,
    )
    if base is not None:
        result.details["scored_as"] = base.metadata.name
    return result


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
    result = {}
    for subset in meta["subsets"]:
        if stated is not None and subset in stated:
            result[subset] = [str(language) for language in stated[subset]]
        elif isinstance(official, dict):
            result[subset] = list(official.get(subset, ["eng-Latn"]))
        else:
            result[subset] = list(official or ["eng-Latn"])
    return result


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


def _read(file: Path, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(file).replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(
            f"this is no readable Parquet file ({str(error).splitlines()[0]})", where=str(file)
        ) from error
    for name in columns:
        if name not in table.column_names:
            raise BadInputError(
                f"the column {name!r} is missing",
                where=str(file),
                hint=f"Columns here: {', '.join(table.column_names)}.",
            )
        column = table.column(name)
        kind = column.type
        if name in _TEXT_COLUMNS and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise BadInputError(f"the column {name!r} must hold text; it holds {kind}", where=str(file))
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise BadInputError(f"the column {name!r} is empty in row {row + 1}", where=str(file))
    if table.num_rows == 0:
        raise BadInputError("this file has no rows", where=str(file))
    return table


def _dataset(table: pa.Table) -> Any:
    import datasets
    from datasets.table import InMemoryTable

    data = datasets.Dataset(InMemoryTable(table))
    for name, feature in data.features.items():
        if name == "image" and isinstance(feature, dict):
            data = data.cast_column(name, datasets.Image())
    return data


def _columns_split(folder: Path, subset: str, split: str, task_type: str, result: SuiteTask) -> Any:
    file = folder / f"{subset}.{split}.parquet"
    table = _read(file, TYPES[task_type].columns if task_type in TYPES else ())
    if task_type == "STS" and not pc.all(pc.is_finite(table.column("score").cast(pa.float64()))).as_py():
        raise BadInputError("the column 'score' holds a value that is no finite number", where=str(file))
    if "cluster" in table.column_names:
        keys = table.column("cluster").to_pylist()
        result.clusters[subset, split] = {str(i): str(key) for i, key in enumerate(keys) if key is not None}
        table = table.drop_columns(["cluster"])
    data = _dataset(table)
    names = read_json(folder / META, "task description").get("label_names")
    if isinstance(names, list) and "label" in data.features:
        import datasets

        data = data.cast_column("label", datasets.ClassLabel(names=[str(name) for name in names]))
    return data


def _retrieval_split(folder: Path, subset: str, split: str, result: SuiteTask) -> RetrievalSplit:
    stem = f"{subset}.{split}"
    files = {part: folder / f"{stem}.{part}.parquet" for part in (*_PARTS, "top_ranked")}
    corpus, queries, qrels = (_read(files[part], columns) for part, columns in _PARTS.items())
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
        relevant.setdefault(query, {})[document] = int(score)
    if "cluster" in queries.column_names:
        pairs = zip(queries.column("id").to_pylist(), queries.column("cluster").to_pylist(), strict=True)
        result.clusters[subset, split] = {query: str(key) for query, key in pairs if key is not None}
        queries = queries.drop_columns(["cluster"])
    ranked = None
    if files["top_ranked"].is_file():
        table = _read(files["top_ranked"], ("query-id", "corpus-ids"))
        ranked = dict(zip(table.column("query-id").to_pylist(), table.column("corpus-ids").to_pylist(), strict=True))
        for query, documents in ranked.items():
            unknown = next((document for document in documents if document not in ids["corpus"]), None)
            if unknown is not None:
                raise BadInputError(
                    f"the query {query!r} names {unknown!r}, which is not in the corpus", where=str(files["top_ranked"])
                )
    keep = ["id", "text"]
    if "title" in corpus.column_names:
        titles = pc.fill_null(corpus.column("title").cast(pa.large_string()), "")
        corpus = corpus.set_column(corpus.column_names.index("title"), "title", titles)
        keep.append("title")
    return {
        "corpus": _dataset(corpus.select(keep)),
        "queries": _dataset(queries),
        "relevant_docs": relevant,
        "top_ranked": ranked,
    }
