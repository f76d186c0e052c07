"""Scores of single queries, pairs and items, caught while mteb scores a task.

mteb hands every task's predictions to one method when predictions are to be saved; here that method keeps them in
memory, so that nothing is encoded or predicted twice and the kept values are the very ones that mteb scored.
"""

from __future__ import annotations

import contextlib
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRegression,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskZeroShotClassification,
)
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from scipy.cluster.hierarchy import DisjointSet

from nearfield.evaluation.estimators import AVERAGE_PRECISION
from nearfield.evaluation.local import SuiteTask
from nearfield.evaluation.results import EXPERIMENT, TOP, TOP_SCHEMA, Record
from nearfield.evaluation.statistics import Floats

_NOT_RIGHT_OR_WRONG = (AbsTaskMultilabelClassification, AbsTaskRegression)
"""Classifications whose items have several labels, or a number: a prediction is not simply right or wrong."""
_TREC = {"ndcg": "ndcg_cut_", "map": "map_cut_", "recall": "recall_", "precision": "P_", "hit_rate": "success_"}
_EXTRA_METRICS = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10")
_STS_SCORES = {
    "spearman": "similarity_scores",
    "cosine_spearman": "cosine_scores",
    "manhattan_spearman": "manhattan_distances",
    "euclidean_spearman": "euclidean_distances",
}

NO_MAXIMUM = "the score {} is the best over all thresholds, chosen on the very pairs that it is measured on, so no interval is given"


