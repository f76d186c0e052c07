"""Data recipe -> store, in two passes.

In the first rows are read and checked, texts and images become items on disk, examples row numbers. In the second conflicts are
resolved, duplicates merged, groups and splits given.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.arrays import Index, Mask, Ragged, Rows
from nearfield.config import load_config, outside_sources
from nearfield.console import track
from nearfield.data.cleaning.run import Encoders, clean
from nearfield.data.config import DataConfig
from nearfield.data.images import hash_named
from nearfield.data.items import (
    Example,
    ImageItem,
    ImagePreparer,
    Item,
    PreparedImage,
    example_digest,
    identity,
    read_example,
    with_images,
)
from nearfield.data.readers import BadRowError, ReaderBase, Row, excerpt
from nearfield.data.store import (
    EXAMPLES_SCHEMA,
    FORMAT_VERSION,
    IMAGE,
    IMAGES_FILE,
    IMAGES_SCHEMA,
    ITEMS_SCHEMA,
    WEIGHT,
    Contradictions,
    DataSummary,
    SourceInfo,
    SourceSummary,
    StepSummary,
    Store,
    read_summary,
)
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, damage, fingerprint, read_json, remove_leftovers, seal, write_json

if TYPE_CHECKING:
    from nearfield.data.config import SourceConfig


VERSION = 2
"""Raised when the same recipe and files give another store."""

logger = logging.getLogger("nearfield.data")


def data_fingerprint(config: DataConfig) -> str:
    """32 hex digits over the recipe, the stage's version and the content of all files read.

    The place of the files does not count, and neither does the order of keys. Files are read once for it.
    """
    return _fingerprint(config, _readers(config))


def _readers(config: DataConfig) -> list[ReaderBase]:
    return [source.reader.build() for source in config.sources]


def _fingerprint(config: DataConfig, readers: Sequence[ReaderBase]) -> str:
    inputs: list[object] = [
        {**reader.inputs(), **image_inputs(source, reader)}
        for source, reader in zip(config.sources, readers, strict=True)
    ]
    inputs += [step.inputs() for step, _ in config.all_steps()]
    settings = _without_paths(config.model_dump(exclude_none=True))
    code = [[source.path, source.version, source.content] for source in outside_sources(config)]
    return fingerprint({"version": VERSION, "config": settings, "inputs": inputs, "code": code})


def _without_paths(value: Any) -> Any:
    """Settings as they are written to JSON, without the paths in them."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items() if not isinstance(each, Path)}
    return [_without_paths(each) for each in value] if isinstance(value, list | tuple) else value


def image_inputs(source: SourceConfig, reader: ReaderBase) -> dict[str, str]:
    """A hash over the paths and contents of the images that the rows of a source name; nothing where they name none."""
    images = source.images
    if images is None or not (images.columns or images.join):
        return {}
    columns = tuple(dict.fromkeys([*images.columns, *(both.image for both in images.join.values())]))
    columns = tuple(column for column in columns if column in source.read_columns())
    paths: set[str] = set()
    for row in reader.rows(columns):
        for column in columns if row.values is not None else ():
            value = (row.values or {}).get(column)
            for member in value if isinstance(value, list | tuple) else (value,):
                path = member.get("path") if isinstance(member, Mapping) and not member.get("bytes") else member
                if isinstance(path, str):
                    paths.add(path)
    return {"images": hash_named(sorted(paths), source.image_folder())} if paths else {}


def build_data(config: DataConfig, out: Path, *, encoders: Encoders | None = None) -> DataSummary:
    """Build the store of a data recipe in the folder ``out``, which is replaced if it exists.

    ``encoders`` turns the name of a model into its ``encode``, for cleaning steps that embed texts. The folder appears when
    it is whole. Raises :class:`BadInputError` where a file, a column or too many rows cannot be used; the quarantined rows
    are then in ``<out>.quarantine.jsonl``. Texts stream through; see :class:`ItemWriter` and :func:`resolve` for the
    numbers that are held in memory.
    """
    readers = _readers(config)
    return _build(config, readers, out, _fingerprint(config, readers), encoders)


