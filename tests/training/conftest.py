"""The data and models of the tests of the loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearfield.training.chunks import TrainingData
from nearfield.training.trainer import TrainingInputs
from tests.training.making import make_plan, make_tokens


@pytest.fixture()
def inputs(tmp_path: Path) -> TrainingInputs:
    """Two epochs of three steps of four queries."""
    return TrainingInputs(
        plans=[make_plan(tmp_path / f"epoch-{epoch}.parquet", epoch) for epoch in (0, 1)],
        plan_hashes=("a", "b"),
        data=TrainingData(make_tokens(), known_positives=lambda query: np.array([query + 20])),
        item_ids=lambda items: [f"id{item}" for item in items.tolist()],
    )