class Recorder:
    """Keeps the per-unit scores of one task while mteb evaluates it."""

    def __init__(self, suite_task: SuiteTask) -> None:
        self.suite_task = suite_task
        self.record = Record()
        self._found: dict[tuple[str, str], dict[str, str]] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the task inside: mteb calls these two methods while it scores."""
        task = self.suite_task.task
        self._attach(task)
        try:
            yield
        finally:
            vars(task).pop("_save_task_predictions")
            vars(task).pop("task_specific_scores", None)

    def _attach(self, task: Any) -> None:
        task._save_task_predictions = self._keep
        if isinstance(task, AbsTaskRetrieval):
            own = task.task_specific_scores

            def task_specific_scores(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> Any:
                self._keep_retrieval(scores, qrels, results, hf_subset, hf_split)
                return own(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

            task.task_specific_scores = task_specific_scores

    def _keep(self, predictions: Any, model: Any, folder: Path, hf_split: str, hf_subset: str) -> None:
        task = self.suite_task.task
        if isinstance(task, AbsTaskRetrieval):
            return
        if isinstance(task, AbsTaskSTS):
            self._keep_sts(predictions, hf_subset, hf_split)
        elif isinstance(task, AbsTaskPairClassification):
            self._keep_pairs(predictions, hf_subset, hf_split)
        elif isinstance(task, AbsTaskBitextMining):
            self._keep_bitext(predictions, hf_subset, hf_split)
        elif isinstance(task, AbsTaskZeroShotClassification):
            self._keep_zero_shot(predictions, hf_subset, hf_split)
        elif isinstance(task, AbsTaskClassification) and not isinstance(task, _NOT_RIGHT_OR_WRONG):
            self._keep_classification(predictions, hf_subset, hf_split)
        elif not isinstance(task, AbsTaskClustering | AbsTaskClusteringLegacy):
            self._no_interval(
                hf_subset, hf_split, f"scores of single units are not kept for {task.metadata.type} tasks"
            )

    def _no_interval(self, subset: str, split: str, reason: str) -> None:
        self.record.reasons[f"{subset}/{split}"] = reason

    def _rows(self, subset: str, split: str, unit: str, metric: str, values: dict[str, float]) -> None:
        clusters = self.suite_task.clusters.get((subset, split)) or self._found.get((subset, split), {})
        columns = self.record.columns
        columns["task"] += [self.suite_task.name] * len(values)
        columns["subset"] += [subset] * len(values)
        columns["split"] += [split] * len(values)
        columns["unit"] += [unit] * len(values)
        columns["id"] += list(values)
        columns["cluster"] += [clusters.get(key) for key in values]
        columns["metric"] += [metric] * len(values)
        columns["value"] += [float(value) for value in values.values()]

    def _data(self, subset: str, split: str) -> Any:
        dataset = self.suite_task.task.dataset
        return dataset[subset][split] if subset in dataset else dataset[split]

    def _cluster(self, subset: str, split: str, contents: Mapping[str, Iterable[str]]) -> None:
        """Units that share content (a relevant document, a sentence) are not independent: they become one cluster."""
        if not self.suite_task.clusters.get((subset, split)):
            self._found[subset, split] = shared_clusters(contents)

    def _keep_retrieval(self, scores: Any, qrels: Any, results: Any, subset: str, split: str) -> None:
        relevant = {query: [d for d, grade in qrels.get(query, {}).items() if grade > 0] for query in scores}
        self._cluster(subset, split, relevant)
        main = self.suite_task.task.metadata.main_score
        for metric in dict.fromkeys([main, *_EXTRA_METRICS]):
            values = query_values(metric, scores, qrels, results)
            if values is not None:
                self._rows(subset, split, "query", metric, values)
            elif metric == main:
                self._no_interval(subset, split, f"the score {main} is no mean over queries, so no interval is given")
        top = self.record.top
        for query, documents in results.items():
            best = heapq.nlargest(TOP, documents.items(), key=lambda item: (item[1], item[0]))
            for rank, (document, score) in enumerate(best, start=1):
                row = (self.suite_task.name, subset, split, query, rank, document, float(score))
                for name, value in zip(TOP_SCHEMA.names, row, strict=True):
                    top[name].append(value)

    def _pairs_of_texts(self, subset: str, split: str, data: Any, columns: Sequence[Any]) -> None:
        if all(isinstance(name, str) for name in columns):
            texts = [
                data[name][0] if len(data) == 1 and isinstance(data[name][0], list) else data[name][:]
                for name in columns
            ]
            if all(isinstance(text, str) for column in texts for text in column):
                pairs = {str(i): pair for i, pair in enumerate(zip(*texts, strict=True))}
                self._cluster(subset, split, pairs)

    def _keep_sts(self, predictions: Any, subset: str, split: str) -> None:
        main = self.suite_task.task.metadata.main_score
        data = self._data(subset, split)
        self._pairs_of_texts(subset, split, data, self.suite_task.task.column_names)
        gold = [float(score) for score in data["score"][:]]
        scores = predictions.get(_STS_SCORES.get(main, ""))
        if main == "spearman" and scores is None:
            scores = predictions["cosine_scores"]
        self._rows(subset, split, "pair", "gold", {str(i): score for i, score in enumerate(gold)})
        if scores is None:
            self._no_interval(subset, split, f"the score {main} is no Spearman correlation, so no interval is given")
            return
        self._rows(subset, split, "pair", "prediction", {str(i): score for i, score in enumerate(scores)})

    def _keep_pairs(self, predictions: Any, subset: str, split: str) -> None:
        task = self.suite_task.task
        data = self._data(subset, split)
        labels = data[task.label_column_name]
        labels = np.asarray(labels[0] if len(data) == 1 else labels[:], dtype=np.float64)
        main = task.metadata.main_score
        scores, given = _pair_scores(main, predictions, labels)
        self._pairs_of_texts(subset, split, data, [task.input1_column_name, task.input2_column_name])
        for metric, values in (("label", labels), ("prediction", scores)):
            self._rows(subset, split, "pair", metric, {str(i): value for i, value in enumerate(values)})
        if not given:
            self._no_interval(subset, split, NO_MAXIMUM.format(main))

    def _keep_bitext(self, predictions: Any, subset: str, split: str) -> None:
        main = self.suite_task.task.metadata.main_score
        parallel = subset == "parallel"
        for pair, neighbours in predictions.items():
            key = pair if parallel else subset
            data = self._data(subset, split) if not parallel else {}
            gold = data["gold"] if "gold" in data else [(i, i) for i in range(len(neighbours))]
            right = {str(i): float(gold[i][1] == found["corpus_id"]) for i, found in enumerate(neighbours)}
            self._rows(key, split, "sentence", "accuracy", right)
            self._rows(key, split, "sentence", "gold_match", {str(i): gold[i][1] for i in range(len(neighbours))})
            matches = {str(i): found["corpus_id"] for i, found in enumerate(neighbours)}
            self._rows(key, split, "sentence", "match", matches)
            if main not in ("accuracy", "f1"):
                self._no_interval(key, split, f"the score {main} is no mean over sentences, so no interval is given")

    def _keep_zero_shot(self, predictions: Any, subset: str, split: str) -> None:
        task, data = self.suite_task.task, self._data(subset, split)
        labels = task._normalize_labels(data[task.label_column_name][:], task.get_candidate_labels())
        right = np.argmax(np.asarray(predictions), axis=1) == np.asarray(labels)
        self._rows(subset, split, "item", "accuracy", {str(i): float(value) for i, value in enumerate(right)})
        if task.metadata.main_score != "accuracy":
            reason = f"the score {task.metadata.main_score} is no mean over items, so no interval is given"
            self._no_interval(subset, split, reason)

    def _keep_classification(self, predictions: Any, subset: str, split: str) -> None:
        task = self.suite_task.task
        if getattr(task, "is_cross_validation", False):
            self._no_interval(
                subset, split, "the task is cross-validated: its folds share items, so no interval is given"
            )
            return
        labels = np.asarray(self._data(subset, split)[task.label_column_name][:])
        if labels.ndim != 1 or any(len(run) != len(labels) for run in predictions):
            self._no_interval(
                subset, split, "the task does not predict one label for each item, so no interval is given"
            )
            return
        right = np.stack([np.asarray(run) == labels for run in predictions]).astype(np.float64)
        self._rows(subset, split, "item", "accuracy", {str(i): value for i, value in enumerate(right.mean(axis=0))})
        for number, run in enumerate(right):
            self._rows(subset, split, "item", f"{EXPERIMENT}{number}", {str(i): value for i, value in enumerate(run)})
        if task.metadata.main_score != "accuracy":
            reason = f"the score {task.metadata.main_score} is no mean over items, so no interval is given"
            self._no_interval(subset, split, reason)

    def finish(self, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Take from mteb's result (split -> entries) what no prediction tells: the experiments of a clustering."""
        task = self.suite_task.task
        if not isinstance(task, AbsTaskClustering | AbsTaskClusteringLegacy):
            return
        for split, entries in scores.items():
            for entry in entries:
                subset, runs = str(entry["hf_subset"]), entry.get("v_measures")
                if isinstance(runs, Mapping):
                    unit, values = "experiment", np.mean([list(of) for of in runs.values()], axis=0)
                else:
                    unit, values = "set", np.asarray(runs if runs is not None else [], dtype=np.float64)
                self.record.reasons.pop(f"{subset}/{split}", None)
                if task.metadata.main_score != "v_measure" or len(values) < 2:
                    self._no_interval(subset, split, "the score is not a mean over several clusterings of the task")
                    continue
                self._rows(subset, split, unit, "v_measure", {str(i): value for i, value in enumerate(values)})


