"""Every recipe under training/recipes/methods is valid, can be tried out, and trains, with a tiny model and a small data set."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from nearfield.conformance.tiny import WORDS
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import dry_run
from nearfield.recipe import check_recipe, load_recipe, stage_recipes
from nearfield.training.metrics import read_metrics

METHODS = sorted((Path(__file__).parents[2] / "training" / "recipes" / "methods").glob("*.yaml"))
SOURCES = """\
name: small
sources:
  - name: gloss
    task_type: Retrieval
    reader: {kind: jsonl, path: gloss.jsonl}
    examples: {kind: retrieval, query: lemma, positives: gloss, negatives: siblings}
    split: {kind: all}
  - name: gloss-similarity
    task_type: STS
    reader: {kind: jsonl, path: similarity.jsonl}
    examples: {kind: graded, first: first, second: second, score: score}
    split: {kind: all}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordNet's sources by name, with 300 examples each."""
    folder, rows = tmp_path_factory.mktemp("small"), random.Random(0)

    def text(*more: str) -> str:
        return " ".join([*rows.sample(WORDS, 4), *more])

    gloss = [{"lemma": f"word{i}", "gloss": text(f"word{i}"), "siblings": text()} for i in range(300)]
    similarity = [{"first": text(str(i)), "second": text(f"x{i}"), "score": rows.random()} for i in range(300)]
    for name, lines in (("gloss", gloss), ("similarity", similarity)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "small.yaml").write_text(SOURCES)
    return folder / "small.yaml"


def test_there_are_recipes() -> None:
    names = {path.stem for path in METHODS}
    assert names >= {
        "b3",
        "conan",
        "e5",
        "granite",
        "instructor",
        "kalm-v2",
        "lg-anna",
        "nv-embed",
        "rzenembed",
        "simcse",
    }


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_what_it_keeps(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.config.name == path.stem
    for stage in stage_recipes(loaded):
        assert check_recipe(stage).sources
    about = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert path.stem == "stages" or ("arXiv" in about and "Kept" in about and "Scaled" in about)


@pytest.mark.slow
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_trains_ten_steps(path: Path, small: Path, tiny_model: Path, tmp_path: Path) -> None:
    text = path.read_text().replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_model))
    for before, after in (("[384, 256, 128, 64]", "[32, 16, 8, 4]"), ("[384, 256, 128]", "[32, 16]"), ("[384, 128, 64]", "[32, 8]"), ("heads: 8", "heads: 4")):  # fmt: skip
        text = text.replace(before, after)
    recipe = tmp_path / path.name
    recipe.write_text(text.replace("../../../data_recipes/wordnet.yaml", str(small)).partition("\nevaluation:")[0])
    stages = load_recipe(recipe).config.stages
    overrides = ["training.max_steps=10", "training.trackers=[]", "training.epochs=10", "batches.batch_size=16"]
    for number, stage in enumerate(stages):
        overrides.append(f"stages.{number}.training.max_steps=10")
        if "batch_size" in stage.batches.model_fields_set:
            overrides.append(f"stages.{number}.batches.batch_size=16")
    if path.stem == "b3":
        overrides += ["batches.community_size=4", "batches.rank_from=3", "batches.rank_to=40"]
    folder = tmp_path / "run"
    found = dry_run(open_run(recipe, overrides, folder))
    assert found is not None and found.would_start
    assert all(one.would_start for one in found.before)
    outcome = run_stages(open_run(recipe, overrides, folder), "train")
    assert outcome.model is not None
    last = outcome.folder if not stages else folder
    lines = read_metrics(next(iter(sorted(last.glob("metrics.jsonl")))))
    assert lines[-1]["step"] == 10
    assert all(math.isfinite(line["loss"]) for line in lines)
