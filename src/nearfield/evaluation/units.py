"""Scores of single queries, pairs and items, caught while mteb scores a task, and the Parquet files that keep them.

mteb hands every task's predictions to one method when predictions are to be saved; here that method keeps them in
memory, so that nothing is encoded or predicted twice and the kept values are the very ones that mteb scored.
"""

from __future__ import annotations

import heapq
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)

from nearfield.errors import BadInputError
from nearfield.evaluation.config import UNITS_SUFFIX
from nearfield.evaluation.local import SuiteTask
from nearfield.files import atomic_path

TOP_SUFFIX = ".top10.parquet"
METADATA_KEY = b"nearfield"
TOP = 10

UNIT_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("subset", pa.string()),
        ("split", pa.string()),
        ("unit", pa.string()),
        ("id", pa.string()),
        ("cluster", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)
TOP_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("subset", pa.string()),
        ("split", pa.string()),
        ("query_id", pa.string()),
        ("rank", pa.int32()),
        ("doc_id", pa.string()),
        ("score", pa.float64()),
    ]
)

_TREC = {"ndcg": "ndcg_cut_", "map": "map_cut_", "recall": "recall_", "precision": "P_", "hit_rate": "success_"}
_EXTRA_METRICS = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10")
_STS_SCORES = {
    "spearman": "similarity_scores",
    "cosine_spearman": "cosine_scores",
    "manhattan_spearman": "manhattan_distances",
    "euclidean_spearman": "euclidean_distances",
}

NO_PAIRS = (
    "the score is the largest of several ranking scores over all pairs; resampled pairs come twice and bias it, "
    "so no interval is given"
)
NO_CLUSTERING = "resampled items come twice and bias the V-measure upwards, so no interval is given"
NO_BITEXT = (
    "the F1 of a sentence depends on which other sentences were matched to the same one, so the score is no mean over "
    "sentences and no interval is given"
)


@dataclass
class Record:
    """What was kept of one task: rows for the two files and, where no interval can be given, the reason."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in UNIT_SCHEMA.names})
    top: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in TOP_SCHEMA.names})
    reasons: dict[str, str] = field(default_factory=dict)
    """``subset/split`` -> why its units carry no interval."""


class Recorder:
    """Keeps the per-unit scores of one task while mteb evaluates it."""

    def __init__(self, suite_task: SuiteTask) -> None:
        self.suite_task = suite_task
        self.record = Record()
        self._retrieval_scores: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}

    def attach(self) -> None:
        """Listen to the task: mteb calls these two methods while it scores."""
        task = self.suite_task.task
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
        elif isinstance(task, AbsTaskClassification):
            self._keep_classification(predictions, hf_subset, hf_split)
        elif isinstance(task, AbsTaskClustering):
            self._no_interval(hf_subset, hf_split, NO_CLUSTERING)
        else:
            self._no_interval(
                hf_subset, hf_split, f"scores of single units are not kept for {task.metadata.type} tasks"
            )

    def _no_interval(self, subset: str, split: str, reason: str) -> None:
        self.record.reasons[f"{subset}/{split}"] = reason

    def _rows(self, subset: str, split: str, unit: str, metric: str, values: dict[str, float]) -> None:
        clusters = self.suite_task.clusters.get((subset, split), {})
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

    def _keep_retrieval(self, scores: Any, qrels: Any, results: Any, subset: str, split: str) -> None:
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

    def _keep_sts(self, predictions: Any, subset: str, split: str) -> None:
        main = self.suite_task.task.metadata.main_score
        gold = [float(score) for score in self._data(subset, split)["score"]]
        scores = predictions.get(_STS_SCORES.get(main, ""))
        if main == "spearman" and scores is None:
            scores = predictions["cosine_scores"]
        self._rows(subset, split, "pair", "gold", {str(i): score for i, score in enumerate(gold)})
        if scores is None:
            self._no_interval(subset, split, f"the score {main} is no Spearman correlation, so no interval is given")
            return
        self._rows(subset, split, "pair", "prediction", {str(i): score for i, score in enumerate(scores)})

    def _keep_pairs(self, predictions: Any, subset: str, split: str) -> None:
        data = self._data(subset, split)
        labels = data[self.suite_task.task.label_column_name]
        labels = labels[0] if len(data) == 1 else labels
        for metric, values in (("label", labels), ("prediction", predictions["similarity_scores"])):
            self._rows(subset, split, "pair", metric, {str(i): value for i, value in enumerate(values)})
        self._no_interval(subset, split, NO_PAIRS)

    def _keep_bitext(self, predictions: Any, subset: str, split: str) -> None:
        parallel = subset == "parallel"
        for pair, neighbours in predictions.items():
            key = pair if parallel else subset
            data = self._data(subset, split) if not parallel else {}
            gold = data["gold"] if "gold" in data else [(i, i) for i in range(len(neighbours))]
            right = {str(i): float(gold[i][1] == found["corpus_id"]) for i, found in enumerate(neighbours)}
            self._rows(key, split, "sentence", "accuracy", right)
            if self.suite_task.task.metadata.main_score != "accuracy":
                self._no_interval(key, split, NO_BITEXT)

    def _keep_classification(self, predictions: Any, subset: str, split: str) -> None:
        task = self.suite_task.task
        if getattr(task, "is_cross_validation", False):
            self._no_interval(
                subset, split, "the task is cross-validated: its folds share items, so no interval is given"
            )
            return
        labels = np.asarray(self._data(subset, split)[task.label_column_name])
        if labels.ndim != 1 or any(len(run) != len(labels) for run in predictions):
            self._no_interval(subset, split, "the task's items have several labels, so no interval is given")
            return
        right = np.mean([np.asarray(run) == labels for run in predictions], axis=0)
        self._rows(subset, split, "item", "accuracy", {str(i): value for i, value in enumerate(right)})
        if task.metadata.main_score != "accuracy":
            reason = f"the score {task.metadata.main_score} is no mean over items, so no interval is given"
            self._no_interval(subset, split, reason)


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


def write_record(folder: Path, task: str, record: Record, metadata: dict[str, Any]) -> None:
    """Write a task's unit file (always, it carries the metadata) and, for retrieval, the top results."""
    table = pa.table(record.columns, schema=UNIT_SCHEMA)
    text = json.dumps({**metadata, "no_interval": record.reasons}, ensure_ascii=False)
    table = table.replace_schema_metadata({METADATA_KEY: text.encode()})
    with atomic_path(folder / f"{task}{UNITS_SUFFIX}") as aside:
        pq.write_table(table, aside, compression="zstd")
    top = folder / f"{task}{TOP_SUFFIX}"
    if record.top["rank"]:
        with atomic_path(top) as aside:
            pq.write_table(pa.table(record.top, schema=TOP_SCHEMA), aside, compression="zstd")
    else:
        top.unlink(missing_ok=True)


def read_units(folder: Path, task: str) -> tuple[pa.Table, dict[str, Any]]:
    """A task's units and the metadata that were written with them."""
    file = folder / f"{task}{UNITS_SUFFIX}"
    try:
        table = pq.read_table(file)
        metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
    except FileNotFoundError as error:
        raise BadInputError(
            f"the scores of single units of {task} are missing",
            where=str(file),
            hint="Score the model with nearfield eval: other tools keep means only.",
        ) from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise BadInputError(
            "this file of unit scores cannot be read", where=str(file), hint="Score the task again with --overwrite."
        ) from error
    if table.schema.names != UNIT_SCHEMA.names or not isinstance(metadata, dict):
        raise BadInputError("this file has other columns than a file of unit scores", where=str(file))
    return table, metadata
