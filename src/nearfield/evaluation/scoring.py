"""One task scored by mteb: its data are checked before, and the scores of single queries, pairs and items kept meanwhile.

mteb hands every task's predictions to one method when predictions are to be saved; here that method keeps them in memory,
so that nothing is encoded or predicted twice and the kept values are the very ones that mteb scored.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRegression,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
    AbsTaskZeroShotClassification,
)
from mteb.results import TaskResult

from nearfield.errors import BadInputError, Notice, say
from nearfield.evaluation.encoder import exact_distances
from nearfield.evaluation.results import EXPERIMENT, TOP, TOP_SCHEMA, Record
from nearfield.evaluation.scores import AVERAGE_PRECISION
from nearfield.evaluation.statistics import Floats
from nearfield.evaluation.tasks import (
    SuiteTask,
    embedded_items,
    fresh_generators,
    is_local,
    shared_clusters,
    splits_of,
)


def score_task(encoder: Any, task: Any, prediction_folder: Path | None = None) -> TaskResult:
    """Load a task's data, check them, and have mteb score ``encoder`` on them.

    Raises :class:`BadInputError` for data that cannot be scored.
    """
    if not task.data_loaded:
        fresh_generators(task)
    task.load_data()
    check_task(task)
    read_columns_whole(task)
    with exact_distances(encoder):
        scored = mteb.evaluate(
            encoder,
            task,
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": 256, "show_progress_bar": False},
            prediction_folder=prediction_folder,
            show_progress_bar=False,
        )
    if scored.exceptions:
        raise RuntimeError(scored.exceptions[0].exception)
    result = scored.task_results[0]
    by_split = scores_by_split(result)
    undefined = [f"{subset}/{split}" for split, of in by_split.items() for subset, s in of.items() if not _finite(s)]
    if undefined:
        say(
            Notice(
                "score-undefined",
                f"the score {task.metadata.main_score} of {', '.join(undefined[:_PLACES])} is no number: it is not defined where "
                "all judgements, or all that the model gives, are alike",
                "Look at the data, and at the model's vectors.",
            )
        )
    return result


def scores_by_split(result: TaskResult, metric: str = "main_score") -> dict[str, dict[str, float]]:
    """Split -> subset -> score of a result, where it has a number for the metric."""
    return {
        split: {
            str(entry["hf_subset"]): float(value)
            for entry in entries
            if isinstance(value := entry.get(metric), int | float) and not isinstance(value, bool)
        }
        for split, entries in result.scores.items()
    }


def mean_over_splits(by_split: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Subset -> score from split -> subset -> score; a subset that is scored on several splits gets their mean."""
    values: dict[str, list[float]] = {}
    for scores in by_split.values():
        for subset, score in scores.items():
            values.setdefault(subset, []).append(score)
    return {subset: sum(of) / len(of) for subset, of in values.items()}


# Data before they are scored

_PLACES = 3


def check_task(task: Any) -> None:
    """Look at a task's loaded data: say what its score will leave out, and raise :class:`BadInputError` for labels that its
    type does not document."""
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    places = list(splits_of(task))
    # The items that a classifier learns from are checked as its test items are.
    learnt = splits_of(task, [task.train_split]) if isinstance(task, AbsTaskClassification) else ()
    for place, data in dict([*learnt, *places]).items():
        _check_labels(task, place, data)
    for notice in _left_out(task, places):
        say(notice)


