"""Every objective where a batch has as few rows as there are, or fewer than ranks: nothing fails, and shares add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nearfield.conformance.cases import OBJECTIVES
from nearfield.objectives import ContrastiveBatch, Objective
from nearfield.objectives.config import Surroundings
from nearfield.objectives.diagnostics import similarities, watch
from nearfield.training.chunks import split_rows
from tests.objectives.test_losses import DIM, GUIDE, NAMES, SETTINGS, build, make

WIDTHS = Surroundings(width=2 * DIM, guide_width=GUIDE, labels=9, label_names=NAMES, vocabulary=7)


def objective_of(name: str) -> Objective:
    if name in SETTINGS:
        return build(WIDTHS, **SETTINGS[name])
    return OBJECTIVES[name].build({0: "a", 1: "b"}, WIDTHS).double()


def batch_of(leaf: Tensor, rows: int, negatives: int) -> ContrastiveBatch:
    """A batch whose embeddings are lines of ``leaf``, with all that an objective may ask for."""
    batch = make(max(1, rows), negatives)
    if not rows:
        batch = replace(batch.select(torch.zeros(1, dtype=torch.bool)), rows=None)
    documents = rows * (1 + negatives)
    return replace(
        batch,
        queries=leaf[:rows],
        documents=leaf[rows : rows + documents],
        sources=torch.arange(rows) % 2,
        token_losses=leaf[rows + documents :, :4].abs(),
    )


@pytest.mark.parametrize("name", [*SETTINGS, *OBJECTIVES])
def test_fewer_rows_than_ranks(name: str) -> None:
    objective = objective_of(name)
    for rows in range(6):
        for negatives in (0, 2):
            draw = torch.Generator().manual_seed(rows)
            leaf = torch.randn(rows * (3 + negatives), 2 * DIM, generator=draw, dtype=torch.float64).requires_grad_()
            inputs = [leaf, *(p for p in objective.parameters() if p.requires_grad)]
            whole = objective.forward(batch_of(leaf, rows, negatives))
            expected = [whole.total / whole.denominator, *whole.gradients(inputs)]
            assert all(bool(part.isfinite().all()) for part in expected), (rows, negatives)
            batch = batch_of(leaf.detach(), rows, negatives)
            figures = {**watch(objective, batch), **similarities(batch)}
            assert not rows or all(value == value for value in figures.values())
            for ranks in range(2, 5):
                found = [torch.zeros_like(part) for part in expected]
                for rank in range(ranks):
                    share = torch.from_numpy(split_rows(rows, ranks, rank))
                    loss = objective.forward(replace(batch_of(leaf, rows, negatives), rows=share))
                    assert loss.rows.shape == share.shape
                    parts = [loss.total / loss.denominator, *loss.gradients(inputs)]
                    found = [a + b for a, b in zip(found, parts, strict=True)]
                for ours, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
