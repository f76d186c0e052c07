"""How many files a reader enters who follows a training, a batch, a gradient or a score; docs/architecture.md names them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nearfield.cli.app import app
from nearfield.encoders.encode import text_encoder
from nearfield.evaluation import SuiteConfig, evaluate, runner
from nearfield.pipeline import open_run
from nearfield.pipeline.planning import read_examples
from nearfield.pipeline.stages import Stages
from nearfield.training import trainer
from tests.conftest import write_toy_recipe
from tests.entered import entered

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
GROUND = {"arrays.py", "config.py", "console.py", "errors.py", "files.py", "provenance.py"}
"""The ground floor, which every part stands on: the walks of the page leave it out."""
STAGES = {"tokens": 35, "plan": 30, "train": 55}
WALKS = {"batch": 4, "vector": 6, "gradient": 8, "score": 6}
"""The files that a reader enters at most. Gradients and scores are made of vectors, whose walk is told once."""


class Traced:
    """The files that were entered, by what was done."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}

    def once(self, name: str, work: Callable[..., Any], after: int = 0) -> Callable[..., Any]:
        """``work``, traced the first time that it is called after so many calls."""
        calls = 0

        def traced(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != after + 1:
                return work(*arguments, **named)
            with entered() as files:
                result = work(*arguments, **named)
            self.files[name] = files
            return result

        return traced


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, toy_data: Path) -> dict[str, list[str]]:
    """A training of the toy recipe in three commands; an epoch planned, texts encoded and a task scored by themselves."""
    folder, found, patch = tmp_path_factory.mktemp("house"), Traced(), pytest.MonkeyPatch()
    recipe = write_toy_recipe(folder, tiny_model, toy_data)
    with patch.context() as patched:
        # The second step: the first has opened what it reads.
        patched.setattr(trainer, "batch_gradient", found.once("gradient", trainer.batch_gradient, after=1))
        for stage in ("tokens", "plan"):
            command = ["-q", "train", str(recipe), "--until", stage, "--run-folder", str(folder / "run")]
            with entered() as found.files[stage]:
                app(command, standalone_mode=False)
        found.once("train", app)(
            ["-q", "train", str(recipe), "--until", "train", "--run-folder", str(folder / "run")], standalone_mode=False
        )
    run = open_run(recipe, (), folder / "run")
    stages = Stages.of(run)
    store = stages.data.open()
    sources, _ = read_examples(store, ["pairs"], "train")
    found.once("batch", run.recipe.batches.build().plan)(sources, 0, 0, known=store.known_positives())
    suite = folder / "suite.yaml"
    tasks = ", ".join(
        f"{{kind: heldout, name: {name}, data: {toy_data}, source: pairs}}" for name in ("First", "Second")
    )
    suite.write_text(f"name: toy\ntasks: [{tasks}]\n")
    with patch.context() as patched:
        # The second task: the first has found out how the model takes texts.
        patched.setattr(runner._Run, "task", found.once("score", runner._Run.task, after=1))
        model = str(folder / "run" / "model")
        made = evaluate(model, SuiteConfig.load(suite), folder / "results", prompts="as-is")
    assert not made.failures
    encode = text_encoder(model)
    encode(["the first call loads the model"])
    found.once("vector", encode)(["word1", "word2 word3"])
    return found.files


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_enters_few_files(traced: dict[str, list[str]], stage: str) -> None:
    assert len(traced[stage]) <= STAGES[stage], traced[stage]


@pytest.mark.parametrize("walk", WALKS)
def test_the_page_names_the_files_of_each_walk_in_order(traced: dict[str, list[str]], walk: str) -> None:
    text = PAGE.read_text()
    section = text[text.index(f"## A {walk}") :].split("\n## ")[0]
    named = re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)
    told = GROUND if walk == "vector" else GROUND | {*traced["vector"]}
    found = [file for file in traced[walk] if file not in told]
    assert named == found
    assert len(found) <= WALKS[walk], found