def _check_labels(task: Any, place: str, data: Any) -> None:
    values: Iterable[Any]
    name, where = task.metadata.name, f"{task.metadata.name}, {place}"
    if isinstance(task, AbsTaskPairClassification):
        column = task.label_column_name
        values = (label for label in _whole(data, column) if _number(label) not in (0, 1))
        _refuse(values, column, "0 (unlike) or 1 (alike)", where)
    elif isinstance(task, AbsTaskZeroShotClassification):
        known = task.get_candidate_labels()
        allowed = {*range(len(known)), *known}
        words = f"a number from 0 to {len(known) - 1}, or one of the {len(known)} candidate labels"
        values = (label for label in data[task.label_column_name][:] if label not in allowed)
        _refuse(values, task.label_column_name, words, where)
    elif isinstance(task, AbsTaskSTS) and is_local(task):
        _refuse(_beyond(data["score"][:], task), "score", _range(task), where, _STATED)
    elif isinstance(task, AbsTaskSummarization) and is_local(task):
        column = task.relevancy_column_name
        values = [score for scores in data[column][:] for score in scores]
        _refuse(_beyond(values, task), column, _range(task), where, _STATED)
    elif isinstance(task, AbsTaskMultilabelClassification):
        column = task.label_column_name
        _refuse((label for label in data[column][:] if not isinstance(label, list)), column, "a list of labels", where)
    elif isinstance(task, AbsTaskRegression):
        values = (value for value in data[task.label_column_name][:] if not _finite(value))
        _refuse(values, task.label_column_name, "a finite number", where)
    elif isinstance(task, AbsTaskClassification):
        values = (label for label in data[task.label_column_name][:] if isinstance(label, float) and label % 1 != 0)
        _refuse(values, task.label_column_name, "a class: a text or a whole number", where)
    elif isinstance(task, AbsTaskRetrieval) and not any(data["relevant_docs"].values()):
        raise BadInputError(f"no query of {name} has a judgement", where=where)


_STATED = "State min_score and max_score in meta.json where the scale is another one."


