"""The tasks of a suite: mteb's official ones, and those over data at hand, such as a held-out split of a data recipe.

The latter are instances of new subclasses of mteb's own classes, so that the scores are mteb's own.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
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
from numpy.typing import NDArray
from scipy.cluster.hierarchy import DisjointSet

from nearfield.errors import BadInputError
from nearfield.files import fingerprint
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.evaluation.config import HeldOutTask, MtebTasks, OpenStore


LOCAL = "local-"

Clusters = dict[tuple[str, str], dict[str, str]]
"""(subset, split) -> unit id -> cluster."""
RetrievalSplit = dict[str, Any]
"""The parts of a split of a retrieval task, as mteb wants them: corpus, queries, relevant_docs, top_ranked."""
Loader = Callable[[], dict[str, Any]]
"""Gives the data of a task: subset -> split -> data."""
Unit = TypeVar("Unit", bound=Hashable)


@dataclass(frozen=True)
class TypeDefaults:
    """mteb's class of the tasks of a type; their main score and category, where no official task says otherwise."""

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
    load: Loader,
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


def retrieval_split(
    queries: Any, corpus: Any, relevant: Mapping[str, Mapping[str, int]], ranked: Any = None
) -> RetrievalSplit:
    """A split of a retrieval task as mteb wants it; what it changes of the judgements is changed of this split alone."""
    return {
        "corpus": corpus,
        "queries": queries,
        "relevant_docs": {query: dict(documents) for query, documents in relevant.items()},
        "top_ranked": None if ranked is None else {query: list(documents) for query, documents in ranked.items()},
    }


def items_table(ids: Sequence[str], letters: str, texts: Callable[[], Any], images: Callable[[], Any]) -> Any:
    """Queries or documents with their ids; ``letters`` say what they are (``t``, ``i``, ``it``), and so what is read."""
    columns = {
        "id": ids,
        **({"text": texts()} if "t" in letters else {}),
        **({"image": images()} if "i" in letters else {}),
    }
    return datasets.Dataset.from_dict(columns)


def shared_clusters(contents: Mapping[Unit, Iterable[Hashable]]) -> dict[Unit, Unit]:
    """Unit -> the first unit that it is connected with by shared content; nothing where none shares any."""
    sets = DisjointSet(contents)
    holder: dict[Hashable, Unit] = {}
    for key, shared in contents.items():
        for content in shared:
            sets.merge(key, holder.setdefault(content, key))
    if sets.n_subsets == len(contents):
        return {}
    first: dict[Unit, Unit] = {}
    return {key: first.setdefault(sets[key], key) for key in contents}


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


# The held-out split of a data recipe's source

K_VALUES = (1, 3, 5, 10, 20, 100)
"""mteb's cut-offs without 1,000, which would cost most of the time of a task with thousands of queries."""
LETTERS = {"text": "t", "image": "i", "text+image": "it"}
"""The modality of an item of a store -> the letters of a task's category."""

Ints = NDArray[np.int64]


def heldout_task(config: HeldOutTask, open_store: OpenStore) -> SuiteTask:
    """The task of a held-out split. The store is opened now; texts are read when the task runs.

    Raises :class:`BadInputError` if the source or split is not there, or does not allow the task that is asked for.
    """
    held = _HeldOut(config, open_store(config.data))
    builders = {"retrieval": _retrieval, "graded": _graded, "labelled": _labelled}
    if held.kind not in builders:
        raise held.error(f"the source {config.source!r} has examples of kind {held.kind!r}, which cannot be scored")
    has = f"the source {config.source!r} has {held.kind} ones"
    if config.as_ != "auto" and held.kind != "labelled":
        raise held.error(f"'as: {config.as_}' needs labelled examples; {has}")
    if (config.reverse or config.metric is not None) and held.kind != "retrieval":
        raise held.error(f"'reverse' and 'metric' are for retrieval examples; {has}")
    return builders[held.kind](held)


