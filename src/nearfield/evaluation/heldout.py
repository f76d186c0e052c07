"""The held-out split of a data recipe's source as a benchmark task.

Queries are the distinct query items of the split's examples. A document is relevant for a query if *any* example of
the store, of whatever split, names it as a positive of that query, so that a second sense that was sampled as a
distractor never counts as a mistake. Queries that share documents (synonyms with one gloss) are one cluster, the unit
that the statistics resample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import DisjointSet

from nearfield.errors import BadInputError
from nearfield.evaluation.tasks import TYPES, SuiteTask, describe_task, make_task
from nearfield.files import fingerprint
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.evaluation.config import HeldOutTask, OpenStore

K_VALUES = (1, 3, 5, 10, 20, 100)
"""mteb's cut-offs without 1,000, which would cost most of the time of a task with thousands of queries."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Rows:
    """The examples of one source: its example rows, and those of the split that is scored."""

    store: Any
    source: int
    kind: str
    task_type: str
    all: Ints
    held_out: Ints

    def column(self, name: str, rows: Ints) -> list[Any]:
        values: list[Any] = self.store.examples.column(name).take(rows).to_pylist()
        return values

    def items(self, column: str, rows: Ints) -> Ints:
        """The distinct items in a column of some examples."""
        values = self.column(column, rows)
        return np.unique(_flat(values) if column == "positives" else np.array(values, dtype=np.int64))


def heldout_task(config: HeldOutTask, open_store: OpenStore) -> SuiteTask:
    """The task of a held-out split. The store is opened now; texts are read when the task runs.

    Raises :class:`BadInputError` if the source or split is not there, or does not allow the task that is asked for.
    """
    store = open_store(config.data)
    rows = _select(config, store)
    builders = {"retrieval": _retrieval, "graded": _sts, "labelled": _labelled}
    if rows.kind not in builders:
        raise BadInputError(
            f"the source {config.source!r} has examples of kind {rows.kind!r}, which cannot be scored",
            where=str(config.data),
        )
    if config.as_ != "auto" and rows.kind != "labelled":
        raise BadInputError(
            f"'as: {config.as_}' needs labelled examples; the source {config.source!r} has {rows.kind} ones",
            where=str(config.data),
        )
    if (config.reverse or config.metric is not None) and rows.kind != "retrieval":
        raise BadInputError(
            f"'reverse' and 'metric' are for retrieval examples; the source {config.source!r} has {rows.kind} ones",
            where=str(config.data),
        )
    return builders[rows.kind](config, rows)


def _select(config: HeldOutTask, store: Any) -> _Rows:
    names = [source.name for source in store.sources]
    if config.source not in names:
        raise BadInputError(
            f"there is no source {config.source!r}", where=str(config.data), hint=f"Sources: {', '.join(names)}."
        )
    number = names.index(config.source)
    info = store.sources[number]
    of_source = np.flatnonzero(store.examples.column("source").to_numpy() == number).astype(np.int64)
    held_out = np.asarray(store.select(config.source, config.split), dtype=np.int64)
    if held_out.size == 0:
        splits = sorted(set(store.examples.column("split").take(of_source).to_pylist()))
        raise BadInputError(
            f"the source {config.source!r} has no examples in the split {config.split!r}",
            where=str(config.data),
            hint=f"Splits: {', '.join(splits)}.",
        )
    return _Rows(store, number, info.kind, info.task_type, of_source, np.sort(held_out))


def _task_type(rows: _Rows, allowed: str) -> str:
    """The source's own type where it is a form of the allowed one, because prompts are resolved by type."""
    base = TYPES[allowed].base
    source_type = TYPES.get(rows.task_type)
    return rows.task_type if source_type is not None and source_type.base is base else allowed


def _sample(config: HeldOutTask, rows: Ints, limit: int | None, purpose: str) -> Ints:
    if limit is None or limit >= len(rows):
        return rows
    rng = generator(config.seed, "heldout", config.name, purpose)
    return np.sort(rng.choice(rows, size=limit, replace=False))