def ensure_store(config: DataConfig, cache: Path, *, encoders: Encoders | None = None) -> DataSummary:
    """Build the store in ``cache/data/<fingerprint>`` unless it is there; ``.reused`` tells which."""
    readers = _readers(config)
    mark = _fingerprint(config, readers)
    return _ensure(config, readers, cache / "data" / mark, mark, encoders)


def ensure_store_at(config: DataConfig, out: Path, *, encoders: Encoders | None = None) -> DataSummary:
    """Build the store in the folder ``out`` unless the same one is there; one of another recipe is replaced."""
    readers = _readers(config)
    return _ensure(config, readers, out, _fingerprint(config, readers), encoders)


def _ensure(
    config: DataConfig, readers: list[ReaderBase], out: Path, mark: str, encoders: Encoders | None
) -> DataSummary:
    if _is_whole(out):
        if read_json(out / "store.json", "store").get("fingerprint") == mark:
            logger.debug("The store %s is up to date", out)
            return read_summary(out)
        logger.info("The store %s is built again: the recipe, its files or the format of stores changed", out)
    return _build(config, readers, out, mark, encoders)


def _is_whole(out: Path) -> bool:
    """Whether there is a store every byte of which is what was written; what is wrong with one is said."""
    if not (out / "store.json").is_file():
        return False
    wrong = damage(out, ("items.arrow", "examples.arrow", "store.json"))
    if wrong is not None:
        logger.warning("The store %s is built again: %s", out, wrong)
    return wrong is None


def prepare_store(
    config: DataConfig | Path | str,
    cache: Path | str,
    overrides: Sequence[str] = (),
    *,
    encoders: Encoders | None = None,
) -> Store:
    """The store of a data recipe (a config or the path of its file), built if it is missing.

    ``cache`` is a folder for such things, e.g. ``runs/.cache``; the store lies in ``cache/data/<fingerprint>``.
    """
    if not isinstance(config, DataConfig):
        config = load_config(DataConfig, config, overrides).config
    elif overrides:
        raise ValueError("overrides go with a file, not with a config that is made already")
    return Store.open(ensure_store(config, Path(cache), encoders=encoders).path)


def _build(
    config: DataConfig, readers: list[ReaderBase], out: Path, mark: str, encoders: Encoders | None = None
) -> DataSummary:
    if out.exists() and not (out / "store.json").is_file() and (out.is_file() or any(out.iterdir())):
        hint = "Choose another folder with --out."
        raise BadInputError(
            "this exists already and is not a store; it will not be replaced", where=str(out), hint=hint
        )
    remove_leftovers(out.parent)
    report = out.with_name(out.name + ".quarantine.jsonl")
    with atomic_path(out) as aside:
        aside.mkdir()
        raw, quarantine = aside / "raw.arrow", aside / "quarantine.jsonl"
        try:
            collected = collect(config, readers, aside / "items.arrow", raw, quarantine)
        except BadInputError as error:
            if error.where is not None or not quarantine.stat().st_size:
                raise
            shutil.copyfile(quarantine, report)
            hint = f"Look at the rows in that file; mend them, or raise max_bad_rows (now {config.max_bad_rows:g})."
            raise BadInputError(error.what, where=str(report), hint=hint) from error
        resolved = resolve(config, collected, raw, aside / "examples.arrow")
        raw.unlink()
        sources = tuple(SourceInfo(s.name, s.examples.form, s.task_type, s.prompts) for s in config.sources)
        store = Store(aside, config.name, mark, sources)
        conflicts = _conflicts(resolved, store)
        steps: tuple[StepSummary, ...] = ()
        if config.all_steps():
            steps = clean(config, store, aside / "removed.jsonl", encoders)
            store = Store(aside, config.name, mark, sources)
        summary = _summarise(config, collected, resolved, store, out, conflicts, steps)
        write_json(aside / "summary.json", summary.to_json())
        meta = {
            "format_version": FORMAT_VERSION,
            "name": config.name,
            "fingerprint": mark,
            "sources": [
                {"name": s.name, "kind": s.kind, "task_type": s.task_type, "prompts": s.prompts.model_dump()}
                | {"examples": c.examples}
                for s, c in zip(sources, summary.sources, strict=True)
            ],
        }
        write_json(aside / "store.json", meta)
        seal(aside)
    report.unlink(missing_ok=True)
    return summary