def _whole(data: Any, column: str) -> Sequence[Any]:
    """The values of a column, also of a table that holds all of them in its only row."""
    values: Sequence[Any] = data[column][:]
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _number(value: Any) -> float | None:
    """A number as mteb reads it, which may stand there as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _beyond(values: Iterable[Any], task: Any) -> Iterator[Any]:
    low, high = task.min_score, task.max_score
    return (value for value in values if not (_finite(value) and low <= value <= high))


def _range(task: Any) -> str:
    return f"a number from {task.min_score:g} to {task.max_score:g}"


def _refuse(bad: Iterable[Any], column: str, wanted: str, where: str, hint: str | None = None) -> None:
    """Raise where a label is bad, with the number of such labels and the commonest of them."""
    wrong = Counter(repr(value) for value in bad)
    if wrong:
        shown = ", ".join(value for value, _ in wrong.most_common(_PLACES))
        count = wrong.total()
        raise BadInputError(
            f"{count:,} {'value' if count == 1 else 'values'} of the column {column!r} "
            f"{'is' if count == 1 else 'are'} not {wanted}: {shown}{', …' if len(wrong) > _PLACES else ''}",
            where=where,
            hint=hint,
        )


def _left_out(task: Any, places: Sequence[tuple[str, Any]]) -> Iterator[Notice]:
    """Notices about data of a task that its score leaves out."""
    if isinstance(task, AbsTaskRetrieval):
        yield from _queries_left_out(places)
    elif isinstance(task, AbsTaskClustering):
        yield from _items_left_out(task, places)
    elif isinstance(task, AbsTaskMultilabelClassification) and task.max_eval_samples is not None:
        most = task.max_eval_samples
        drawn = [(place, most, len(data)) for place, data in places if len(data) > most]
        if drawn:
            yield _sampled(drawn, "scores", f"mteb's max_eval_samples = {most}")
    if isinstance(task, AbsTaskClustering | AbsTaskClusteringLegacy):
        yield from _same_labels(task, places)


def _queries_left_out(places: Sequence[tuple[str, Any]]) -> Iterator[Notice]:
    unjudged, without, unranked = [], [], []
    for place, data in places:
        judged, ranked = data["relevant_docs"], data["top_ranked"]
        queries = data["queries"]["id"][:]
        asked = [query for query in queries if judged.get(query)]
        unjudged.append((place, len(queries) - len(asked), len(queries)))
        without.append((place, sum(max(judged[query].values()) <= 0 for query in asked), len(queries)))
        if ranked is not None:
            unranked.append((place, sum(not ranked.get(query) for query in asked), len(queries)))
    rules = (
        (unjudged, "queries-without-judgements", "queries have no judgement and are left out of the score", None),
        (without, "queries-without-relevant", "queries have no relevant document and score 0", None),
        (unranked, "queries-without-candidates", "queries have no document to rank", "Give each query its top_ranked."),
    )
    for counts, code, words, hint in rules:
        missing = [(place, count, total) for place, count, total in counts if count]
        if missing:
            yield Notice(code, f"{_counted(missing)} {words}", hint)


def _counted(places: Sequence[tuple[str, int, int]]) -> str:
    """``12 of 300``, of several places together, with the places where these are not the only one."""
    count, total = sum(n for _, n, _ in places), sum(n for _, _, n in places)
    named = [place for place, _, _ in places]
    if len(named) == 1 and named[0].startswith("default/"):
        return f"{count:,} of {total:,}"
    more = f" and {len(named) - _PLACES} more" if len(named) > _PLACES else ""
    return f"({', '.join(named[:_PLACES])}{more}) {count:,} of {total:,}"


def _items_left_out(task: Any, places: Sequence[tuple[str, Any]]) -> Iterator[Notice]:
    drawn = [(place, embedded_items(task, data), len(data)) for place, data in places]
    cut = [(place, count, total) for place, count, total in drawn if count < total]
    if cut:
        share, most = task.max_fraction_of_documents_to_embed, task.max_document_to_embed
        why = (
            f"max_fraction_of_documents_to_embed = {share:g}"
            if share is not None
            else f"max_document_to_embed = {most}"
        )
        yield _sampled(cut, "clusters", f"mteb's {why}")
    bare = [(place, _without_label(data[task.label_column_name][:]), len(data)) for place, data in places]
    missing = [(place, count, total) for place, count, total in bare if count]
    if missing:
        yield Notice(
            "items-without-label",
            f"{_counted(missing)} items have the label -1, which mteb leaves out of the clustering",
        )


def _sampled(places: Sequence[tuple[str, int, int]], does: str, why: str) -> Notice:
    return Notice("sampled", f"the task {does} {_counted(places)} items that are drawn ({why})")


def _without_label(labels: Sequence[Any]) -> int:
    first = [label[0] if isinstance(label, list) and label else label for label in labels]
    # Beside texts mteb turns -1 into a text, which it keeps.
    return 0 if any(isinstance(label, str) for label in first) else sum(label == -1 for label in first)


def _same_labels(task: Any, places: Sequence[tuple[str, Any]]) -> Iterator[Notice]:
    """Sets whose items all have one label, or each its own: nearly any clustering of them is perfect."""
    trivial = []
    for place, data in places:
        labels = data[task.label_column_name][:]
        sets = (
            labels if isinstance(task, AbsTaskClusteringLegacy) and task.metadata.modalities == ["text"] else [labels]
        )
        same = sum(len(np.unique([str(label) for label in each])) in (1, len(each)) for each in sets)
        if same:
            trivial.append((place, same, len(sets)))
    if trivial:
        yield Notice(
            "trivial-clusters",
            f"{_counted(trivial)} sets of items have one label, or as many labels as items: nearly any clustering of them scores 1",
        )


def read_columns_whole(task: Any) -> None:
    """From now on, hand the task's methods the values of a column instead of a view of it: the numbers stay the same.

    Ten experiments with seven metrics read the labels of a test set some hundred times. Tasks of other types read once.
    """
    if not isinstance(task, AbsTaskClassification) or "_calculate_scores" in vars(task):
        return
    scores, undersample = task._calculate_scores, task._undersample_data

    def calculate_scores(labels: Any, *arguments: Any, **named: Any) -> Any:
        # Subclasses hand on more than the predictions: a multilabel task its vectors and the classifier, too.
        return scores(labels[:], *arguments, **named)

    def undersample_data(dataset: Any, *arguments: Any, **named: Any) -> Any:
        return undersample(_Whole(dataset, task.label_column_name), *arguments, **named)

    task._calculate_scores, task._undersample_data = calculate_scores, undersample_data


class _Whole:
    """A table as ``_undersample_data`` uses it, with one column read."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column, self._values = dataset, column, dataset[column][:]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: Any) -> Any:
        return self._values if key == self._column else self._dataset[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


# Units while they are scored

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
    """Keeps the scores of single units of one task while mteb scores it."""

    def __init__(self, suite_task: SuiteTask) -> None:
        self.suite_task, self.task = suite_task, suite_task.task
        self.main = str(suite_task.task.metadata.main_score)
        self.record = Record()
        self._shared: dict[tuple[str, str], dict[str, str]] = {}
        """Clusters of units that share content, where the data name none (they do so once they are loaded)."""
        self._contents: dict[tuple[str, str], dict[str, list[int]]] = {}
        """The contents of these units, numbered."""
        self._place = ("", "")
        """Subset and split that mteb scores now."""
        self.tied = 0
        """How many pairs have the very similarity of an earlier one."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the task inside: mteb calls these two methods while it scores."""
        task = self.task
        task._save_task_predictions = self._keep
        if isinstance(task, AbsTaskRetrieval):
            score_task = task.task_specific_scores

            def task_specific_scores(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> Any:
                self._at(hf_subset, hf_split)
                self._keep_retrieval(scores, qrels, results)
                return score_task(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

            task.task_specific_scores = task_specific_scores
        try:
            yield
        finally:
            vars(task).pop("_save_task_predictions")
            vars(task).pop("task_specific_scores", None)

    def _keep(self, predictions: Any, model: Any, folder: Path, hf_split: str, hf_subset: str) -> None:
        self._at(hf_subset, hf_split)
        for kind, keep in (
            (AbsTaskRetrieval, None),
            (AbsTaskSTS, self._keep_sts),
            (AbsTaskPairClassification, self._keep_pairs),
            (AbsTaskBitextMining, self._keep_bitext),
            (AbsTaskZeroShotClassification, self._keep_zero_shot),
            (AbsTaskMultilabelClassification | AbsTaskRegression, self._keep_nothing),
            (AbsTaskClassification, self._keep_classification),
            (AbsTaskClustering | AbsTaskClusteringLegacy, None),
            (object, self._keep_nothing),
        ):
            if isinstance(self.task, kind):
                if keep is not None:
                    keep(predictions)
                return

    def _at(self, subset: str, split: str) -> None:
        self._place = (subset, split)

    def _no_interval(self, reason: str) -> None:
        self.record.reasons["/".join(self._place)] = reason

    def _unless_mean(self, units: str, *metrics: str) -> None:
        """No interval where the main score is none of these metrics, which are means over units."""
        if self.main not in metrics:
            self._no_interval(f"the score {self.main} is no mean over {units}, so no interval is given")

    def _rows(self, unit: str, metric: str, values: Mapping[str, float] | Iterable[float]) -> None:
        """A row for each unit, by its id or its number."""
        values = values if isinstance(values, Mapping) else {str(i): value for i, value in enumerate(values)}
        clusters = self.suite_task.clusters.get(self._place) or self._shared.get(self._place, {})
        subset, split = self._place
        same = {"task": self.suite_task.name, "subset": subset, "split": split, "unit": unit, "metric": metric}
        columns = self.record.columns
        for name, value in same.items():
            columns[name] += [value] * len(values)
        columns["id"] += list(values)
        columns["cluster"] += [clusters.get(key) for key in values]
        contents = self._contents.get(self._place, {})
        columns["contents"] += [contents.get(key) for key in values]
        columns["value"] += [float(value) for value in values.values()]

    def _data(self) -> Any:
        subset, split = self._place
        return self.task.dataset[subset][split] if subset in self.task.dataset else self.task.dataset[split]

    def _cluster(self, contents: Mapping[str, Iterable[str]]) -> None:
        """Units that share content (a relevant document, a sentence) are not independent: they become one cluster."""
        if not self.suite_task.clusters.get(self._place):
            self._shared[self._place] = shared_clusters(contents)
            if self._shared[self._place]:
                numbers: dict[str, int] = {}
                self._contents[self._place] = {
                    unit: [numbers.setdefault(one, len(numbers)) for one in dict.fromkeys(of)]
                    for unit, of in contents.items()
                }

    def _keep_nothing(self, predictions: Any) -> None:
        self._no_interval(f"scores of single units are not kept for {self.task.metadata.type} tasks")

    def _keep_retrieval(self, scores: Any, qrels: Any, results: Any) -> None:
        self._cluster({query: [d for d, grade in qrels.get(query, {}).items() if grade > 0] for query in scores})
        for metric in dict.fromkeys([self.main, *_EXTRA_METRICS]):
            values = query_values(metric, scores, qrels, results)
            if values is not None:
                self._rows("query", metric, values)
            elif metric == self.main:
                self._unless_mean("queries")
        top = self.record.top
        for query, documents in results.items():
            best = heapq.nlargest(TOP, documents.items(), key=lambda item: (item[1], item[0]))
            for rank, (document, score) in enumerate(best, start=1):
                row = (self.suite_task.name, *self._place, query, rank, document, float(score))
                for name, value in zip(TOP_SCHEMA.names, row, strict=True):
                    top[name].append(value)

    def _pairs_of_texts(self, data: Any, columns: Sequence[Any]) -> None:
        if all(isinstance(name, str) for name in columns):
            texts = [
                data[name][0] if len(data) == 1 and isinstance(data[name][0], list) else data[name][:]
                for name in columns
            ]
            if all(isinstance(text, str) for column in texts for text in column):
                self._cluster({str(i): pair for i, pair in enumerate(zip(*texts, strict=True))})

    def _keep_sts(self, predictions: Any) -> None:
        data = self._data()
        self._pairs_of_texts(data, self.task.column_names)
        scores = predictions.get(_STS_SCORES.get(self.main, ""))
        if self.main == "spearman" and scores is None:
            scores = predictions["cosine_scores"]
        self._rows("pair", "gold", [float(score) for score in data["score"][:]])
        if scores is None:
            self._no_interval(f"the score {self.main} is no Spearman correlation, so no interval is given")
        else:
            self.tied += len(scores) - len(np.unique(scores))
            self._rows("pair", "prediction", scores)

    def _keep_pairs(self, predictions: Any) -> None:
        data = self._data()
        labels = data[self.task.label_column_name]
        labels = np.asarray(labels[0] if len(data) == 1 else labels[:], dtype=np.float64)
        scores, given = _pair_scores(self.main, predictions, labels)
        self._pairs_of_texts(data, [self.task.input1_column_name, self.task.input2_column_name])
        self.tied += len(scores) - len(np.unique(scores))
        self._rows("pair", "label", labels)
        self._rows("pair", "prediction", scores)
        if not given:
            self._no_interval(NO_MAXIMUM.format(self.main))

    def _keep_bitext(self, predictions: Any) -> None:
        subset, split = self._place
        parallel = subset == "parallel"
        for pair, neighbours in predictions.items():
            self._at(pair if parallel else subset, split)
            data = self._data() if not parallel else {}
            gold = data["gold"] if "gold" in data else [(i, i) for i in range(len(neighbours))]
            right = [gold[i][1] for i in range(len(neighbours))]
            matches = [neighbour["corpus_id"] for neighbour in neighbours]
            self._rows("sentence", "accuracy", [a == b for a, b in zip(right, matches, strict=True)])
            self._rows("sentence", "gold_match", right)
            self._rows("sentence", "match", matches)
            self._unless_mean("sentences", "accuracy", "f1")

    def _keep_zero_shot(self, predictions: Any) -> None:
        task = self.task
        labels = task._normalize_labels(self._data()[task.label_column_name][:], task.get_candidate_labels())
        self._rows("item", "accuracy", np.argmax(np.asarray(predictions), axis=1) == np.asarray(labels))
        self._unless_mean("items", "accuracy")

    def _keep_classification(self, predictions: Any) -> None:
        if getattr(self.task, "is_cross_validation", False):
            self._no_interval("the task is cross-validated: its folds share items, so no interval is given")
            return
        labels = np.asarray(self._data()[self.task.label_column_name][:])
        if labels.ndim != 1 or any(len(run) != len(labels) for run in predictions):
            self._no_interval("the task does not predict one label for each item, so no interval is given")
            return
        right = np.stack([np.asarray(run) == labels for run in predictions]).astype(np.float64)
        self._rows("item", "accuracy", right.mean(axis=0))
        for number, run in enumerate(right):
            self._rows("item", f"{EXPERIMENT}{number}", run)
        self._unless_mean("items", "accuracy")

    def finish(self, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Take from mteb's result (split -> entries) what no prediction tells: the experiments of a clustering."""
        if not isinstance(self.task, AbsTaskClustering | AbsTaskClusteringLegacy):
            return
        for split, entries in scores.items():
            for entry in entries:
                self._at(str(entry["hf_subset"]), split)
                runs = entry.get("v_measures")
                if isinstance(runs, Mapping):
                    unit, values = "experiment", np.mean([list(of) for of in runs.values()], axis=0)
                else:
                    unit, values = "set", np.asarray(runs if runs is not None else [], dtype=np.float64)
                self.record.reasons.pop("/".join(self._place), None)
                if self.main != "v_measure" or len(values) < 2:
                    self._no_interval("the score is not a mean over several clusterings of the task")
                else:
                    self._rows(unit, "v_measure", values)


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
