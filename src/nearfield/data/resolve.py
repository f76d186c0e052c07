"""The second pass of a build: conflicts are resolved, duplicates merged, groups and splits given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.arrays import Index, Mask, Ragged, Rows
from nearfield.data.collect import Collected, TableWriter
from nearfield.data.items import example_digest
from nearfield.data.store import EXAMPLES_SCHEMA, WEIGHT, Store
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.data.config import DataConfig, SourceConfig

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
