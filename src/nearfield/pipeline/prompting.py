"""Which prompts a run's items are tokenised with, and which of them each row of a plan gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nearfield.encoders.prompts import PromptContract

if TYPE_CHECKING:
    from pathlib import Path

    from nearfield.batching.rows import PlannedRows, Rows
    from nearfield.data.in_context import ExampleSet
    from nearfield.data.in_context_config import InContextConfig
    from nearfield.data.store import Store
    from nearfield.notices import Notice
    from nearfield.pipeline.artifacts import Artifacts
    from nearfield.pipeline.planning import PromptsOfEpoch


@dataclass(frozen=True)
class SourcePrompts:
    """The prompts of a source."""

    query: Sequence[Sequence[str]]
    """[phrasings][1 + sets of examples]: the phrasing alone, then with each set before it."""
    document: Sequence[str]

    @property
    def queries(self) -> list[str]:
        """All of its query prompts."""
        return [prompt for phrasing in self.query for prompt in phrasing]


def example_sets(
    store: Store, names: Sequence[str], split: str, config: InContextConfig | None, seed: int
) -> dict[str, list[ExampleSet]]:
    """The sets of in-context examples of each source that gets some."""
    from nearfield.data.in_context import draw_example_sets

    if config is None:
        return {}
    chosen = names if config.sources is None else [name for name in names if name in config.sources]
    return {name: draw_example_sets(store, name, split, config, seed) for name in chosen}


def source_prompts(contract: PromptContract, sets: Mapping[str, Sequence[ExampleSet]], name: str) -> SourcePrompts:
    """The prompts of a source: its phrasings, for queries with each set of examples before them, too."""
    before = ["", *(examples.text for examples in sets.get(name, ()))]
    query = [[text + phrasing for text in before] for phrasing in contract.of(name, "query")]
    return SourcePrompts(query, contract.of(name, "document"))


def suite_prompts(stages: Artifacts, open_store: Callable[[Path], Store]) -> list[Notice]:
    """What the tasks of the evaluation's suite get that no source was trained for.

    Raises :class:`BadInputError` where a task would get a prompt that the training does not allow.
    """
    from nearfield.evaluation.contract import SavedPrompts, TrainedPrompts, check_prompts, untrained_types
    from nearfield.evaluation.local import parts_of
    from nearfield.evaluation.suite import open_suite

    evaluation, contract = stages.recipe.evaluation, stages.trained_contract
    if evaluation is None:
        return []
    tasks = open_suite(stages.run.checked.suite or evaluation.suite, open_store=open_store)
    parts = [part for task in tasks for part in parts_of(task.task)]
    saved = SavedPrompts(contract.model_prompts, contract.default_prompt_name)
    allowed = TrainedPrompts.of(contract.to_json())
    if evaluation.prompts == "contract":
        hint = "State the prompt under prompts.types, or set evaluation.prompts=as-is."
        check_prompts(saved, allowed, parts, where=str(evaluation.suite), hint=hint)
    return [notice for notices in untrained_types(saved, allowed, parts).values() for notice in notices]


def row_prompts(
    store: Store,
    contract: PromptContract,
    sets: Mapping[str, Sequence[ExampleSet]],
    number: Callable[[str], int],
    config: InContextConfig | None,
    seed: int,
) -> PromptsOfEpoch:
    """A function from the rows of an epoch's plan to their (query, document) prompt numbers, [n] each.

    What a row gets depends on the seed, the epoch, its source and its example alone, not on the batch it is in.
    """
    from nearfield.data.in_context import PromptDraw, forbidden_queries

    draws = {}
    for name in contract.sources:
        prompts = source_prompts(contract, sets, name)
        draws[store.source_number(name)] = PromptDraw(
            name,
            [[number(text) for text in phrasing] for phrasing in prompts.query],
            [number(text) for text in prompts.document],
            [forbidden_queries(examples, store.known_positives()) for examples in sets.get(name, ())],
            0.0 if config is None else config.none,
        )

    def of_rows(rows: PlannedRows, epoch: int) -> tuple[Rows, Rows]:
        query = np.full(len(rows), -1, dtype=np.int64)
        document = query.copy()
        for source in np.unique(rows.source).tolist():
            mine = np.flatnonzero(rows.source == source)
            query[mine], document[mine] = draws[source].draw(rows.example[mine], rows.query[mine], seed, epoch)
        return query, document

    return of_rows
