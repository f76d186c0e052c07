"""Embeddings of zeros in training are counted and told of once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nearfield.errors import Notice
from nearfield.objectives import ContrastiveBatch
from nearfield.pipeline import open_run, run_stages
from nearfield.training import trainer
from nearfield.training.diagnostics import ZeroVectors


def batch(queries: torch.Tensor, documents: torch.Tensor) -> ContrastiveBatch:
    ids = torch.arange(len(queries))
    return ContrastiveBatch(queries, documents, ids, torch.ones(len(ids), dtype=torch.bool), ids, ids[:, None])


def test_zero_rows_are_counted_over_steps_and_told_once() -> None:
    told: list[Notice] = []
    zeros = ZeroVectors(torch.device("cpu"), told.extend)
    some = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    zeros.look(batch(some, some))
    zeros.look(None)
    zeros.say(1)
    assert told == []
    zeros.look(batch(torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, 1.0]])))
    zeros.say(2)
    zeros.look(batch(torch.zeros(2, 2), some))
    zeros.say(3)
    (notice,) = told
    assert notice.code == "zero-vectors" and "3 of 8 embeddings of the steps up to 2 are zero" in notice.what


def test_a_run_says_it(toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    own = trainer.batch_gradient

    def silenced(*arguments: Any, **named: Any) -> Any:
        result, *rest = own(*arguments, **named)
        seen = result.batch
        assert seen is not None
        return (replace(result, batch=replace(seen, queries=torch.zeros_like(seen.queries))), *rest)

    monkeypatch.setattr(trainer, "batch_gradient", silenced)
    run = open_run(toy_recipe, (), tmp_path / "runs" / "toy")
    run_stages(run, "train")
    assert "zero-vectors" in {notice.code for notice in run.notices}
