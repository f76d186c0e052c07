"""From a store to plan files: examples as columns, one plan an epoch, the summary of all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nearfield.batching.config import BatchConfig
from nearfield.batching.plan import Lengths, write_plan
from nearfield.batching.planner import VectorsOf
from nearfield.batching.rows import Floats, Lists, PlannedRows, Rows, SourceExamples
from nearfield.batching.summary import count_exceptions, measure_hardness, positives_as_negatives
from nearfield.data.store import Store
from nearfield.files import write_json
from nearfield.mining.negatives import Negatives as MinedNegatives

logger = logging.getLogger("nearfield.pipeline")


class PromptsOfEpoch(Protocol):
    """Which prompts rows get."""

    def __call__(self, rows: PlannedRows, epoch: int) -> tuple[Rows, Rows]:
        """The (query, document) prompt numbers of each row in an epoch."""
        ...


@dataclass(frozen=True)
class Negatives:
    """Negatives that stand in for a source's own: a list for each of its examples, with a teacher's scores if known."""

    items: Lists
    scores: Floats | None = None
    positive_scores: Floats | None = None
    """A teacher's score of each positive of the store, example after example."""
    kept: npt.NDArray[np.bool_] | None = None
    """(n,) the examples that a filter keeps; the lists above have all n."""

    def of_kept(self, store: Store, examples: Rows) -> Negatives:
        """The same for the kept examples alone; ``examples`` are the rows of all n."""
        if self.kept is None:
            return self
        kept = np.flatnonzero(self.kept)

        def values(lists: Lists, scores: Floats | None) -> Floats | None:
            return None if scores is None else scores[lists.positions(kept)]

        positives = arrow_lists(store.examples.take(examples)["positives"])
        return Negatives(
            self.items.take(kept), values(self.items, self.scores), values(positives, self.positive_scores)
        )


@dataclass(frozen=True)
class PlanInputs:
    """What the plans of a run are made from."""

    sources: Sequence[SourceExamples]
    labels: Sequence[tuple[str, str]]
    """(source, label) of each label number."""
    prompts: Mapping[int, tuple[int, int]] | PromptsOfEpoch
    """The (query, document) prompt numbers of each source; or (rows, epoch) -> those of each row."""
    lengths: Lengths
    store: Store
    vectors: VectorsOf | None = None
    generation: int = 0
    """The number of the pool of negatives."""


def read_examples(
    store: Store,
    names: Sequence[str],
    split: str,
    negatives: Mapping[str, Negatives] | None = None,
    *,
    samples: bool = False,
) -> tuple[list[SourceExamples], list[tuple[str, str]]]:
    """The examples of sources as columns, and the (source, label) that each label number means.

    With ``samples`` they know which are of one sample, by the data recipe's ``cluster`` column.
    """
    sources: list[SourceExamples] = []
    labels: list[tuple[str, str]] = []
    numbers: dict[str, int] = {}
    for name in names:
        rows = store.select(name, split)
        mined = (negatives or {}).get(name)
        if mined is not None and mined.kept is not None:
            rows, mined = rows[mined.kept], mined.of_kept(store, rows)
        part = store.examples.take(rows)
        codes = None
        if part["label"].null_count < len(part):
            column = part["label"].combine_chunks()
            known = sorted(set(column.drop_null().to_pylist()))
            place = column.dictionary_encode()
            rank = {label: number + len(labels) for number, label in enumerate(known)}
            of_entry = np.asarray([rank[label] for label in place.dictionary.to_pylist()], dtype=np.int64)
            found = place.indices.fill_null(0).to_numpy()
            codes = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, of_entry[found])
            labels += [(name, label) for label in known]
        scores = part["score"]
        sources.append(
            SourceExamples(
                store.source_number(name),
                name,
                rows,
                part["query"].to_numpy(),
                arrow_lists(part["positives"]),
                arrow_lists(part["negatives"]) if mined is None else mined.items,
                scores=scores.to_numpy() if scores.null_count < len(scores) else None,
                labels=codes,
                positive_scores=None if mined is None else mined.positive_scores,
                negative_scores=None if mined is None else mined.scores,
                samples=np.array(
                    [numbers.setdefault(key, len(numbers)) for key in part["cluster"].to_pylist()], np.int64
                )
                if samples
                else None,
            )
        )
    return sources, labels