def _retrieval(config: HeldOutTask, rows: _Rows) -> SuiteTask:
    store = rows.store
    asking, answering = ("positives", "query") if config.reverse else ("query", "positives")
    queries = _sample(config, rows.items(asking, rows.held_out), config.max_queries, "queries")
    gold = rows.items(answering, rows.held_out)
    others = np.setdiff1d(rows.all, rows.held_out)
    pool = np.setdiff1d(rows.items(answering, others), gold)
    distractors = _sample(config, pool, config.distractors, "distractors")
    corpus = np.union1d(gold, distractors)
    relevant = _relevant(store, queries, corpus, config.reverse)
    clusters = query_clusters(relevant, _document_keys(rows, answering))
    sizes = Counter(clusters.values())
    ids = _item_ids(store)
    result = SuiteTask(
        None,
        details={
            "store": store.fingerprint,
            "source": config.source,
            "split": config.split,
            "queries": len(relevant),
            "corpus": len(corpus),
            "relevant_pairs": sum(map(len, relevant.values())),
            "distractors": len(distractors),
            "distractors_asked": config.distractors,
            "clusters": len(sizes),
            "largest_cluster": max(sizes.values()),
        },
    )
    result.clusters["default", config.split] = {ids(query): ids(cluster) for query, cluster in clusters.items()}
    qrels = {ids(query): {ids(document): 1 for document in documents} for query, documents in relevant.items()}

    def load() -> dict[str, Any]:
        query_rows = np.array(sorted(relevant), dtype=np.int64)
        split = {
            "corpus": _dataset(store, corpus, ids, modalities[1]),
            "queries": _dataset(store, query_rows, ids, modalities[0]),
            "relevant_docs": {query: dict(documents) for query, documents in qrels.items()},
            "top_ranked": None,
        }
        return {"default": {config.split: split}}

    modalities = _modality(config, store, queries), _modality(config, store, corpus)
    content = {"qrels": qrels, "corpus": [ids(int(document)) for document in corpus]}
    plain = modalities == ("text", "text")
    task_type = _task_type(rows, "Retrieval" if plain else "Any2AnyRetrieval")
    attributes = {"k_values": K_VALUES} if TYPES[task_type].main_score == "ndcg_at_10" else {}
    category = None if plain else "2".join(_LETTERS[modality] for modality in modalities)
    result.task = _make(config, task_type, fingerprint(content), load, attributes, config.metric, category)
    return result


_LETTERS = {"text": "t", "image": "i", "text+image": "it"}


def _modality(config: HeldOutTask, store: Any, rows: Ints) -> str:
    """The modality of all of these items; :class:`BadInputError` where some are texts and some images."""
    modalities = set(store.modalities(rows)) if store.has_images else {"text"}
    if len(modalities) > 1:
        raise BadInputError(
            f"the source {config.source!r} has items of several kinds on one side ({', '.join(sorted(modalities))}), which no task of "
            "mteb's can hold",
            where=str(config.data),
        )
    return str(modalities.pop()) if modalities else "text"


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


def query_clusters(relevant: dict[int, list[int]], document_keys: dict[int, set[str]]) -> dict[int, int]:
    """Query -> cluster: connected components of queries, their relevant documents and those documents' cluster keys.

    The cluster is named by its smallest query. ``document_keys`` gives the cluster keys of the examples that a
    document is a positive of; where there are none, queries are joined by shared documents alone.
    """
    sets: DisjointSet[int | str] = DisjointSet()
    for documents in relevant.values():
        for document in documents:
            sets.add(document)
            sets.merge(documents[0], document)
            for key in document_keys.get(document, ()):
                sets.add(key)
                sets.merge(document, key)
    first: dict[int | str, int] = {}
    return {query: first.setdefault(sets[relevant[query][0]], query) for query in sorted(relevant)}


def _document_keys(rows: _Rows, answering: str) -> dict[int, set[str]]:
    keys: dict[int, set[str]] = {}
    columns = (rows.column(answering, rows.all), rows.column("cluster", rows.all))
    for documents, cluster in zip(*columns, strict=True):
        if cluster is not None:
            for document in documents if isinstance(documents, list) else [documents]:
                keys.setdefault(document, set()).add(cluster)
    return keys


def _clustered(config: HeldOutTask, rows: _Rows, chosen: Ints, **details: Any) -> SuiteTask:
    """A task without its class yet, whose units are these examples, with the clusters that the data name."""
    keys = rows.column("cluster", chosen)
    about = {"store": rows.store.fingerprint, "source": config.source, "split": config.split}
    result = SuiteTask(None, details={**about, **details})
    result.clusters["default", config.split] = {str(i): key for i, key in enumerate(keys) if key is not None}
    return result


def _sts(config: HeldOutTask, rows: _Rows) -> SuiteTask:
    chosen = _sample(config, rows.held_out, config.max_queries, "pairs")
    store, ids = rows.store, _item_ids(rows.store)
    first = np.array(rows.column("query", chosen), dtype=np.int64)
    second = _flat(rows.column("positives", chosen))
    scores = [float(score) for score in rows.column("score", chosen)]
    result = _clustered(config, rows, chosen, pairs=len(chosen))
    named = result.clusters["default", config.split]
    sizes = Counter(named.get(str(i), f"pair {i}") for i in range(len(chosen)))
    result.details |= {"clusters": len(sizes), "largest_cluster": max(sizes.values())}

    def load() -> dict[str, Any]:
        columns = {"sentence1": store.texts(first), "sentence2": store.texts(second), "score": scores}
        return {config.split: datasets.Dataset.from_dict(columns)}

    content = [[ids(int(a)), ids(int(b)), s] for a, b, s in zip(first, second, scores, strict=True)]
    low, high = min(scores), max(scores)
    attributes = {"min_score": low, "max_score": high if high > low else low + 1}
    result.task = _make(config, _task_type(rows, "STS"), fingerprint(content), load, attributes)
    return result


