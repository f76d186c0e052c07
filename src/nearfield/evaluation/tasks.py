"""The tasks of a suite: mteb's official ones, and tasks over data at hand.

The latter are instances of new subclasses of mteb's own classes, so that the scores are mteb's own.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mteb
import numpy as np
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskImageTextPairClassification,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRegression,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
    AbsTaskZeroShotClassification,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.evaluation.config import MtebTasks

LOCAL = "local-"

Clusters = dict[tuple[str, str], dict[str, str]]
"""(subset, split) -> unit id -> cluster."""
RetrievalSplit = dict[str, Any]
"""The parts of a split of a retrieval task, as mteb wants them: corpus, queries, relevant_docs, top_ranked."""


@dataclass(frozen=True)
class TypeDefaults:
    """The main score of a task of a type, where no official task says otherwise."""

    base: type[Any]
    main_score: str
    category: str


TYPES: dict[str, TypeDefaults] = {
    "Retrieval": TypeDefaults(AbsTaskRetrieval, "ndcg_at_10", "t2t"),
    "Reranking": TypeDefaults(AbsTaskRetrieval, "map_at_1000", "t2t"),
    "InstructionRetrieval": TypeDefaults(AbsTaskRetrieval, "ndcg_at_20", "t2t"),
    "InstructionReranking": TypeDefaults(AbsTaskRetrieval, "map_at_1000", "t2t"),
    "STS": TypeDefaults(AbsTaskSTS, "cosine_spearman", "t2t"),
    "Classification": TypeDefaults(AbsTaskClassification, "accuracy", "t2c"),
    "MultilabelClassification": TypeDefaults(AbsTaskMultilabelClassification, "accuracy", "t2c"),
    "Regression": TypeDefaults(AbsTaskRegression, "kendalltau", "t2c"),
    "PairClassification": TypeDefaults(AbsTaskPairClassification, "max_ap", "t2t"),
    "Clustering": TypeDefaults(AbsTaskClustering, "v_measure", "t2c"),
    "Summarization": TypeDefaults(AbsTaskSummarization, "cosine_spearman", "t2t"),
    "BitextMining": TypeDefaults(AbsTaskBitextMining, "f1", "t2t"),
    "Any2AnyRetrieval": TypeDefaults(AbsTaskRetrieval, "ndcg_at_10", "t2i"),
    "Any2AnyMultilingualRetrieval": TypeDefaults(AbsTaskRetrieval, "ndcg_at_10", "t2i"),
    "Any2AnyReranking": TypeDefaults(AbsTaskRetrieval, "map_at_1000", "t2i"),
    "DocumentUnderstanding": TypeDefaults(AbsTaskRetrieval, "ndcg_at_5", "t2i"),
    "VisionCentricQA": TypeDefaults(AbsTaskRetrieval, "accuracy", "it2t"),
    "ImageClassification": TypeDefaults(AbsTaskClassification, "accuracy", "i2c"),
    "ImageClustering": TypeDefaults(AbsTaskClustering, "v_measure", "i2c"),
    "ZeroShotClassification": TypeDefaults(AbsTaskZeroShotClassification, "accuracy", "i2t"),
    "VisualSTS(eng)": TypeDefaults(AbsTaskSTS, "cosine_spearman", "i2i"),
    "VisualSTS(multi)": TypeDefaults(AbsTaskSTS, "cosine_spearman", "i2i"),
    "Compositionality": TypeDefaults(AbsTaskImageTextPairClassification, "accuracy", "i2t"),
}
"""mteb's types of tasks over texts and images. The main score is the one that most official tasks of the type have."""