def planned_negatives(
    store: Store, examples: Rows, mined: MinedNegatives, explicit: Literal["keep", "replace"]
) -> Negatives:
    """Mined negatives of some examples as the planner takes them; ``keep`` puts the data's own before them.

    The data's own have no teacher's score (not a number) unless they were mined too.
    """
    places = mined.positions(examples)
    lists = Lists(mined.offsets, mined.rows)
    items, scores = lists.take(places), mined.scores[lists.positions(places)].astype(np.float64)
    if explicit == "keep":
        own = arrow_lists(store.examples.take(examples)["negatives"])
        owners = np.concatenate([own.owners(), items.owners()])
        rows = np.concatenate([own.values, items.values])
        both = np.concatenate([np.full(len(own.values), np.nan), scores])
        # Of an item that is both, the first place stays and the score of the mined one.
        order = np.lexsort((np.arange(len(rows)), rows, owners))
        first = np.ones(len(rows), dtype=bool)
        first[1:] = (np.diff(owners[order]) != 0) | (np.diff(rows[order]) != 0)
        twice = np.flatnonzero(~first)
        both[order[twice - 1]] = both[order[twice]]
        stay = np.sort(order[first])
        stay = stay[np.argsort(owners[stay], kind="stable")]
        counts = np.bincount(owners[stay], minlength=len(examples))
        items, scores = Lists.from_counts(counts, rows[stay]), both[stay]
    positives = store.examples.take(mined.examples)["positives"].combine_chunks()
    offsets = positives.offsets.to_numpy().astype(np.int64)
    of_positives = Lists(offsets - offsets[0], np.empty(0, dtype=np.int64))
    positive_scores = mined.positive_scores[of_positives.positions(places)].astype(np.float64)
    kept = mined.kept(examples)
    return Negatives(items, scores, positive_scores, None if kept.all() else kept)


def arrow_lists(column: pa.ChunkedArray) -> Lists:
    """An Arrow column of integer lists."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy().astype(np.int64)
    return Lists(offsets - offsets[0], array.flatten().to_numpy())


def write_plans(
    folder: Path,
    config: BatchConfig,
    inputs: PlanInputs,
    *,
    seed: int,
    epochs: int,
    max_steps: int | None,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a plan for each epoch that the training will reach, and ``summary.json``; return what that holds."""
    planner, known = config.build(), inputs.store.known_positives()
    names = {source.source: source.name for source in inputs.sources}
    steps, summaries = 0, []
    for epoch in range(epochs):
        if max_steps is not None and steps >= max_steps:
            break
        batches = planner.plan(
            inputs.sources, seed, epoch, generation=inputs.generation, known=known, vectors=inputs.vectors
        )
        exceptions = count_exceptions(batches, known, config.needs_samples)
        measured: dict[str, Any] = {
            "exceptions": {**exceptions, "positives_as_negatives": positives_as_negatives(batches, known)}
        }
        if inputs.vectors is not None:
            measured |= measure_hardness(batches, inputs.vectors, seed)
        about = {
            **metadata,
            "seed": seed,
            "epoch": epoch,
            "generation": inputs.generation,
            "batches": config.model_dump(mode="json"),
            "sources": {str(number): name for number, name in names.items()},
            **({"labels": list(inputs.labels)} if inputs.labels else {}),
        }
        path = folder / f"epoch-{epoch:03d}.parquet"
        prompts = inputs.prompts if isinstance(inputs.prompts, Mapping) else partial(inputs.prompts, epoch=epoch)
        summary = write_plan(path, batches, prompts, inputs.lengths, about, names=names, measured=measured)
        summaries.append(summary)
        steps += summary["batches"]
    whole = {"kind": config.kind, "batch_size": config.batch_size, "steps": steps, "epochs": summaries}
    write_json(folder / "summary.json", whole)
    return whole
