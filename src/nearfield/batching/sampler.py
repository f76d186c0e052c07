"""Planned batches for the trainer of sentence-transformers: one argument, right on several ranks.

    args = SentenceTransformerTrainingArguments(..., batch_sampler=batch_sampler(SingleSourceConfig()))

The trainer's sampler gives batches of one device, and accelerate deals these to the ranks in turn. So a global batch of
the plan is given as one part after another, a part a rank: all ranks are in the same planned batch in every step. A data set,
as sentence-transformers trains on it, is read as the examples of a source.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.arrays import Index, Ragged, Rows, Vectors
from nearfield.batching.config import PlannerSettings, SingleSourceConfig
from nearfield.batching.plan import Plan, plan_files
from nearfield.batching.planner import VectorsOf
from nearfield.batching.streams import SourceExamples
from nearfield.errors import BadInputError

logger = logging.getLogger("nearfield.batching")


class Epochs(Protocol):
    """The global batches of each epoch, as rows of a data set."""

    def batches(self, epoch: int) -> tuple[Rows, Rows]:
        """(rows, offsets [batches + 1]) of an epoch."""
        ...


class PlannedBatches:
    """Batches of one device out of planned global batches; what the sampler does, without torch.

    The number of batches is that of the first epoch, because the trainer asks for it once: a later epoch that has more
    ends there, one that has fewer says so.
    """

    def __init__(self, epochs: Epochs, per_device: int, world_size: int) -> None:
        self.epochs, self.per_device, self.world_size = epochs, per_device, world_size
        self.epoch = 0
        self._length: int | None = None
        self._planned: tuple[int, list[Rows]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.epoch = epoch

    def _whole(self, epoch: int) -> list[Rows]:
        """The global batches of an epoch that all ranks can take part in."""
        if self._planned is None or self._planned[0] != epoch:
            rows, offsets = self.epochs.batches(epoch)
            batches = [rows[start:stop] for start, stop in itertools.pairwise(offsets.tolist())]
            if self.world_size > 1:
                size = self.per_device * self.world_size
                small = [batch for batch in batches if len(batch) != size]
                if small:
                    logger.warning(
                        "%d batches of epoch %d are smaller than %d and cannot be dealt to %d ranks: %d examples are left out",
                        len(small), epoch, size, self.world_size, sum(map(len, small)),
                    )  # fmt: skip
                batches = [batch for batch in batches if len(batch) == size]
            self._planned = (epoch, batches)
        return self._planned[1]

    def __len__(self) -> int:
        if self._length is None:
            self._length = len(self._whole(0))
        return self._length * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        length = len(self) // self.world_size
        batches = self._whole(self.epoch)
        if len(batches) < length:
            logger.warning("epoch %d has %d batches, the first had %d", self.epoch, len(batches), length)
        for batch in batches[:length]:
            if self.world_size == 1:
                yield batch.tolist()
                continue
            for rank in range(self.world_size):
                yield batch[rank * self.per_device : (rank + 1) * self.per_device].tolist()


@cache
def _sampler_class() -> type[Any]:
    """The sampler as sentence-transformers wants it: an instance of its own class."""
    from sentence_transformers.base.sampler import DefaultBatchSampler

    class PlannedBatchSampler(PlannedBatches, DefaultBatchSampler):  # type: ignore[misc]
        def __init__(self, dataset: Any, epochs: Epochs, per_device: int, world_size: int, seed: int) -> None:
            DefaultBatchSampler.__init__(self, dataset, batch_size=per_device, drop_last=True, seed=seed)
            PlannedBatches.__init__(self, epochs, per_device, world_size)

    return PlannedBatchSampler


def _ranks(world_size: int | None) -> int:
    if world_size is not None:
        return world_size
    from accelerate import PartialState

    return int(PartialState().num_processes)


class _Factory:
    """Given to the trainer, which calls it with a data set, or with all of them and their samplers."""

    world_size: int | None

    def epochs(self, datasets: Sequence[Any], batch_size: int, drop_last: bool, labels: Any, seed: int) -> Epochs:
        """The epochs of data sets; batches are global."""
        raise NotImplementedError

    def __call__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        drop_last: bool = False,
        valid_label_columns: Sequence[str] | None = None,
        generator: Any = None,
        seed: int | None = 0,
        batch_samplers: Sequence[Any] | None = None,
    ) -> Any:
        """As sentence-transformers calls ``batch_sampler``, and (with ``batch_samplers``) ``multi_dataset_batch_sampler``."""
        if batch_samplers is not None:
            batch_size, datasets = batch_samplers[0].batch_size, list(dataset.datasets)
        else:
            datasets = [dataset]
        assert batch_size is not None
        if not all(hasattr(one, "column_names") and hasattr(one, "__len__") for one in datasets):
            raise BadInputError(
                "batches are planned over a data set of known length", hint="Load it without streaming=True."
            )
        world = _ranks(self.world_size)
        epochs = self.epochs(datasets, batch_size * world, drop_last, valid_label_columns, seed or 0)
        return _sampler_class()(dataset, epochs, batch_size, world, seed or 0)


@dataclass
class _PlannedEpochs:
    """Epochs that a planner makes as they are asked for."""

    datasets: Sequence[Any]
    config: PlannerSettings
    label_columns: Sequence[str] | None
    seed: int
    vectors: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None
    _read: Any = None
    _planner: Any = None

    def batches(self, epoch: int) -> tuple[Rows, Rows]:
        if self._read is None:
            sources, known = read_tables(self.datasets, self.label_columns)
            vectors = None if self.vectors is None else _vectors_of(sources, *self.vectors)
            self._read, self._planner = (sources, known, vectors), self.config.build()
        sources, known, vectors = self._read
        made = self._planner.plan(sources, self.seed, epoch, known=known, vectors=vectors)
        if not len(made):
            raise BadInputError(f"not one batch of {self.config.batch_size} can be made: {dict(made.dropped)}")
        if made.dropped:
            logger.info("epoch %d: left out: %s", epoch, ", ".join(f"{n:,} {why}" for why, n in made.dropped.items()))
        return made.rows.example, made.offsets


def _vectors_of(sources: Sequence[Any], queries: npt.NDArray[Any], documents: npt.NDArray[Any]) -> VectorsOf:
    total = sum(len(source) for source in sources)
    for name, values in (("query", queries), ("document", documents)):
        if len(values) != total:
            raise BadInputError(f"there are {len(values)} {name} vectors for {total} rows: one a row is wanted")
    items = {
        "query": np.concatenate([source.queries for source in sources]),
        "document": np.concatenate(
            [source.queries if source.labels is not None else source.positives.values for source in sources]
        ),
    }
    rows = {role: Index(numbers) for role, numbers in items.items()}

    def vectors(role: str, wanted: Rows) -> Vectors:
        taken = np.asarray((queries if role == "query" else documents)[rows[role].rows(wanted)], dtype=np.float32)
        return np.asarray(taken / np.maximum(np.linalg.norm(taken, axis=1, keepdims=True), 1e-12))

    return vectors


@dataclass
class PlannerSampler(_Factory):
    """See :func:`batch_sampler`."""

    config: PlannerSettings | None = None
    seed: int | None = None
    vectors: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = field(default=None, repr=False)
    world_size: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The trainer pickles its arguments into each checkpoint: no place for gigabytes of vectors.
        return {**self.__dict__, "vectors": None}

    def epochs(self, datasets: Sequence[Any], batch_size: int, drop_last: bool, labels: Any, seed: int) -> Epochs:
        """Epochs of the planner with the trainer's batch size."""
        config = self.config or SingleSourceConfig(drop_last=drop_last)
        if "batch_size" in config.model_fields_set and config.batch_size != batch_size:
            raise BadInputError(
                f"the planner's batch_size is {config.batch_size}, and the trainer's batches have {batch_size} examples "
                "over all devices",
                hint="Leave batch_size out: it follows from per_device_train_batch_size.",
            )
        values = {name: getattr(config, name) for name in type(config).model_fields}
        values |= {"batch_size": batch_size, "drop_last": config.drop_last or drop_last}
        try:
            config = type(config)(**values)
        except ValueError as error:
            raise BadInputError(f"the planner cannot make batches of {batch_size}: {error}") from error
        return _PlannedEpochs(datasets, config, labels, seed if self.seed is None else self.seed, self.vectors)


