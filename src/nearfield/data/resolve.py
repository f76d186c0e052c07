"""The second pass of a build: conflicts are resolved, duplicates merged, groups and splits given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.data.collect import Collected
from nearfield.data.config import ColumnSplit, DataConfig, DuplicateGroups, HashSplit, SourceConfig
from nearfield.data.examples import example_digest
from nearfield.data.splits import component_keys, split_of
from nearfield.data.store import EXAMPLES_SCHEMA, WEIGHT, Store
from nearfield.data.writing import TableWriter
from nearfield.errors import BadInputError

Rows = npt.NDArray[np.int64]
_MAX_SPLITS = 64
_SHOWN = 5


@dataclass
class Resolved:
    """What the second pass found out."""

    duplicates: list[int]
    splits: list[dict[str, int]]
    clashes: Rows = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """[pairs, 2]: query and text that was positive and negative."""
    examples_changed: int = 0
    labels: Rows = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """[items, 2]: source and item with several labels."""
    scores: Rows = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    """[pairs, 3]: source and two items with several scores."""
    shared: dict[str, int] = field(default_factory=dict)


class _Resolver:
    """Holds, a number or two an example or item, what is known over all examples; never texts."""

    def __init__(self, config: DataConfig, collected: Collected) -> None:
        self.sources = config.sources
        self.weighted = any(source.weight is not None for source in config.sources)
        self.ids = np.frombuffer(collected.ids, dtype="V16")
        self.count = len(self.ids)
        pairs = collected.positives.array()
        self.positive_keys = np.unique(pairs[:, 0] * self.count + pairs[:, 1])
        self.groups = self._duplicate_groups(collected) if self._any_duplicates() else {}
        self.seen: set[bytes] = set()
        self.group_splits: list[dict[str, str]] = [{} for _ in self.sources]
        self.split_bits: dict[str, int] = {}
        self.item_splits = np.zeros(self.count, dtype=np.uint64)
        self.clashes: list[Rows] = [np.empty(0, dtype=np.int64)]
        self.labels: dict[str, int] = {}
        self.labelled: list[tuple[int, int, int]] = []
        self.graded: list[tuple[int, int, int, float]] = []
        self.result = Resolved([0] * len(self.sources), [{} for _ in self.sources])

    def _any_duplicates(self) -> bool:
        return any(isinstance(source.group, DuplicateGroups) for source in self.sources)

    def _duplicate_groups(self, collected: Collected) -> dict[int, str]:
        ties = collected.ties.array()
        # Every item is asked for: an example without ties (a labelled item) is a group of its own.
        return component_keys(ties, np.arange(self.count, dtype=np.int64), self.ids)

    def batch(self, batch: pa.RecordBatch, table: TableWriter) -> None:
        """Resolve a batch of raw examples and write what remains."""
        clash = self._clashing(batch)
        columns = [batch.column(name).to_pylist() for name in batch.schema.names]
        ends: dict[str, list[int]] = {}
        position = 0
        for values in zip(*columns, strict=True):
            number, query, positives, negatives, score, label, group, cluster, split_key, weight = values
            flags = clash[position : position + len(negatives)]
            position += len(negatives)
            kept = negatives
            if flags.any():
                kept = [row for row, out in zip(negatives, flags.tolist(), strict=True) if not out]
            digest = example_digest(number, query, positives, kept, score, label)
            if digest in self.seen:
                self.result.duplicates[number] += 1
                continue
            self.seen.add(digest)
            self.result.examples_changed += len(kept) < len(negatives)
            source = self.sources[number]
            key = self._group(source, query, group)
            split = self._split(number, source, key, split_key)
            counts = self.result.splits[number]
            counts[split] = counts.get(split, 0) + 1
            ends.setdefault(split, []).extend([query, *positives])
            self._note(number, source, query, positives, score, label)
            weights = (weight,) if self.weighted else ()
            cluster = key if cluster is None else cluster
            table.add(number, query, positives, kept, score, label, key, cluster, split, *weights)
        for split, rows in ends.items():
            self._mark(split, rows)

    def _clashing(self, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """For each negative of the batch, end to end: whether it is a positive of its query anywhere."""
        lists = batch.column("negatives")
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        keys = np.repeat(batch.column("query").to_numpy(), lengths) * self.count + lists.flatten().to_numpy()
        if not len(self.positive_keys):
            return np.zeros(len(keys), dtype=np.bool_)
        places = np.minimum(np.searchsorted(self.positive_keys, keys), len(self.positive_keys) - 1)
        clash: npt.NDArray[np.bool_] = self.positive_keys[places] == keys
        self.clashes.append(np.unique(keys[clash]))
        return clash

    def _group(self, source: SourceConfig, query: int, group: str | None) -> str:
        if isinstance(source.group, DuplicateGroups):
            return self.groups[query]
        if group is not None:
            return group
        identity: bytes = self.ids[query].tobytes()
        return identity.hex()

    def _split(self, number: int, source: SourceConfig, group: str, key: str | None) -> str:
        rule = source.split
        if isinstance(rule, HashSplit):
            split = split_of(group if key is None else key, rule.fractions, rule.seed)
            checked = key is not None
        elif isinstance(rule, ColumnSplit):
            assert key is not None
            split, checked = key, source.group is not None
        else:
            return rule.name
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

    def _mark(self, split: str, rows: Sequence[int]) -> None:
        bit = self.split_bits.setdefault(split, len(self.split_bits))
        if bit >= _MAX_SPLITS:
            raise BadInputError(
                f"there are more than {_MAX_SPLITS} splits", hint="Check the column that names the split."
            )
        self.item_splits[np.asarray(rows, dtype=np.int64)] |= np.uint64(1 << bit)

    def finish(self) -> Resolved:
        keys = np.unique(np.concatenate(self.clashes))
        self.result.clashes = np.stack([keys // max(self.count, 1), keys % max(self.count, 1)], axis=1)
        labelled = np.asarray(self.labelled, dtype=np.int64).reshape(-1, 3)
        self.result.labels = contradictions(labelled[:, :2], labelled[:, 2])
        graded = np.asarray([row[:3] for row in self.graded], dtype=np.int64).reshape(-1, 3)
        self.result.scores = contradictions(graded, np.asarray([row[3] for row in self.graded], dtype=np.float64))
        self.result.shared = self._shared()
        return self.result

    def _shared(self) -> dict[str, int]:
        shared: dict[str, int] = {}
        names = sorted(self.split_bits)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                both = np.uint64((1 << self.split_bits[first]) | (1 << self.split_bits[second]))
                count = int(np.count_nonzero((self.item_splits & both) == both))
                if count:
                    shared[f"{first}+{second}"] = count
        return shared


def shared_between_splits(store: Store) -> dict[str, int]:
    """Items that are query or positive in examples of two splits, by pair of splits; of a store that was cleaned."""
    of_split: dict[str, Rows] = {}
    for split in sorted(pc.unique(store.examples["split"]).to_pylist()):
        part = store.examples.filter(pc.equal(store.examples["split"], split))
        lists = part["positives"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        of_split[split] = np.unique(np.concatenate([part["query"].to_numpy(), lists]))
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
    found: Rows = np.unique(keys[1:][same], axis=0)
    return found


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