def _conflicts(resolved: Resolved, store: Store) -> Contradictions:
    rows = conflict_rows(resolved)
    texts = dict(zip(rows.tolist(), map(excerpt, store.shown(rows)), strict=True))
    return Contradictions(
        positive_and_negative=len(resolved.clashes),
        examples_changed=resolved.examples_changed,
        labels=len(resolved.labels),
        scores=len(resolved.scores),
        first=first_conflicts(resolved, texts),
    )


def _summarise(
    config: DataConfig,
    collected: Collected,
    resolved: Resolved,
    store: Store,
    out: Path,
    conflicts: Contradictions,
    steps: tuple[StepSummary, ...],
) -> DataSummary:
    examples = store.examples
    summaries = []
    for number, source in enumerate(config.sources):
        mine = examples.filter(pc.equal(examples.column("source"), number)).select(["group", "cluster", "split"])
        splits = {entry["values"]: entry["counts"] for entry in pc.value_counts(mine.column("split")).to_pylist()}
        summaries.append(
            SourceSummary(
                name=source.name,
                kind=source.examples.form,
                task_type=source.task_type,
                rows=collected.rows[number],
                examples=mine.num_rows,
                duplicates=resolved.duplicates[number],
                quarantined=dict(collected.bad[number].most_common()),
                splits=dict(sorted(splits.items())),
                groups=pc.count_distinct(mine.column("group")).as_py(),
                clusters=pc.count_distinct(mine.column("cluster")).as_py(),
            )
        )
    return DataSummary(
        path=out,
        name=config.name,
        fingerprint=store.fingerprint,
        items=store.items.num_rows,
        examples=examples.num_rows,
        sources=tuple(summaries),
        conflicts=conflicts,
        shared_between_splits=shared_between_splits(store),
        steps=steps,
    )


# The first pass

_BATCH_ROWS = 32_768
_BATCH_IMAGES = 4096
_BATCH_BYTES = 16 << 20

RAW_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("query", pa.int64()),
        ("positives", pa.large_list(pa.int64())),
        ("negatives", pa.large_list(pa.int64())),
        ("score", pa.float64()),
        ("label", pa.large_string()),
        ("group", pa.large_string()),
        ("cluster", pa.large_string()),
        ("split_key", pa.large_string()),
        ("weight", pa.float64()),
    ]
)