def shared_clusters(contents: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Unit -> the first unit that it is connected with by shared content; nothing where none shares any."""
    sets = DisjointSet(contents)
    holder: dict[str, str] = {}
    for key, shared in contents.items():
        for content in shared:
            sets.merge(key, holder.setdefault(content, key))
    if sets.n_subsets == len(contents):
        return {}
    first: dict[str, str] = {}
    return {key: first.setdefault(sets[key], key) for key in contents}


def _pair_scores(main: str, predictions: Any, labels: Floats) -> tuple[Floats, bool]:
    """The similarities that give the main score, high for similar, and whether it is an average precision of them.

    ``max_ap`` is the largest average precision over several similarities; it is that of the one which attains it.
    """
    measures = {
        "similarity": np.asarray(predictions["similarity_scores"], dtype=np.float64),
        "cosine": np.asarray(predictions["cosine_scores"], dtype=np.float64),
        "manhattan": -np.asarray(predictions["manhattan_distances"], dtype=np.float64),
        "euclidean": -np.asarray(predictions["euclidean_distances"], dtype=np.float64),
        "dot": np.asarray(predictions["dot_scores"], dtype=np.float64),
    }
    name = main.removesuffix("_ap")
    if not main.endswith("_ap") or name not in (*measures, "max") or labels.sum() == 0:
        return measures["similarity"], False
    if name == "max":
        name = max(measures, key=lambda measure: AVERAGE_PRECISION.value(labels, measures[measure]))
    return measures[name], True


def query_values(metric: str, scores: Any, qrels: Any, results: Any) -> dict[str, float] | None:
    """A retrieval metric of each query, as pytrec_eval and mteb compute it; None for a metric that is no mean."""
    metric = "recall_at_1" if metric == "accuracy" else metric
    match = re.fullmatch(r"(ndcg|map|recall|precision|hit_rate|mrr)_at_(\d+)", metric)
    if match is None:
        return None
    if match[1] == "mrr":
        return {query: _reciprocal_rank(qrels[query], results[query], int(match[2])) for query in results}
    key = _TREC[match[1]] + match[2]
    if any(key not in of_query for of_query in scores.values()):
        return None
    return {query: float(of_query[key]) for query, of_query in scores.items()}


def _reciprocal_rank(relevant: dict[str, int], documents: dict[str, float], k: int) -> float:
    best = heapq.nlargest(k, documents.items(), key=lambda item: (item[1], item[0]))
    for rank, (document, _) in enumerate(best, start=1):
        if relevant.get(document, 0) > 0:
            return 1 / rank
    return 0.0
