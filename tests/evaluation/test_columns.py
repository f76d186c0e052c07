"""Labels are read as a column, and the scores stay those of mteb to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets.arrow_dataset import Column

from nearfield.encoders import load_encoder
from nearfield.evaluation.columns import read_columns_whole
from nearfield.evaluation.folder import folder_task


def test_scores_are_the_same_and_no_label_is_read_by_itself(
    tasks: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tasks.classification(), load_encoder(str(model_folder), device="cpu").model
    read = 0
    iterate, get = Column.__iter__, Column.__getitem__

    def counted_iterate(self: Column) -> Any:
        nonlocal read
        for value in iterate(self):
            read += self.column_name == "label"
            yield value

    def counted_get(self: Column, key: Any) -> Any:
        nonlocal read
        read += self.column_name == "label" and isinstance(key, int | np.integer)
        return get(self, key)

    monkeypatch.setattr(Column, "__iter__", counted_iterate)
    monkeypatch.setattr(Column, "__getitem__", counted_get)
    found = []
    for whole in (False, True):
        task, read = folder_task(folder).task, 0
        task.load_data()
        if whole:
            read_columns_whole(task)
            read_columns_whole(task)
        result = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
        found.append((result.task_results[0].scores, read))
    (expected, slowly), (got, fast) = found
    assert got == expected
    assert 100 * fast < slowly, "labels of the training samples alone, once an experiment"
