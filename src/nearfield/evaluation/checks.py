"""A task's data before it is scored: labels that its type does not know are refused, what mteb leaves out is said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from mteb.abstasks import (
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

from nearfield.errors import BadInputError
from nearfield.evaluation.local import LOCAL, embedded_items
from nearfield.evaluation.texts import splits_of
from nearfield.notices import Notice, say

_PLACES = 3


def check_task(task: Any) -> None:
    """Look at a task's loaded data: say what its score will leave out, and raise :class:`BadInputError` for labels that its
    type does not document."""
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    places = list(splits_of(task))
    for place, data in places:
        _check_labels(task, place, data)
    for notice in _left_out(task, places):
        say(notice)


def _check_labels(task: Any, place: str, data: Any) -> None:
    values: Iterable[Any]
    name, where = task.metadata.name, f"{task.metadata.name}, {place}"
    local = str(task.metadata.revision).startswith(LOCAL)
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
    elif isinstance(task, AbsTaskSTS) and local:
        _refuse(_beyond(data["score"][:], task), "score", _range(task), where, _STATED)
    elif isinstance(task, AbsTaskSummarization) and local:
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
    found = Counter(repr(value) for value in bad)
    if found:
        shown = ", ".join(value for value, _ in found.most_common(_PLACES))
        count = found.total()
        raise BadInputError(
            f"{count:,} {'value' if count == 1 else 'values'} of the column {column!r} "
            f"{'is' if count == 1 else 'are'} not {wanted}: {shown}{', …' if len(found) > _PLACES else ''}",
            where=where,
            hint=hint,
        )


def _left_out(task: Any, places: Sequence[tuple[str, Any]]) -> Iterator[Notice]:
    """What the score of a task is not made of, although it is in its data."""
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
        found = [(place, count, total) for place, count, total in counts if count]
        if found:
            yield Notice(code, f"{_counted(found)} {words}", hint)


def _counted(found: Sequence[tuple[str, int, int]]) -> str:
    """``12 of 300``, of several places together, with the places where these are not the only one."""
    count, total = sum(n for _, n, _ in found), sum(n for _, _, n in found)
    named = [place for place, _, _ in found]
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
    found = [(place, count, total) for place, count, total in bare if count]
    if found:
        yield Notice(
            "items-without-label", f"{_counted(found)} items have the label -1, which mteb leaves out of the clustering"
        )


def _sampled(found: Sequence[tuple[str, int, int]], does: str, why: str) -> Notice:
    return Notice("sampled", f"the task {does} {_counted(found)} items that are drawn ({why})")


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