class _HeldOut:
    """The examples of one source: the rows of ``all`` of them, and of those of the split that is scored."""

    def __init__(self, config: HeldOutTask, store: Any) -> None:
        self.config, self.store, self._ids = config, store, store.items.column("id")
        names = [source.name for source in store.sources]
        if config.source not in names:
            raise self.error(f"there is no source {config.source!r}", f"Sources: {', '.join(names)}.")
        number = names.index(config.source)
        self.kind, self.task_type = store.sources[number].kind, store.sources[number].task_type
        self.all: Ints = np.flatnonzero(store.examples.column("source").to_numpy() == number).astype(np.int64)
        self.held_out = self.split(config.split)
        if self.held_out.size == 0:
            splits = ", ".join(sorted(set(self.column("split", self.all))))
            raise self.error(
                f"the source {config.source!r} has no examples in the split {config.split!r}", f"Splits: {splits}."
            )

    def error(self, what: str, hint: str | None = None) -> BadInputError:
        """An error about the data recipe or store."""
        return BadInputError(what, where=str(self.config.data), hint=hint)

    def split(self, name: str) -> Ints:
        """The rows of a split's examples."""
        return np.sort(np.asarray(self.store.select(self.config.source, name), dtype=np.int64))

    def sample(self, rows: Ints, limit: int | None, purpose: str) -> Ints:
        """So many of the rows, drawn by the task's seed and name."""
        if limit is None or limit >= len(rows):
            return rows
        rng = generator(self.config.seed, "heldout", self.config.name, purpose)
        return np.sort(rng.choice(rows, size=limit, replace=False))

    def column(self, name: str, rows: Ints) -> list[Any]:
        """The values of a column of some examples."""
        values: list[Any] = self.store.examples.column(name).take(rows).to_pylist()
        return values

    def items(self, name: str, rows: Ints) -> Ints:
        """The items in a column of some examples, in order."""
        values = self.column(name, rows)
        return np.array([i for of in values for i in of] if name == "positives" else values, dtype=np.int64)

    def id(self, item: int) -> str:
        """The id of an item."""
        return str(self._ids[int(item)].as_py().hex())

    def modality(self, items: Ints) -> str:
        """The modality of all of these items; raise :class:`BadInputError` where some are texts and some images."""
        modalities = set(self.store.modalities(items)) if self.store.has_images else {"text"}
        if len(modalities) > 1:
            raise self.error(
                f"the source {self.config.source!r} has items of several kinds on one side ({', '.join(sorted(modalities))}), which no "
                "task of mteb's can hold"
            )
        return str(modalities.pop()) if modalities else "text"

    def type_of(self, allowed: str) -> str:
        """The source's own type where it is a form of the allowed one, because prompts are resolved by type."""
        source_type = TYPES.get(self.task_type)
        return self.task_type if source_type is not None and source_type.base is TYPES[allowed].base else allowed

    def task(
        self,
        task_type: str,
        content: Any,
        load: Loader,
        attributes: Mapping[str, Any],
        main_score: str | None = None,
        category: str | None = None,
    ) -> Any:
        """The task of a type over data that are loaded when it runs; main score and category are the type's where null."""
        metadata = describe_task(
            self.config.name,
            task_type,
            f"The split {self.config.split} of the source {self.config.source}, held out from training",
            fingerprint(content),
            languages={"default": [self.config.language]},
            splits=[self.config.split],
            main_score=main_score,
            category=category,
        )
        return make_task(TYPES[task_type].base, metadata, load, attributes)

    def suite_task(self, task: Any, clusters: Mapping[str, str], details: Mapping[str, Any]) -> SuiteTask:
        """The task with the clusters of its units."""
        about = {"store": self.store.fingerprint, "source": self.config.source, "split": self.config.split}
        return SuiteTask(task, {("default", self.config.split): dict(clusters)}, {**about, **details})

    def clusters(self, rows: Ints) -> dict[str, str]:
        """The clusters that the data name of units that are these examples."""
        return {str(i): key for i, key in enumerate(self.column("cluster", rows)) if key is not None}