class TableWriter:
    """Writes rows of a schema to an Arrow stream, batch by batch; what is open is written when the block ends."""

    def __init__(self, path: Path, schema: pa.Schema, batch_rows: int | None = None) -> None:
        self.schema = schema
        self._writer = pa.ipc.new_stream(str(path), schema)
        self._batch_rows = batch_rows or _BATCH_ROWS
        self._columns: list[list[Any]] = [[] for _ in schema]
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._writer.close()

    def add(self, *values: object, size: int = 0) -> None:
        """Append one row, its values in the order of the schema; ``size`` is about how many bytes it takes."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self._size += size
        if len(self._columns[0]) >= self._batch_rows or self._size >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        columns, self._columns, self._size = self._columns, [[] for _ in self.schema], 0
        if columns[0]:
            arrays = [pa.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=self.schema))


class ItemWriter:
    """Gives each item its row number and writes it once, and each image: those with equal pixels are one.

    Held in memory: the 16-byte id and the row number of each item, image and file of an image (about 170 bytes each in
    Python's dictionary), and one batch of texts and of images; never the texts of the data set.
    """

    def __init__(self, items: TableWriter, images: TableWriter | None = None) -> None:
        self._items = items
        self._images = images
        self._rows: dict[bytes, int] = {}
        self._by_file: dict[bytes, int] = {}
        self._by_pixels: dict[bytes, int] = {}
        self._all_ids = bytearray()

    def ids(self) -> bytes:
        """The ids of all items end to end, in the order of rows."""
        return bytes(self._all_ids)

    def knows(self, raw_id: bytes) -> bool:
        """Whether the image of this file is written."""
        return raw_id in self._by_file

    def add(self, item: Item) -> int:
        """The row of an item; one that is new is written."""
        key = identity(item)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self._rows)
            self._all_ids += key
            text = item.text if isinstance(item, ImageItem) else item
            if self._images is None:
                self._items.add(key, text, size=len(text))
            else:
                image = self._image_row(item.image, self._images) if isinstance(item, ImageItem) else None
                self._items.add(key, text, image, size=len(text))
        return row

    def _image_row(self, image: PreparedImage, images: TableWriter) -> int:
        row = self._by_file.get(image.raw_id)
        if row is not None:
            return row
        row = self._by_pixels.get(image.id)
        if row is None:
            row = self._by_pixels[image.id] = len(self._by_pixels)
            images.add(image.id, image.data, *image.size, *image.original, size=len(image.data))
        self._by_file[image.raw_id] = row
        return row


@dataclass
class Collected:
    """The numbers of the first pass that the second one needs."""

    ids: bytes = b""
    """The ids of all items end to end, 16 bytes each."""
    rows: list[int] = field(default_factory=list)
    """Rows read, by source."""
    bad: list[Counter[str]] = field(default_factory=list)
    """Rows that cannot be used, by reason, of each source."""
    positives: array[int] = field(default_factory=lambda: array("q"))
    """Query and positive of all retrieval examples, one after the other."""
    ties: array[int] = field(default_factory=lambda: array("q"))
    """Items that examples of sources with ``group: {kind: duplicates}`` tie together, two by two."""


def collect(config: DataConfig, readers: list[ReaderBase], items: Path, raw: Path, quarantine: Path) -> Collected:
    """Read all sources into ``items`` and ``raw`` (Arrow streams) and ``quarantine`` (JSONL).

    Raises BadInputError where a source has no usable row or too many that are not usable; the quarantine file is
    then complete for that source.
    """
    with contextlib.ExitStack() as stack:
        images, schema = None, ITEMS_SCHEMA
        if any(source.image_rules() is not None for source in config.sources):
            schema = schema.append(IMAGE)
            images = stack.enter_context(TableWriter(items.with_name(IMAGES_FILE), IMAGES_SCHEMA, _BATCH_IMAGES))
        writer = ItemWriter(stack.enter_context(TableWriter(items, schema)), images)
        table = stack.enter_context(TableWriter(raw, RAW_SCHEMA))
        bad = stack.enter_context(quarantine.open("w", encoding="utf-8"))
        collector = _Collector(config, writer, table, bad)
        for number, (source, reader) in enumerate(zip(config.sources, readers, strict=True)):
            collector.read(number, source, reader)
        collector.result.ids = writer.ids()
    return collector.result


class _Collector:
    """Writes what the sources hold, one after the other."""

    def __init__(self, config: DataConfig, items: ItemWriter, table: TableWriter, quarantine: IO[str]) -> None:
        self._config = config
        self._items = items
        self._table = table
        self._quarantine = quarantine
        self.result = Collected()

    def read(self, number: int, source: SourceConfig, reader: ReaderBase) -> None:
        """Read the rows of a source."""
        rules = source.image_rules()
        prepare = None if rules is None else ImagePreparer(rules, self._items.knows)
        folder = source.image_folder()
        count, reasons, first_bad = 0, Counter[str](), ""
        for row in track(reader.rows(source.read_columns()), f"Reading {source.name}"):
            count += 1
            try:
                if row.values is None:
                    raise BadRowError(row.reason, row.excerpt)
                values = row.values if source.images is None else with_images(source.images, row.values, folder)
                self._add(number, source, read_example(source, values, self._config.max_characters, prepare))
            except BadRowError as error:
                reasons[error.reason] += 1
                self._quarantine.write(_entry(source.name, row, error))
                first_bad = first_bad or f"{row.file}:{row.line}: {error.reason}"
        self.result.rows.append(count)
        self.result.bad.append(reasons)
        self._quarantine.flush()
        _check_counts(self._config, source, count, reasons, first_bad)

    def _add(self, number: int, source: SourceConfig, example: Example) -> None:
        query = self._items.add(example.query)
        positives = [self._items.add(item) for item in example.positives]
        negatives = [self._items.add(item) for item in example.negatives]
        if example.score is None:
            for positive in positives:
                self.result.positives.extend((query, positive))
        tie = source.duplicate_groups
        if tie is not None:
            for other in [*positives, *(negatives if tie.negatives else ())]:
                self.result.ties.extend((query, other))
        keys = (example.group, example.cluster, example.split_key)
        self._table.add(number, query, positives, negatives, example.score, example.label, *keys, example.weight)


def _entry(source: str, row: Row, error: BadRowError) -> str:
    entry = {"source": source, "file": row.file, "line": row.line, "reason": error.reason, "excerpt": error.excerpt}
    return json.dumps(entry, ensure_ascii=True) + "\n"


def _check_counts(config: DataConfig, source: SourceConfig, rows: int, reasons: Counter[str], first: str) -> None:
    bad = reasons.total()
    if rows == 0:
        raise BadInputError(f"the source {source.name!r} is empty: there is no row to read", hint="Check its reader.")
    if bad > config.max_bad_rows * rows or bad == rows:
        common = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(5))
        raise BadInputError(
            f"the source {source.name!r}: {bad:,} of {rows:,} rows cannot be used ({bad / rows:.1%}, allowed are "
            f"{config.max_bad_rows:.1%}): {common}; the first is {first}"
        )


# The second pass

_MAX_SPLITS = 64
_SHOWN = 5


@dataclass
class Resolved:
    """The duplicates and contradictions that the second pass met."""

    duplicates: list[int]
    clashes: Rows = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """[pairs, 2]: query and text that was positive and negative."""
    examples_changed: int = 0
    labels: Rows = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """[items, 2]: source and item with several labels."""
    scores: Rows = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    """[pairs, 3]: source and two items with several scores."""


class _Resolver:
    """Holds, a number or two an example or item, what is known over all examples; never texts."""

    def __init__(self, config: DataConfig, collected: Collected) -> None:
        self.sources = config.sources
        self.weighted = any(source.weight is not None for source in config.sources)
        self.ids = np.frombuffer(collected.ids, dtype="V16")
        self.count = len(self.ids)
        pairs = np.asarray(collected.positives, dtype=np.int64).reshape(-1, 2)
        self.positives = Index(np.unique(pairs[:, 0] * self.count + pairs[:, 1]), rising=True)
        self.groups: list[str] = []
        if any(source.duplicate_groups is not None for source in config.sources):
            ties = np.asarray(collected.ties, dtype=np.int64).reshape(-1, 2)
            self.groups = component_keys(ties, self.ids)
        self.seen: set[bytes] = set()
        self.group_splits: list[dict[str, str]] = [{} for _ in self.sources]
        self.splits: set[str] = set()
        self.clashes: list[Rows] = [np.empty(0, dtype=np.int64)]
        self.labels: dict[str, int] = {}
        self.labelled: list[tuple[int, int, int]] = []
        self.graded: list[tuple[int, int, int, float]] = []
        self.result = Resolved([0] * len(self.sources))

    def batch(self, batch: pa.RecordBatch, table: TableWriter) -> None:
        """Resolve a batch of raw examples and write what remains."""
        clash = self._clashing(batch)
        columns = [batch.column(name).to_pylist() for name in batch.schema.names]
        position = 0
        for values in zip(*columns, strict=True):
            number, query, positives, negatives, score, label, group, cluster, split_key, weight = values
            flags = clash[position : position + len(negatives)]
            position += len(negatives)
            remaining = negatives
            if flags.any():
                remaining = [row for row, out in zip(negatives, flags.tolist(), strict=True) if not out]
            digest = example_digest(number, query, positives, remaining, score, label)
            if digest in self.seen:
                self.result.duplicates[number] += 1
                continue
            self.seen.add(digest)
            self.result.examples_changed += len(remaining) < len(negatives)
            source = self.sources[number]
            key = self._group(source, query, group)
            split = self._split(number, source, key, split_key)
            self._note(number, source, query, positives, score, label)
            weights = (weight,) if self.weighted else ()
            cluster = key if cluster is None else cluster
            table.add(number, query, positives, remaining, score, label, key, cluster, split, *weights)

    def _clashing(self, batch: pa.RecordBatch) -> Mask:
        """For each negative of the batch, end to end: whether it is a positive of its query anywhere."""
        negatives = Ragged.from_arrow(batch.column("negatives"))
        keys = np.repeat(batch.column("query").to_numpy(), negatives.lengths) * self.count + negatives.values
        clash = self.positives.has(keys)
        self.clashes.append(np.unique(keys[clash]))
        return clash

    def _group(self, source: SourceConfig, query: int, group: str | None) -> str:
        if source.duplicate_groups is not None:
            return self.groups[query]
        if group is not None:
            return group
        identity: bytes = self.ids[query].tobytes()
        return identity.hex()

    def _split(self, number: int, source: SourceConfig, group: str, key: str | None) -> str:
        split = source.split.split_of(group, key)
        self.splits.add(split)
        if len(self.splits) > _MAX_SPLITS:
            raise BadInputError(
                f"there are more than {_MAX_SPLITS} splits", hint="Check the column that names the split."
            )
        checked = source.split.may_part(source.group is not None)
        if checked and self.group_splits[number].setdefault(group, split) != split:
            raise BadInputError(
                f"the source {source.name!r}: the group {group[:80]!r} would be in two splits, "
                f"{self.group_splits[number][group]!r} and {split!r}",
                hint="A group must stay on one side: split by the group's hash, or choose another 'group'.",
            )
        return split

    def _note(
        self,
        number: int,
        source: SourceConfig,
        query: int,
        positives: Sequence[int],
        score: float | None,
        label: str | None,
    ) -> None:
        if label is not None and source.task_type != "MultilabelClassification":
            self.labelled.append((number, query, self.labels.setdefault(label, len(self.labels))))
        if score is not None:
            low, high = sorted((query, positives[0]))
            self.graded.append((number, low, high, score))

    def finish(self) -> Resolved:
        keys = np.unique(np.concatenate(self.clashes))
        self.result.clashes = np.stack([keys // max(self.count, 1), keys % max(self.count, 1)], axis=1)
        labelled = np.asarray(self.labelled, dtype=np.int64).reshape(-1, 3)
        self.result.labels = contradictions(labelled[:, :2], labelled[:, 2])
        graded = np.asarray([row[:3] for row in self.graded], dtype=np.int64).reshape(-1, 3)
        self.result.scores = contradictions(graded, np.asarray([row[3] for row in self.graded], dtype=np.float64))
        return self.result


def shared_between_splits(store: Store) -> dict[str, int]:
    """Items that are query or positive in examples of two splits, by pair of splits, e.g. ``test+train``."""
    of_split: dict[str, Rows] = {}
    for split in sorted(pc.unique(store.examples["split"]).to_pylist()):
        part = store.examples.filter(pc.equal(store.examples["split"], split))
        of_split[split] = np.unique(
            np.concatenate([part["query"].to_numpy(), Ragged.from_arrow(part["positives"]).values])
        )
    shared = {}
    for first, second in itertools.combinations(of_split, 2):
        count = len(np.intersect1d(of_split[first], of_split[second], assume_unique=True))
        if count:
            shared[f"{first}+{second}"] = count
    return shared


def contradictions(keys: Rows, values: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> Rows:
    """The rows of ``keys`` [n, k] (each once, sorted) that stand beside more than one of ``values`` [n]."""
    if not len(keys):
        return keys
    order = np.lexsort((values, *reversed(keys.T)))
    keys, values = keys[order], values[order]
    same = (keys[1:] == keys[:-1]).all(axis=1) & (values[1:] != values[:-1])
    contradicted: Rows = np.unique(keys[1:][same], axis=0)
    return contradicted


def resolve(config: DataConfig, collected: Collected, raw: Path, out: Path) -> Resolved:
    """Read the raw examples and write the examples of the store.

    A text that is a positive of a query in any example of any source is taken out of the query's negatives. Equal
    examples of a source are one; the first stays. Held in memory: 16 bytes for each (query, positive) pair, about
    100 for each example, 24 for each graded or labelled one, and 8 for each item.
    """
    resolver = _Resolver(config, collected)
    schema = EXAMPLES_SCHEMA.append(WEIGHT) if resolver.weighted else EXAMPLES_SCHEMA
    with pa.memory_map(str(raw)) as source, TableWriter(out, schema) as table:
        for batch in pa.ipc.open_stream(source):
            resolver.batch(batch, table)
    return resolver.finish()


def first_conflicts(resolved: Resolved, texts: Mapping[int, str]) -> tuple[dict[str, str], ...]:
    """The first few conflicts in words; ``texts`` has those of :func:`conflict_rows`."""
    shown: list[dict[str, str]] = []
    for query, text in resolved.clashes[:_SHOWN].tolist():
        shown.append({"what": "positive and negative", "query": texts[query], "text": texts[text]})
    for _, item in resolved.labels[:_SHOWN].tolist():
        shown.append({"what": "several labels", "text": texts[item]})
    for _, first, second in resolved.scores[:_SHOWN].tolist():
        shown.append({"what": "several scores", "query": texts[first], "text": texts[second]})
    return tuple(shown)


def conflict_rows(resolved: Resolved) -> Rows:
    """The items whose texts :func:`first_conflicts` wants, each once."""
    parts = [resolved.clashes[:_SHOWN], resolved.labels[:_SHOWN, 1:], resolved.scores[:_SHOWN, 1:]]
    return np.unique(np.concatenate([part.ravel() for part in parts]))


def components(edges: Rows, count: int) -> Rows:
    """The component, from 0, of each of ``count`` rows [n]; ``edges`` [E, 2] tie two rows together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(edges), dtype=np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
    component: Rows = connected_components(graph, directed=False)[1].astype(np.int64)
    return component


def component_keys(edges: Rows, ids: npt.NDArray[np.void]) -> list[str]:
    """The group key of each item, where items that an example ties together are one group.

    ``edges`` is [E, 2] of item rows, ``ids`` the ids (16 bytes) of all items. The key of a group is the smallest id in it,
    in hex: it does not depend on the order of rows. An item without ties is a group of its own.
    """
    component = components(edges, len(ids))
    words = np.frombuffer(ids.tobytes(), dtype=">u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0], component))
    first = order[np.searchsorted(component[order], np.arange(component.max(initial=-1) + 1))]
    names = [bytes(key).hex() for key in ids[first].tolist()]
    return [names[group] for group in component.tolist()]