def _labelled(config: HeldOutTask, rows: _Rows) -> SuiteTask:
    chosen = _sample(config, rows.held_out, config.max_queries, "items")
    store, ids = rows.store, _item_ids(rows.store)
    splits = {config.split: chosen}
    if config.as_ == "zero_shot":
        return _zero_shot(config, rows, chosen)
    clustering = config.as_ == "clustering"
    if not clustering:
        train = np.sort(np.asarray(store.select(config.source, config.train_split), dtype=np.int64))
        if train.size == 0 or config.train_split == config.split:
            raise BadInputError(
                f"the source {config.source!r} has no separate train split {config.train_split!r} to fit a classifier on",
                where=str(config.data),
                hint="Name it under 'train_split', or use 'as: clustering'.",
            )
        splits[config.train_split] = train
    items = {split: np.array(rows.column("query", r), dtype=np.int64) for split, r in splits.items()}
    labels = {split: rows.column("label", r) for split, r in splits.items()}
    numbers = {label: i for i, label in enumerate(sorted({label for column in labels.values() for label in column}))}
    result = _clustered(config, rows, chosen, items=len(chosen), labels=len(numbers))
    images = _modality(config, store, np.concatenate(list(items.values()))) == "image"
    item_name = "image" if images else "sentences" if clustering else "text"
    label_name = "labels" if clustering else "label"

    def load() -> dict[str, Any]:
        data = {
            split: datasets.Dataset.from_dict(
                {
                    item_name: store.images(items[split]) if images else store.texts(items[split]),
                    label_name: [numbers[label] for label in labels[split]],
                }
            )
            for split in splits
        }
        return dict(datasets.DatasetDict(data)) if clustering else {"default": datasets.DatasetDict(data)}

    content = {split: [[ids(int(i)) for i in items[split]], labels[split]] for split in splits}
    attributes: dict[str, Any] = {"train_split": config.train_split}
    if clustering:
        attributes = {"max_fraction_of_documents_to_embed": None}
    if images:
        attributes |= {"input_column_name": "image"}
    allowed = ("Image" if images else "") + ("Clustering" if clustering else "Classification")
    kind = allowed if clustering else _task_type(rows, allowed)
    result.task = _make(config, kind, fingerprint(content), load, attributes)
    return result


def _zero_shot(config: HeldOutTask, rows: _Rows, chosen: Ints) -> SuiteTask:
    """Each image against the names of all labels of the split."""
    store, ids = rows.store, _item_ids(rows.store)
    items, labels = np.array(rows.column("query", chosen), dtype=np.int64), rows.column("label", chosen)
    if _modality(config, store, items) != "image":
        raise BadInputError("'as: zero_shot' is for images", where=str(config.data))
    names = sorted(set(labels))
    texts = [config.template.replace("{label}", name) for name in names]
    result = _clustered(config, rows, chosen, items=len(chosen), labels=len(names))

    def load() -> dict[str, Any]:
        columns = {"image": store.images(items), "label": [names.index(label) for label in labels]}
        return {config.split: datasets.Dataset.from_dict(columns)}

    attributes = {"get_candidate_labels": lambda self: list(texts)}
    content = [[ids(int(item)) for item in items], labels, texts]
    result.task = _make(config, "ZeroShotClassification", fingerprint(content), load, attributes)
    return result


def _make(
    config: HeldOutTask,
    task_type: str,
    content_hash: str,
    load: Callable[[], dict[str, Any]],
    attributes: dict[str, Any] | None = None,
    main_score: str | None = None,
    category: str | None = None,
) -> Any:
    metadata = describe_task(
        config.name,
        task_type,
        f"The split {config.split} of the source {config.source}, held out from training",
        content_hash,
        languages={"default": [config.language]},
        splits=[config.split],
        main_score=main_score,
        category=category,
    )
    return make_task(TYPES[task_type].base, metadata, load, attributes)


def _flat(lists: list[list[int]]) -> Ints:
    return np.array([row for of_example in lists for row in of_example], dtype=np.int64)


def _item_ids(store: Any) -> Callable[[int], str]:
    column = store.items.column("id")
    return lambda row: str(column[int(row)].as_py().hex())


def _dataset(store: Any, rows: Ints, ids: Callable[[int], str], modality: str) -> Any:
    columns: dict[str, Any] = {"id": [ids(int(row)) for row in rows]}
    if "text" in modality:
        columns["text"] = store.texts(rows)
    if "image" in modality:
        columns["image"] = store.images(rows)
    return datasets.Dataset.from_dict(columns)