def _retrieval(held: _HeldOut) -> SuiteTask:
    """Each distinct query of the split against the split's documents and a sample of the source's others.

    A document is relevant if *any* example of the store, of whatever split, names it as a positive of the query, so that a
    second sense that was sampled as a distractor never counts as a mistake. Queries that share documents (synonyms with one
    gloss) are one cluster, the unit that the statistics resample.
    """
    config, store, ids = held.config, held.store, held.id
    asking, answering = ("positives", "query") if config.reverse else ("query", "positives")
    queries = held.sample(np.unique(held.items(asking, held.held_out)), config.max_queries, "queries")
    gold = np.unique(held.items(answering, held.held_out))
    pool = np.setdiff1d(held.items(answering, np.setdiff1d(held.all, held.held_out)), gold)
    distractors = held.sample(pool, config.distractors, "distractors")
    corpus = np.union1d(gold, distractors)
    relevant = _relevant(store, queries, corpus, config.reverse)
    clusters = query_clusters(relevant, _document_keys(held, answering))
    sizes = Counter(clusters.values())
    qrels = {ids(query): {ids(document): 1 for document in documents} for query, documents in relevant.items()}
    asked = np.array(sorted(relevant), dtype=np.int64)
    modalities = held.modality(queries), held.modality(corpus)

    def table(rows: Ints, modality: str) -> Any:
        return items_table(
            list(map(ids, rows)), LETTERS[modality], lambda: store.texts(rows), lambda: store.images(rows)
        )

    def load() -> dict[str, Any]:
        split = retrieval_split(table(asked, modalities[0]), table(corpus, modalities[1]), qrels)
        return {"default": {config.split: split}}

    plain = modalities == ("text", "text")
    task_type = held.type_of("Retrieval" if plain else "Any2AnyRetrieval")
    attributes = {"k_values": K_VALUES} if TYPES[task_type].main_score == "ndcg_at_10" else {}
    category = None if plain else "2".join(LETTERS[modality] for modality in modalities)
    content = {"qrels": qrels, "corpus": [ids(document) for document in corpus]}
    task = held.task(task_type, content, load, attributes, config.metric, category)
    details = {
        "queries": len(relevant),
        "corpus": len(corpus),
        "relevant_pairs": sum(map(len, relevant.values())),
        "distractors": len(distractors),
        "distractors_asked": config.distractors,
        "clusters": len(sizes),
        "largest_cluster": max(sizes.values()),
    }
    return held.suite_task(task, {ids(query): ids(cluster) for query, cluster in clusters.items()}, details)


def _relevant(store: Any, queries: Ints, corpus: Ints, reverse: bool) -> dict[int, list[int]]:
    """Query -> its relevant documents in the corpus, for queries that have one; ``reverse``: which are positives' queries."""
    known = store.known_positives()
    wanted = np.zeros(store.items.num_rows, dtype=bool)
    if not reverse:
        wanted[corpus] = True
        relevant = {int(query): [int(d) for d in known[int(query)] if wanted[d]] for query in queries}
        return {query: documents for query, documents in relevant.items() if documents}
    wanted[queries] = True
    turned: dict[int, list[int]] = {}
    for document in corpus.tolist():
        for query in known[document].tolist():
            if wanted[query]:
                turned.setdefault(query, []).append(document)
    return dict(sorted(turned.items()))


def query_clusters(relevant: Mapping[int, Sequence[int]], document_keys: Mapping[int, set[str]]) -> dict[int, int]:
    """Query -> the smallest query that it is connected with by relevant documents and those documents' cluster keys.

    ``document_keys`` gives the cluster keys of the examples that a document is a positive of; where there are none, queries
    are joined by shared documents alone.
    """
    contents: dict[int, list[int | str]] = {
        query: [*documents, *(key for document in documents for key in document_keys.get(document, ()))]
        for query, documents in sorted(relevant.items())
    }
    return shared_clusters(contents) or {query: query for query in contents}


