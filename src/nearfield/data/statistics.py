"""Statistics of a store: lengths, duplicates, words that sides share, and examples to look at."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from nearfield.arrays import Ragged, Rows
from nearfield.console import track
from nearfield.data.store import StepSummary, Store, read_summary
from nearfield.errors import BadInputError
from nearfield.provenance import generator

CountTokens = Callable[[list[str]], list[int]]
_BATCH = 4096
_WORD = re.compile(r"\w+")


def count_words(texts: list[str]) -> list[int]:
    """Words between white space: what lengths are counted in when no tokenizer is named."""
    return [len(text.split()) for text in texts]


@dataclass(frozen=True)
class LengthStats:
    """The lengths of a role's items, each item once."""

    role: str
    items: int
    mean: float
    median: float
    p95: float
    longest: int
    histogram: tuple[tuple[int, int], ...]
    """(upper bound, items with a length up to it and over the one before); bounds are powers of two."""


@dataclass(frozen=True)
class SourceStats:
    """The statistics of a source."""

    name: str
    kind: str
    task_type: str
    splits: dict[str, int]
    positives: float
    """Mean positives an example; 0 for labelled items."""
    negatives: float
    duplicate_share: float
    """Rows of the files that said the same as an earlier one, as a share of the usable rows."""
    overlap: float | None
    """Mean share of the query's different words that occur in its first positive; null without positives."""
    labels: int
    lengths: tuple[LengthStats, ...]
    images: int = 0
    """Different images of its items."""


@dataclass(frozen=True)
class StoreStats:
    """The statistics of a store."""

    name: str
    path: str
    unit: str
    items: int
    examples: int
    sources: tuple[SourceStats, ...]
    steps: tuple[StepSummary, ...] = ()
    """The cleaning steps that ran while the store was built, with what they took out."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def store_stats(
    store: Store, count_tokens: CountTokens = count_words, unit: str = "words", sample: int | None = None, seed: int = 0
) -> StoreStats:
    """Read a store and count. ``count_tokens`` gives the length of each text, in ``unit``.

    With ``sample``, lengths and overlap are measured on at most so many examples a source, drawn by the seed.
    """
    built = read_summary(store.path)
    summary = {source.name: source for source in built.sources}
    sources = []
    for number, info in enumerate(store.sources):
        rows = np.flatnonzero(pc.equal(store.examples.column("source"), number).to_numpy()).astype(np.int64)
        counts = pc.value_counts(store.examples.column("split").take(rows)).to_pylist()
        positives, negatives = (
            pc.mean(pc.list_value_length(store.examples.column(name).take(rows))).as_py() or 0.0
            for name in ("positives", "negatives")
        )
        labels = pc.count_distinct(store.examples.column("label").take(rows)).as_py()
        measured = rows
        if sample is not None and len(rows) > sample:
            measured = np.sort(generator(seed, "stats", info.name).choice(rows, sample, replace=False))
        known = summary[info.name]
        sources.append(
            SourceStats(
                name=info.name,
                kind=info.kind,
                task_type=info.task_type,
                splits={entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda e: str(e["values"]))},
                positives=positives,
                negatives=negatives,
                duplicate_share=known.duplicates / max(known.duplicates + known.examples, 1),
                overlap=_overlap(store, measured),
                labels=labels,
                lengths=_lengths(store, measured, count_tokens),
                images=_images(store, rows),
            )
        )
    counts = (store.items.num_rows, store.examples.num_rows)
    return StoreStats(store.name, str(store.path), unit, *counts, tuple(sources), built.steps)


def _items(store: Store, rows: Rows, *columns: str) -> Rows:
    """The items that examples have in some columns, each once."""
    part = store.examples.take(rows)
    lists = [part[name].to_numpy() if name == "query" else Ragged.from_arrow(part[name]).values for name in columns]
    return np.unique(np.concatenate(lists)).astype(np.int64)


def _images(store: Store, rows: Rows) -> int:
    if not store.has_images:
        return 0
    images = np.unique(store.image_rows(_items(store, rows, "query", "positives", "negatives")))
    return int(np.count_nonzero(images >= 0))


def _lengths(store: Store, rows: Rows, count_tokens: CountTokens) -> tuple[LengthStats, ...]:
    measured = []
    for role, columns in (("query", ("query",)), ("document", ("positives", "negatives"))):
        items = _items(store, rows, *columns)
        if store.has_images:
            items = items[np.asarray([kind != "image" for kind in store.modalities(items)], dtype=np.bool_)]
        if len(items):
            lengths: list[int] = []
            for start in track(range(0, len(items), _BATCH), f"Measuring the {role} side"):
                lengths += count_tokens(store.texts(items[start : start + _BATCH]))
            measured.append(summarise_lengths(role, np.asarray(lengths, dtype=np.int64)))
    return tuple(measured)


def summarise_lengths(role: str, lengths: Rows) -> LengthStats:
    """Mean, quantiles and a histogram over powers of two; ``lengths`` has at least one member."""
    top = max(int(lengths.max()), 1)
    bounds = [2**power for power in range(int(top - 1).bit_length() + 1)]
    places = np.searchsorted(bounds, lengths)
    counts = np.bincount(places, minlength=len(bounds))
    return LengthStats(
        role=role,
        items=len(lengths),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        p95=float(np.quantile(lengths, 0.95)),
        longest=int(lengths.max()),
        histogram=tuple(zip(bounds, counts.tolist(), strict=True)),
    )


def _overlap(store: Store, rows: Rows) -> float | None:
    total, count = 0.0, 0
    for start in range(0, len(rows), _BATCH):
        part = store.examples.select(["query", "positives"]).take(rows[start : start + _BATCH])
        lists = part.column("positives").to_pylist()
        firsts = [positives[0] for positives in lists if positives]
        queries = [q for q, positives in zip(part.column("query").to_pylist(), lists, strict=True) if positives]
        for query, document in zip(store.texts(queries), store.texts(firsts), strict=True):
            words = set(_WORD.findall(query.lower()))
            # A document without a text is an image.
            if words and document:
                total += len(words & set(_WORD.findall(document.lower()))) / len(words)
                count += 1
    return total / count if count else None


@dataclass(frozen=True)
class SampledExample:
    """An example in words."""

    row: int
    source: str
    split: str
    group: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    score: float | None
    label: str | None


def sample_examples(
    store: Store, count: int = 5, source: str | None = None, split: str | None = None, seed: int = 0
) -> list[SampledExample]:
    """Examples drawn by the seed, without repetition, in the order of rows."""
    mask = np.ones(store.examples.num_rows, dtype=np.bool_)
    if source is not None:
        mask &= pc.equal(store.examples.column("source"), store.source_number(source)).to_numpy()
    if split is not None:
        mask &= pc.equal(store.examples.column("split"), split).to_numpy()
    rows = np.flatnonzero(mask)
    if not len(rows):
        splits = ", ".join(sorted(pc.unique(store.examples.column("split")).to_pylist()))
        raise BadInputError("there is no such example in this store", where=str(store.path), hint=f"Splits: {splits}.")
    drawn = np.sort(generator(seed, "sample").choice(rows, min(count, len(rows)), replace=False))
    shown = []
    for row, value in zip(drawn.tolist(), store.examples.take(drawn).to_pylist(), strict=True):
        shown.append(
            SampledExample(
                row=row,
                source=store.sources[value["source"]].name,
                split=value["split"],
                group=value["group"],
                query=store.shown([value["query"]])[0],
                positives=tuple(store.shown(value["positives"])),
                negatives=tuple(store.shown(value["negatives"])),
                score=value["score"],
                label=value["label"],
            )
        )
    return shown
