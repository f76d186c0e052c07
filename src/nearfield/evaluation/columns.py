"""Whole columns for mteb's classification tasks, which read their labels row by row out of a table for every metric."""

from __future__ import annotations

from typing import Any

from mteb.abstasks import AbsTaskClassification


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
