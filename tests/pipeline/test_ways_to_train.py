"""Runs of one way to train are found by their recipe, whatever their seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nearfield.errors import BadInputError
from nearfield.pipeline.run import find_method, is_method
from nearfield.recipe import load_recipe


def make_run(folder: Path, recipe: dict[str, Any], seed: int, *, finished: bool = True) -> Path:
    (folder / "results" / "x").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": seed, "name": folder.name}))
    stages = {"evaluate": {"results": {"after": "results/x"}}} if finished else {}
    (folder / "manifest.json").write_text(json.dumps({"stages": stages}))
    return folder


def test_the_runs_of_a_recipe_are_those_that_differ_in_the_seed_only(toy_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(toy_recipe, ()).config.model_dump(mode="json")
    runs = tmp_path / "runs"
    make_run(runs / "one", recipe, 1)
    make_run(runs / "two", recipe, 2)
    make_run(runs / "unfinished", recipe, 3, finished=False)
    changed = {**recipe, "training": {**recipe["training"], "learning_rate": 0.5}}
    make_run(runs / "other", changed, 1)
    method = find_method(str(toy_recipe), runs)
    assert method.label == toy_recipe.stem
    assert method.runs == {1: runs / "one" / "results" / "x", 2: runs / "two" / "results" / "x"}
    assert is_method(str(toy_recipe)) and is_method(str(runs)) and not is_method(str(runs / "one"))
    with pytest.raises(BadInputError, match="differ in more than their seed"):
        find_method(str(runs), runs)
    make_run(runs / "again", recipe, 2)
    with pytest.raises(BadInputError, match="two runs of this method have the seed 2"):
        find_method(str(toy_recipe), runs)
    with pytest.raises(BadInputError, match="no finished, evaluated run"):
        find_method(str(toy_recipe), tmp_path / "empty")


def test_a_folder_of_runs_is_a_method(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "mine" / f"seed-{seed}", {"training": {}}, seed)
    assert set(find_method(str(tmp_path / "mine"), tmp_path, "m").runs) == {0, 1}
