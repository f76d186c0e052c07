"""Planned batches for the trainer of sentence-transformers: one argument, right on several ranks.

    args = SentenceTransformerTrainingArguments(..., batch_sampler=batch_sampler(SingleSourceConfig()))

The trainer's sampler gives batches of one device, and accelerate deals these to the ranks in turn. So a global batch of
the plan is given as one part after another, a part a rank: all ranks are in the same planned batch in every step.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nearfield.batching.config import CommonConfig, SingleSourceConfig
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from nearfield.batching.planner import VectorsOf
    from nearfield.batching.rows import Rows

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
    """What is given to the trainer; it calls it with a data set, or with all of them and their samplers."""

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
    config: CommonConfig
    label_columns: Sequence[str] | None
    seed: int
    vectors: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None
    _read: Any = None
    _planner: Any = None

    def batches(self, epoch: int) -> tuple[Rows, Rows]:
        from nearfield.batching.tables import read_tables

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
    import numpy as np

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
    rows = {}
    for role, numbers in items.items():
        rows[role] = np.zeros(int(numbers.max(initial=-1)) + 1, dtype=np.int64)
        # The first row of an item: the last written stays.
        rows[role][numbers[::-1]] = np.arange(total)[::-1]

    def vectors(role: str, wanted: Rows) -> npt.NDArray[Any]:
        found = np.asarray((queries if role == "query" else documents)[rows[role][wanted]], dtype=np.float32)
        return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))

    return vectors


@dataclass
class PlannerSampler(_Factory):
    """See :func:`batch_sampler`."""

    config: CommonConfig | None = None
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
    config: CommonConfig | None = None,
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
        import numpy as np

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
            order = np.argsort(self.rows, kind="stable")
            found = np.searchsorted(self.rows[order], wanted)
            inside = np.minimum(found, len(order) - 1)
            absent = self.rows[order][inside] != wanted
            result = order[inside]
        else:
            absent, result = wanted >= self.length, wanted
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
        from nearfield.batching.plan import Plan

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
        import numpy as np

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
    from nearfield.batching.files import plan_files

    given = [plans] if isinstance(plans, str | Path) else list(plans)
    return PlanSampler([path for one in given for path in plan_files(Path(one))], rows, world_size)