def batch_sampler(
    config: PlannerSettings | None = None,
    *,
    seed: int | None = None,
    vectors: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
    world_size: int | None = None,
) -> PlannerSampler:
    """Planned batches for ``SentenceTransformerTrainingArguments(batch_sampler=...)``.

    ``config`` picks the planner; none means shuffled batches without duplicates that follow the trainer's ``drop_last``.
    The batch size is the trainer's: per device x ranks. ``seed`` is the trainer's unless given. ``vectors``: a teacher's
    vectors of each row's query and positive, two arrays (rows, d), for the kinds that need them. ``world_size`` is asked of
    accelerate; give 1 with ``split_batches``, where a batch is cut for the ranks. For several data sets give the same
    object as ``multi_dataset_batch_sampler``, too: then all ranks are in one data set in every step.
    """
    return PlannerSampler(config, seed, vectors, world_size)


@dataclass
class _FollowedEpochs:
    """Epochs that were written before."""

    plans: Sequence[Any]
    batch_size: int
    rows: Rows | None
    length: int

    def batches(self, epoch: int) -> tuple[Rows, Rows]:
        if epoch >= len(self.plans):
            raise BadInputError(
                f"the training is in epoch {epoch + 1}, and {len(self.plans)} are planned",
                where=str(self.plans[-1].path),
                hint="Plan more epochs, or lower num_train_epochs.",
            )
        plan = self.plans[epoch]
        made = plan.epoch()
        largest = int(made.sizes.max(initial=0))
        if largest != self.batch_size:
            raise BadInputError(
                f"the plan has batches of {largest}, and the trainer's have {self.batch_size} examples over all devices",
                where=str(plan.path),
                hint=f"Set per_device_train_batch_size so that times the number of devices it is {largest}.",
            )
        wanted = made.rows.example
        if self.rows is not None:
            result = Index(self.rows).find(wanted)
        else:
            result = np.where(wanted < self.length, wanted, -1)
        absent = result < 0
        if absent.any():
            raise BadInputError(
                f"the plan names example {int(wanted[absent][0])}, which is not in the data set of {self.length:,} rows",
                where=str(plan.path),
                hint="Give rows=: for each row of the data set, the example that it is.",
            )
        return result, made.offsets


