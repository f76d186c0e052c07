"""MMEB's way of scoring (arXiv 2410.05160): each query has candidates of its own, of which the first is the right one.

The rows are those of MMEB's evaluation files. The score is hit@1 among a row's candidates. Candidates go by the hash of
their content, so that a tie is decided by that and never by the place of the right one, and a candidate that is named
twice is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.data.config import ImagesConfig
from nearfield.data.images import ImageError, ImageRef, decode
from nearfield.errors import BadInputError
from nearfield.evaluation.tasks import TYPES, SuiteTask, describe_task, make_task
from nearfield.files import fingerprint, hash_file

if TYPE_CHECKING:
    from nearfield.evaluation.config import MmebTask

Item = tuple[str, str]
"""(text, path of an image); one of them may be empty."""
_MARK = re.compile(r"<\|?image(_\d+)?\|?>|<image>")


def mmeb_task(config: MmebTask) -> SuiteTask:
    """The task of one of MMEB's evaluation files. Rows are read now, images when the task runs."""
    queries: dict[str, Item] = {}
    corpus: dict[str, Item] = {}
    relevant: dict[str, dict[str, int]] = {}
    ranked: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(config.file)):
        query, candidates = _row(row, number, config)
        ids = [_identity(item) for item in candidates]
        corpus.update(zip(ids, candidates, strict=True))
        queries[f"q{number}"] = query
        relevant[f"q{number}"] = {ids[0]: 1}
        ranked[f"q{number}"] = sorted(set(ids))
    if not queries:
        raise BadInputError("this file has no rows", where=str(config.file))
    sides = _side(config, queries, "queries"), _side(config, corpus, "candidates")
    counts = [len(ids) for ids in ranked.values()]
    chance = sum(1 / count for count in counts) / len(counts)
    details = {"queries": len(queries), "corpus": len(corpus), "chance": round(chance, 6)}
    result = SuiteTask(None, details=details)

    def load() -> dict[str, Any]:
        split = {
            "corpus": _dataset(config, corpus, sides[1]),
            "queries": _dataset(config, queries, sides[0]),
            "relevant_docs": {query: dict(documents) for query, documents in relevant.items()},
            "top_ranked": {query: list(ids) for query, ids in ranked.items()},
        }
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
    result.task = make_task(TYPES["Any2AnyRetrieval"].base, metadata, load, {"k_values": (1, 3, 5, 10)})
    return result


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


def _identity(item: Item) -> str:
    return fingerprint(list(item))


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


def _dataset(config: MmebTask, items: Mapping[str, Item], side: str) -> Any:
    import datasets

    columns: dict[str, Any] = {"id": list(items)}
    if "t" in side:
        columns["text"] = [text for text, _ in items.values()]
    if "i" in side:
        columns["image"] = [_image(config, path) for _, path in items.values()]
    return datasets.Dataset.from_dict(columns)


def _image(config: MmebTask, path: str) -> Any:
    rules = ImagesConfig()
    try:
        raw = ImageRef(path, path=path, folder=config.images or config.file.parent).read(rules.max_bytes)
        return decode(raw, rules).image
    except ImageError as error:
        raise BadInputError(f"the image {path!r} cannot be used: {error}", where=str(config.file)) from error