def _document_keys(held: _HeldOut, answering: str) -> dict[int, set[str]]:
    keys: dict[int, set[str]] = {}
    for documents, cluster in zip(*(held.column(name, held.all) for name in (answering, "cluster")), strict=True):
        if cluster is not None:
            for document in documents if isinstance(documents, list) else [documents]:
                keys.setdefault(document, set()).add(cluster)
    return keys


def _graded(held: _HeldOut) -> SuiteTask:
    """Pairs with their gold scores."""
    config, store = held.config, held.store
    chosen = held.sample(held.held_out, config.max_queries, "pairs")
    first, second = (held.items(name, chosen) for name in ("query", "positives"))
    scores = [float(score) for score in held.column("score", chosen)]
    clusters = held.clusters(chosen)
    sizes = Counter(clusters.get(str(i), f"pair {i}") for i in range(len(chosen)))

    def load() -> dict[str, Any]:
        columns = {"sentence1": store.texts(first), "sentence2": store.texts(second), "score": scores}
        return {config.split: datasets.Dataset.from_dict(columns)}

    content = [[held.id(a), held.id(b), score] for a, b, score in zip(first, second, scores, strict=True)]
    low, high = min(scores), max(scores)
    attributes = {"min_score": low, "max_score": high if high > low else low + 1}
    task = held.task(held.type_of("STS"), content, load, attributes)
    details = {"pairs": len(chosen), "clusters": len(sizes), "largest_cluster": max(sizes.values())}
    return held.suite_task(task, clusters, details)


def _labelled(held: _HeldOut) -> SuiteTask:
    """Labelled items: a classifier fitted on items of the train split, a clustering, or images against the names of labels."""
    config, store = held.config, held.store
    chosen = held.sample(held.held_out, config.max_queries, "items")
    splits = {config.split: chosen}
    attributes: dict[str, Any] = {}
    if config.as_ == "clustering":
        attributes["max_fraction_of_documents_to_embed"] = None
    elif config.as_ == "auto":
        train = held.split(config.train_split)
        if train.size == 0 or config.train_split == config.split:
            raise held.error(
                f"the source {config.source!r} has no separate train split {config.train_split!r} to fit a classifier on",
                "Name it under 'train_split', or use 'as: clustering'.",
            )
        splits[config.train_split] = train
        attributes["train_split"] = config.train_split
    items = {split: held.items("query", rows) for split, rows in splits.items()}
    labels = {split: held.column("label", rows) for split, rows in splits.items()}
    names = sorted({label for column in labels.values() for label in column})
    images = held.modality(np.concatenate(list(items.values()))) == "image"
    content: Any = {split: [[held.id(item) for item in items[split]], labels[split]] for split in splits}
    if config.as_ == "zero_shot":
        if not images:
            raise held.error("'as: zero_shot' is for images")
        texts = [config.template.replace("{label}", name) for name in names]
        attributes["get_candidate_labels"] = lambda self: list(texts)
        content = [*content[config.split], texts]
    kinds = {"zero_shot": "ZeroShotClassification", "clustering": f"{'Image' if images else ''}Clustering"}
    task_type = kinds.get(config.as_) or held.type_of(f"{'Image' if images else ''}Classification")
    base = TYPES[task_type].base
    column = "image" if images else base.input_column_name
    if images:
        attributes["input_column_name"] = column
    numbers = {name: i for i, name in enumerate(names)}

    def load() -> dict[str, Any]:
        read = store.images if images else store.texts
        data = {
            split: datasets.Dataset.from_dict(
                {column: read(of), base.label_column_name: [numbers[label] for label in labels[split]]}
            )
            for split, of in items.items()
        }
        return {"default": datasets.DatasetDict(data)} if config.as_ == "auto" else dict(data)

    task = held.task(task_type, content, load, attributes)
    return held.suite_task(task, held.clusters(chosen), {"items": len(chosen), "labels": len(names)})