@dataclass
class PlanSampler(_Factory):
    """See :func:`follow_plans`."""

    paths: Sequence[Path]
    rows: Rows | None = field(default=None, repr=False)
    world_size: int | None = None

    def epochs(self, datasets: Sequence[Any], batch_size: int, drop_last: bool, labels: Any, seed: int) -> Epochs:
        """The epochs of the plan files."""
        length = sum(len(dataset) for dataset in datasets)
        if self.rows is not None and len(self.rows) != length:
            logger.info(
                "A data set of %d rows is not the planned one of %d: its batches are in order", length, len(self.rows)
            )
            return _InOrder(length, batch_size)
        return _FollowedEpochs([Plan(path) for path in self.paths], batch_size, self.rows, length)


@dataclass
class _InOrder:
    """Batches of a data set that no plan is of (for evaluation, say)."""

    length: int
    batch_size: int

    def batches(self, epoch: int) -> tuple[Rows, Rows]:
        edges = np.append(np.arange(0, self.length, self.batch_size), self.length)
        return np.arange(self.length), edges


def follow_plans(
    plans: str | Path | Sequence[str | Path], *, rows: Rows | None = None, world_size: int | None = None
) -> PlanSampler:
    """Batches that follow plan files, for ``SentenceTransformerTrainingArguments(batch_sampler=...)``.

    ``plans`` is a run's folder, its ``plan`` folder, a file, or files in the order of epochs. The plan's examples are rows
    of the data set; where they are not (the data set is a split of a store, say), ``rows`` gives the example that each row
    of the data set is, and a data set of another length (for evaluation) gets batches in its own order. ``world_size``: see
    :func:`batch_sampler`.
    """
    given = [plans] if isinstance(plans, str | Path) else list(plans)
    return PlanSampler([path for one in given for path in plan_files(Path(one))], rows, world_size)


# Data sets as sources

NO_ITEMS = ("dataset_name",)
LABEL_COLUMNS = ("label", "labels", "score", "scores")


def read_tables(
    datasets: Sequence[Any], label_columns: Sequence[str] | None = None
) -> tuple[list[SourceExamples], Ragged]:
    """The sources that data sets are, and what is a known positive of what in all of them together.

    Of each the first column that is no label is the query, the second its positive, the others are negatives; one column
    beside a label makes labelled examples, and two beside a label graded pairs. Examples are numbered over all data sets.
    Equal values are the same item, in whatever column.
    """
    label_columns = label_columns or LABEL_COLUMNS
    tables: list[pa.Table] = [dataset.with_format("arrow")[:] for dataset in datasets]
    columns_of_all, layout = [], []
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
        columns_of_all += columns
    codes = _item_numbers(columns_of_all)
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


def _item_numbers(columns: Sequence[pa.ChunkedArray]) -> list[Rows]:
    """The item number of each value of each column; -1 for none."""
    chunks = [chunk for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).dictionary_encode()
    if len({len(chunk.dictionary) for chunk in encoded.chunks}) > 1:
        # Arrow gives all chunks the dictionary of all; to unify equal ones would cost as much as to encode.
        encoded = encoded.unify_dictionaries()
    numbers = [chunk.indices.fill_null(-1).to_numpy().astype(np.int64) for chunk in encoded.chunks]
    joined = np.concatenate([np.empty(0, dtype=np.int64), *numbers])
    return np.split(joined, np.cumsum([len(column) for column in columns])[:-1])


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
        return SourceExamples(
            number, name, examples, columns[0], Ragged.empty(count), Ragged.empty(count), labels=labels
        )
    scores = None if label is None else pc.cast(label, pa.float64()).to_numpy()
    if len(columns) == 2:
        negatives = Ragged.empty(count)
    else:
        stacked = np.stack(columns[2:], axis=1)
        negatives = Ragged.from_lengths((stacked >= 0).sum(axis=1), stacked[stacked >= 0])
    return SourceExamples(number, name, examples, columns[0], Ragged.single(columns[1]), negatives, scores=scores)


def _known_positives(sources: Sequence[SourceExamples]) -> Ragged:
    """Positives of queries that occur several times; those of the others are their rows' own."""
    none = np.empty(0, dtype=np.int64)
    pairs = [source for source in sources if source.scores is None and source.labels is None]
    queries = np.concatenate([none, *(source.queries for source in pairs)])
    positives = np.concatenate([none, *(source.positives.values for source in pairs)])
    size = int(queries.max(initial=-1)) + 1
    several = np.bincount(queries, minlength=size)[queries] > 1
    return Ragged.from_pairs(queries[several], positives[several], size)