def columns_of(task: Any) -> tuple[str, ...]:
    """The columns that a task, or a class of tasks, reads of a table; none of retrieval, whose parts are tables of their own."""

    def listed(names: str | Sequence[str]) -> list[str]:
        return [names] if isinstance(names, str) else list(names)

    if _is(task, AbsTaskRetrieval):
        return ()
    if _is(task, AbsTaskSTS):
        return (*(name for names in task.column_names for name in listed(names)), "score")
    if _is(task, AbsTaskPairClassification):
        return (*listed(task.input1_column_name), *listed(task.input2_column_name), task.label_column_name)
    if _is(task, AbsTaskBitextMining):
        return tuple(name for pair in task._DEFAULT_PAIR for name in pair)
    if _is(task, AbsTaskSummarization):
        summaries = (task.human_summaries_column_name, task.machine_summaries_column_name)
        return (task.text_column_name, *summaries, task.relevancy_column_name)
    if _is(task, AbsTaskImageTextPairClassification):
        return (*listed(task.images_column_names), *listed(task.texts_column_names))
    return (*listed(task.input_column_name), task.label_column_name)


def _is(task: Any, kind: type[Any]) -> bool:
    return issubclass(task if isinstance(task, type) else type(task), kind)


@dataclass
class SuiteTask:
    """A task of a suite. ``clusters`` and ``details`` of a local task are complete once its data are loaded."""

    task: Any
    clusters: Clusters = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name that the task's results are filed under."""
        return str(self.task.metadata.name)

    @property
    def is_local(self) -> bool:
        """Whether the data are local, so that the result can never pass for an official one."""
        return is_local(self.task)


def is_local(task: Any) -> bool:
    """Whether a task's data are local."""
    return str(task.metadata.revision).startswith(LOCAL)


def parts_of(task: Any) -> list[Any]:
    """The tasks that an aggregate task (such as CQADupstackRetrieval) is the mean of; otherwise the task itself."""
    return (
        [part for of in task.metadata.tasks for part in parts_of(of)] if isinstance(task, AbsTaskAggregate) else [task]
    )


