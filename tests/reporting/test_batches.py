"""The section on batches: a teacher's measurements in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nearfield.reporting.batches import build_batches
from nearfield.reporting.page import Facts


def facts(folder: Path, hardness: Any) -> dict[str, str]:
    (folder / "plan").mkdir()
    epoch = {"epoch": 0, "batches": 3, "rows": 6, "tokens": 30, "batches_by_source": {"several sources": 3}}
    whole = {"kind": "shuffled", "batch_size": 2, "steps": 3, "epochs": [epoch | {"hardness": hardness}]}
    (folder / "plan" / "summary.json").write_text(json.dumps(whole))
    (stated, *_) = build_batches(folder, ["a"])
    assert isinstance(stated, Facts)
    return dict(stated.pairs)


def test_hardness_beside_chance(tmp_path: Path) -> None:
    measured = {
        "planned_similarity": 0.41234, "random_similarity": 0.1, "planned_false_negatives": 0.034,
        "random_false_negatives": 0.0001,
    }  # fmt: skip
    said = facts(tmp_path, measured)
    assert said["similarity in a batch"] == "0.4123; at random 0.1"
    assert said["likely false negatives"] == "3.4 %; at random under 0.1 %"


@pytest.mark.parametrize("hardness", [None, {}, "broken", {"planned_similarity": "x", "random_similarity": 1}])
def test_without_a_teacher_nothing_is_said(tmp_path: Path, hardness: Any) -> None:
    assert "similarity in a batch" not in facts(tmp_path, hardness)
