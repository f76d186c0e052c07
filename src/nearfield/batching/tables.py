"""A Hugging Face data set, as sentence-transformers trains on it, read as the examples of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.batching.rows import Lists, Rows, SourceExamples
from nearfield.data.store import KnownPositives
from nearfield.errors import BadInputError

NO_ITEMS = ("dataset_name",)
LABEL_COLUMNS = ("label", "labels", "score", "scores")


def read_tables(
    datasets: Sequence[Any], label_columns: Sequence[str] | None = None
) -> tuple[list[SourceExamples], KnownPositives]:
    """The sources that data sets are, and what is a known positive of what in all of them together.

    Of each the first column that is no label is the query, the second its positive, the others are negatives; one column
    beside a label makes labelled examples, and two beside a label graded pairs. Examples are numbered over all data sets.
    Equal values are the same item, in whatever column.
    """
    label_columns = label_columns or LABEL_COLUMNS
    tables: list[pa.Table] = [dataset.with_format("arrow")[:] for dataset in datasets]
    chunks, layout = [], []
    for number, table in enumerate(tables):
        names = [name for name in table.column_names if name not in NO_ITEMS]
        label = next((name for name in label_columns if name in names), None)
        items = [name for name in names if name != label]
        if not items or (len(items) == 1 and label is None):
            raise BadInputError(
                f"data set {number} has the columns {', '.join(table.column_names)}; batches are made of two columns of "
                "items or more, or of one and a label"
            )
        columns = [_as_strings(table[name]) for name in items]
        for name, column in zip(items[:2], columns[:2], strict=True):
            if column.null_count:
                raise BadInputError(f"the column {name!r} has {column.null_count} rows without a value")
        layout.append((table, label, len(items)))
        chunks += columns
    codes = _encode(chunks)
    sources: list[SourceExamples] = []
    first, place = 0, 0
    for number, (table, label, width) in enumerate(layout):
        names = table.column_names
        name = str(table["dataset_name"][0]) if "dataset_name" in names and len(table) else str(number)
        mine = codes[place : place + width]
        sources.append(_source(number, name, first, table[label] if label else None, mine))
        first, place = first + len(table), place + width
    return sources, _known_positives(sources)


def _as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values by which items can be compared: texts as they are, anything else by a hash of what it prints as."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_string())
    parts = []
    for chunk in column.chunks:
        values = chunk.to_pylist()
        hashes = [None if v is None else f"\0{hashlib.blake2b(repr(v).encode()).hexdigest()}" for v in values]
        parts.append(pa.array(hashes, pa.large_string()))
    return pa.chunked_array(parts, pa.large_string())


def _encode(columns: Sequence[pa.ChunkedArray]) -> list[Rows]:
    """The item number of each value of each column; -1 for none."""
    chunks = [chunk for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).dictionary_encode()
    if len({len(chunk.dictionary) for chunk in encoded.chunks}) > 1:
        # Arrow gives all chunks the dictionary of all; to unify equal ones would cost as much as to encode.
        encoded = encoded.unify_dictionaries()
    parts = [chunk.indices.fill_null(-1).to_numpy().astype(np.int64) for chunk in encoded.chunks]
    found, place = [], 0
    for column in columns:
        count = column.num_chunks
        found.append(np.concatenate([np.empty(0, dtype=np.int64), *parts[place : place + count]]))
        place += count
    return found


def _source(
    number: int, name: str, first: int, label: pa.ChunkedArray | None, columns: Sequence[Rows]
) -> SourceExamples:
    count = len(columns[0])
    examples = np.arange(first, first + count, dtype=np.int64)
    if len(columns) == 1:
        assert label is not None
        values = label.combine_chunks().dictionary_encode()
        labels = values.indices.fill_null(-1).to_numpy().astype(np.int64)
        # Another data set's labels are other labels.
        labels = np.where(labels >= 0, labels + (number << 40), -1)
        return SourceExamples(number, name, examples, columns[0], Lists.empty(count), Lists.empty(count), labels=labels)
    scores = None if label is None else pc.cast(label, pa.float64()).to_numpy()
    if len(columns) == 2:
        negatives = Lists.empty(count)
    else:
        stacked = np.stack(columns[2:], axis=1)
        negatives = Lists.from_counts((stacked >= 0).sum(axis=1), stacked[stacked >= 0])
    return SourceExamples(number, name, examples, columns[0], Lists.single(columns[1]), negatives, scores=scores)


def _known_positives(sources: Sequence[SourceExamples]) -> KnownPositives:
    """Positives of queries that occur several times; those of the others are their rows' own."""
    none = np.empty(0, dtype=np.int64)
    pairs = [source for source in sources if source.scores is None and source.labels is None]
    queries = np.concatenate([none, *(source.queries for source in pairs)])
    positives = np.concatenate([none, *(source.positives.values for source in pairs)])
    size = int(queries.max(initial=-1)) + 1
    several = np.bincount(queries, minlength=size)[queries] > 1
    span = int(positives.max(initial=0)) + 1
    joined = np.unique(queries[several] * span + positives[several])
    offsets = np.searchsorted(joined, np.arange(size + 1, dtype=np.int64) * span)
    return KnownPositives(offsets.astype(np.int64), joined % span)