def splits_of(task: Any, names: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """``subset/split`` and the data of each split that is scored, or of those named."""
    wanted = list(task.eval_splits if names is None else names)
    for key, value in task.dataset.items():
        if key in wanted and not (isinstance(value, Mapping) and set(wanted) & set(value)):
            yield f"default/{key}", value
        elif isinstance(value, Mapping) and key in task.hf_subsets:
            for split in wanted:
                if split in value:
                    yield f"{key}/{split}", value[split]


@functools.cache
def official_class(name: str) -> type[Any] | None:
    """The class of an official task, or None if mteb has none of this name (mteb then looks for like ones: dear, so once)."""
    try:
        return type(mteb.get_task(name))
    except KeyError:
        return None


def describe_task(
    name: str,
    task_type: str,
    description: str,
    content_hash: str,
    *,
    languages: Mapping[str, Sequence[str]] | None = None,
    splits: Sequence[str] = ("test",),
    main_score: str | None = None,
    category: str | None = None,
) -> TaskMetadata:
    """mteb's description of a task over local data.

    ``languages`` gives those of each subset; null is English in the only one. ``main_score`` and ``category`` are those of
    the type where they are null.
    """
    defaults = TYPES.get(task_type)
    languages = languages or {"default": ["eng-Latn"]}
    only_default = list(languages) == ["default"]
    category = category or (defaults.category if defaults else None)
    return TaskMetadata(
        name=name,
        type=task_type,
        description=description,
        dataset={"path": f"local/{name}", "revision": LOCAL + content_hash},
        eval_splits=list(splits),
        eval_langs=list(languages["default"]) if only_default else {s: list(langs) for s, langs in languages.items()},
        main_score=main_score or (defaults.main_score if defaults else "accuracy"),
        category=category,
        modalities=_modalities(category),
    )


def make_task(
    base: type[Any],
    metadata: TaskMetadata,
    load: Callable[[], dict[str, Any]],
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """An instance of a new subclass of one of mteb's task classes; ``load`` returns subset -> split -> data."""

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        if self.data_loaded:
            return
        self.dataset = load()
        self.data_loaded = True

    def evaluate_subset(self: Any, model: Any, data_split: Any, **named: Any) -> Any:
        # Such a task draws from its generators: fresh for each subset, its score does not depend on the others.
        fresh_generators(self)
        limits = ("max_fraction_of_documents_to_embed", "max_document_to_embed")
        if isinstance(self, AbsTaskClustering) and embedded_items(self, data_split) == len(data_split):
            vars(self).update(dict.fromkeys(limits))
        try:
            return base._evaluate_subset(self, model, data_split, **named)
        finally:
            for name in limits:
                vars(self).pop(name, None)

    body = {"metadata": metadata, "load_data": load_data, "__module__": __name__, **(attributes or {})}
    if issubclass(base, AbsTaskClustering | AbsTaskMultilabelClassification):
        body["_evaluate_subset"] = evaluate_subset
    return type("Local" + "".join(c if c.isalnum() else "_" for c in metadata.name), (base,), body)()


def embedded_items(task: Any, data: Any) -> int:
    """How many items of a table a clustering embeds and clusters, by the limits of its class.

    A local task has all of them embedded where its class would draw fewer than there are labels.
    """
    count = len(data)
    drawn = count if task.max_document_to_embed is None else min(count, int(task.max_document_to_embed))
    if task.max_fraction_of_documents_to_embed is not None:
        drawn = min(count, int(task.max_fraction_of_documents_to_embed * count))
    if drawn < count and is_local(task):
        labels = data[task.label_column_name][:]
        if drawn < len({label[0] if isinstance(label, list) and label else str(label) for label in labels}):
            return count
    return drawn


def fresh_generators(task: Any) -> None:
    """Give a task the generators of a new one: what it draws must not depend on what was drawn before in this process.

    mteb hands out the tasks of a benchmark again and again, each time as the last evaluation left them.
    """
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)


def _modalities(category: str | None) -> list[str]:
    """The modality of the items of a task of this category, those that are asked first."""
    letters = {"t": "text", "i": "image"}
    return list(dict.fromkeys(letters[each] for each in category or "" if each in letters)) or ["text"]


def official_tasks(entry: MtebTasks, where: str) -> list[SuiteTask]:
    """The official tasks that an entry of a suite names or filters."""
    try:
        if entry.benchmark is not None:
            tasks = _in_languages(_filtered(_copies(mteb.get_benchmark(entry.benchmark).tasks), entry), entry.languages)
        elif entry.filtered:
            known = mteb.get_tasks(exclude_superseded=True, exclude_private=True)
            tasks = _in_languages(_filtered(known, entry), entry.languages)
        else:
            filters = {"languages": entry.languages, "eval_splits": entry.splits, "hf_subsets": entry.subsets}
            tasks = [mteb.get_task(name, **filters) for name in entry.names]
    except (KeyError, ValueError) as error:
        message = str(error.args[0] if error.args else error).removeprefix("KeyError: ")
        raise BadInputError(f"mteb: {message}", where=where) from error
    if not tasks:
        raise BadInputError(
            f"no task of {entry.benchmark or 'mteb'} is left by types, domains, modalities and languages", where=where
        )
    return [SuiteTask(task) for task in tasks]


def _copies(tasks: Iterable[Any]) -> list[Any]:
    """Copies of the tasks of a benchmark, which mteb hands to all who ask for it: what is changed of one is changed for all."""
    return [copy.deepcopy(task) for task in tasks]


def _filtered(tasks: Iterable[Any], entry: MtebTasks) -> list[Any]:
    """The tasks of the types, domains and modalities that are asked for."""

    def kept(metadata: Any) -> bool:
        return (
            (entry.types is None or metadata.type in entry.types)
            and (entry.domains is None or bool(set(metadata.domains or ()) & set(entry.domains)))
            and (entry.modalities is None or set(metadata.modalities) <= set(entry.modalities))
        )

    return [task for task in tasks if kept(task.metadata)]


def _in_languages(tasks: list[Any], languages: Sequence[str] | None) -> list[Any]:
    """The tasks of a benchmark that have a subset in one of the languages, cut down to those subsets."""
    if languages is None:
        return tasks
    chosen = []
    for task in tasks:
        try:
            chosen.append(task.filter_languages(list(languages)))
        except ValueError:  # mteb's way to say that no subset is left
            continue
    return chosen
