"""Scores beside published ones: equal only if all four decimals are, and read from the right split of the newest results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_published.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_published", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("published", "ours", "verdict"),
    [
        (0.6450, 0.6451, "NO"),
        (0.6451, 0.6450, "NO"),
        (0.64508, 0.64512, "yes"),
        (0.64504, 0.64508, "NO"),
        (0.7, 0.7, "yes"),
        (None, 0.7, "nothing published"),
    ],
)
def test_equal_means_the_same_four_decimals(
    script: ModuleType, published: float | None, ours: float, verdict: str
) -> None:
    row = script.Row("STS16", "default", "STS", published, ours, None)
    assert row.verdict == verdict
    assert f"| {verdict} |" in script.table([row])


def test_a_task_that_cannot_be_compared_says_why(script: ModuleType) -> None:
    row = script.Row("LegalSummarization", "default", "Retrieval", 0.59, 0.58, (0.5, 0.6))
    assert row.verdict == "not comparable: this copy has more pairs"
    other = script.Row("STS16", "default", "STS", 0.7899, 0.7898, None)
    assert script.summary([row, other]).startswith("0 of 1 comparable scores (1 tasks)")


def test_scores_of_a_results_repository(script: ModuleType, tmp_path: Path) -> None:
    data, results = tmp_path / "data", tmp_path / "results"
    (data / "STS16").mkdir(parents=True)
    (data / "STS16" / "meta.json").write_text(json.dumps({"split": "test", "official": {"default": 0.5}}))
    for revision, version, score in (("a", "1.12.75", 0.1), ("b", "2.1.17", 0.2), ("c", "1.9.1", 0.3)):
        (results / revision).mkdir(parents=True)
        scores = {"test": [{"hf_subset": "default", "main_score": score}], "train": []}
        (results / revision / "STS16.json").write_text(json.dumps({"mteb_version": version, "scores": scores}))
    assert script.stated_scores(data) == {("STS16", "default"): 0.5}
    assert script.filed_scores(results, data) == {("STS16", "default"): 0.2}
