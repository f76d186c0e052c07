"""Tasks over data at hand: classes made from mteb's own, so that the scores are mteb's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mteb
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskZeroShotClassification,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata

LOCAL = "local-"

Clusters = dict[tuple[str, str], dict[str, str]]
"""(subset, split) -> unit id -> cluster."""
RetrievalSplit = dict[str, Any]
"""What mteb wants of a split of a retrieval task: corpus, queries, relevant_docs, top_ranked."""


@dataclass(frozen=True)
class TypeDefaults:
    """What a task of a type is scored by, where no official task says otherwise."""

    base: type[Any]
    main_score: str
    category: str
    columns: tuple[str, ...]


TYPES: dict[str, TypeDefaults] = {
    "Retrieval": TypeDefaults(AbsTaskRetrieval, "ndcg_at_10", "t2t", ()),
    "Reranking": TypeDefaults(AbsTaskRetrieval, "map_at_1000", "t2t", ()),
    "STS": TypeDefaults(AbsTaskSTS, "cosine_spearman", "t2t", ("sentence1", "sentence2", "score")),
    "Classification": TypeDefaults(AbsTaskClassification, "accuracy", "t2c", ("text", "label")),
    "PairClassification": TypeDefaults(
        AbsTaskPairClassification, "max_ap", "t2t", ("sentence1", "sentence2", "labels")
    ),
    "Clustering": TypeDefaults(AbsTaskClustering, "v_measure", "t2c", ("sentences", "labels")),
    "Any2AnyRetrieval": TypeDefaults(AbsTaskRetrieval, "ndcg_at_10", "t2i", ()),
    "ImageClassification": TypeDefaults(AbsTaskClassification, "accuracy", "i2c", ("image", "label")),
    "ImageClustering": TypeDefaults(AbsTaskClustering, "v_measure", "i2c", ("image", "labels")),
    "ZeroShotClassification": TypeDefaults(AbsTaskZeroShotClassification, "accuracy", "i2t", ("image", "label")),
    "BitextMining": TypeDefaults(AbsTaskBitextMining, "f1", "t2t", ("sentence1", "sentence2")),
}


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
        return str(self.task.metadata.revision).startswith(LOCAL)


def parts_of(task: Any) -> list[Any]:
    """The tasks that an aggregate task (such as CQADupstackRetrieval) is the mean of; otherwise the task itself."""
    return (
        [part for of in task.metadata.tasks for part in parts_of(of)] if isinstance(task, AbsTaskAggregate) else [task]
    )


def official_class(name: str) -> type[Any] | None:
    """The class of an official task, or None if mteb has none of this name."""
    try:
        return type(mteb.get_task(name))
    except KeyError:
        return None


def make_task(
    base: type[Any],
    *,
    name: str,
    task_type: str,
    description: str,
    content_hash: str,
    languages: Mapping[str, Sequence[str]],
    splits: Sequence[str],
    load: Callable[[], dict[str, Any]],
    like: TaskMetadata | None = None,
    attributes: Mapping[str, Any] | None = None,
    main_score: str | None = None,
    category: str | None = None,
) -> Any:
    """An instance of a new subclass of one of mteb's task classes.

    ``load`` returns subset -> split -> data; ``languages`` gives the languages of each subset. ``like`` is the metadata
    of the official task whose main score and category hold here too; ``main_score`` and ``category`` take the place of
    those of the type.
    """
    defaults = TYPES.get(task_type)
    only_default = list(languages) == ["default"]
    category = category or (like.category if like else defaults.category if defaults else None)
    metadata = TaskMetadata(
        name=name,
        type=task_type,
        description=description,
        dataset={"path": f"local/{name}", "revision": LOCAL + content_hash},
        eval_splits=list(splits),
        eval_langs=list(languages["default"]) if only_default else {s: list(langs) for s, langs in languages.items()},
        main_score=main_score or (like.main_score if like else defaults.main_score if defaults else "accuracy"),
        category=category,
        modalities=like.modalities if like else _modalities(category),
    )

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        if self.data_loaded:
            return
        self.dataset = load()
        self.data_loaded = True

    def evaluate_subset(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A clustering draws from the task's generator: fresh for each subset, its score does not depend on the others.
        self.rng_state = random.Random(self.seed)
        return base._evaluate_subset(self, *args, **kwargs)

    body = {"metadata": metadata, "load_data": load_data, "__module__": __name__, **(attributes or {})}
    if issubclass(base, AbsTaskClustering):
        body["_evaluate_subset"] = evaluate_subset
    return type("Local" + "".join(c if c.isalnum() else "_" for c in name), (base,), body)()


def _modalities(category: str | None) -> list[str]:
    """What the items of a task of this category are, those that are asked first."""
    letters = {"t": "text", "i": "image"}
    return list(dict.fromkeys(letters[each] for each in category or "" if each in letters)) or ["text"]
