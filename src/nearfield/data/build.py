"""Data recipe -> store: the stage of a run that reads the data."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from nearfield.checksums import damage, seal
from nearfield.config import load_config
from nearfield.data.cleaning.run import Encoders, clean, steps_of
from nearfield.data.collect import Collected, collect
from nearfield.data.config import DataConfig
from nearfield.data.items import image_inputs
from nearfield.data.readers import ReaderBase, excerpt
from nearfield.data.resolve import Resolved, conflict_rows, first_conflicts, resolve, shared_between_splits
from nearfield.data.store import FORMAT_VERSION, SourceInfo, Store
from nearfield.data.summary import Contradictions, DataSummary, SourceSummary, StepSummary, read_summary
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, fingerprint, read_json, remove_leftovers, write_json
from nearfield.kinds import outside_sources

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
    inputs += [step.inputs() for step, _ in steps_of(config)]
    settings = _without_paths(config.model_dump(exclude_none=True))
    code = [[source.path, source.version, source.content] for source in outside_sources(config)]
    return fingerprint({"version": VERSION, "config": settings, "inputs": inputs, "code": code})


def _without_paths(value: Any) -> Any:
    """Settings as they are written to JSON, without the paths in them."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items() if not isinstance(each, Path)}
    return [_without_paths(each) for each in value] if isinstance(value, list | tuple) else value


def build_data(config: DataConfig, out: Path, *, encoders: Encoders | None = None) -> DataSummary:
    """Build the store of a data recipe in the folder ``out``, which is replaced if it exists.

    ``encoders`` turns the name of a model into its ``encode``, for cleaning steps that embed texts. The folder appears when
    it is whole. Raises :class:`BadInputError` where a file, a column or too many rows cannot be used; the quarantined rows
    are then in ``<out>.quarantine.jsonl``. Texts stream through; see :mod:`.collect` and :mod:`.resolve` for the numbers
    that are held in memory.
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
        sources = tuple(SourceInfo(s.name, s.examples.kind, s.task_type, s.prompts) for s in config.sources)
        store = Store(aside, config.name, mark, sources)
        conflicts = _conflicts(resolved, store)
        steps: tuple[StepSummary, ...] = ()
        if steps_of(config):
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
                kind=source.examples.kind,
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
