"""The recipes of the methods: they fit together, and train some steps on tiny models of their architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfield.encoders.build import build_encoder
from nearfield.encoders.tokenize import token_ids
from nearfield.errors import BadInputError
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import dry_run
from nearfield.recipe import check_recipe, load_recipe
from nearfield.shipped import shipped_root
from nearfield.training.model_options import freeze_parameters
from tests.encoders.tiny import save_tiny

RECIPES = shipped_root() / "training" / "recipes"
FOR_A_TEST = ("training.max_steps=10", "training.trackers=[]", "training.schedule.warmup=0", "encoder.max_length=32")
TINY = {
    "llm2vec": ("llama", ("mntp", "simcse", "pairs")),
    "retromae": ("bert", ("retromae", "pairs")),
    "udever": ("bloom", ()),
    "adapters": ("bert", ()),
}


@pytest.mark.parametrize("name", TINY)
def test_it_is_a_recipe(name: str) -> None:
    check_recipe(load_recipe(RECIPES / f"{name}.yaml"))


def save_model(folder: Path, architecture: str) -> Path:
    """A tiny model whose tokenizer has an end-of-text token."""
    from transformers import AutoTokenizer

    save_tiny(folder, architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def test_udever_trains_biases_alone_and_texts_end_with_the_end_token(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "udever.yaml").config
    folder = save_model(tmp_path, "bloom")
    encoder = recipe.encoder.model_copy(update={"model": str(folder), "max_length": 8})
    model = build_encoder(encoder, "cpu").model
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


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_ten_steps(name: str, tmp_path: Path) -> None:
    """On the embedded WordNet, with small batches, after a dry run that finds nothing in the way."""
    architecture, stages = TINY[name]
    model = save_model(tmp_path / "tiny", architecture)
    settings = [*FOR_A_TEST, f"encoder.model={model}", "evaluation=null", "batches.batch_size=16"]
    for number, stage in enumerate(stages):
        settings += [f"stages.{number}.{setting}" for setting in FOR_A_TEST[:1]]
        settings += [f"stages.{number}.training.schedule.warmup=0"]
        if stage in ("mntp", "simcse", "retromae"):
            settings += [f"stages.{number}.batches.batch_size=16"]
        if stage == "mntp":
            settings += [f"stages.{number}.objective.mask_token=word7"]
    if name == "adapters":
        data = RECIPES.parents[1] / "data_recipes" / "wordnet.yaml"
        settings += [f"data={data}", "sources=[gloss]"]
    run = open_run(RECIPES / f"{name}.yaml", settings, tmp_path / "run")
    looked_at = dry_run(run, trial_seconds=1.0)
    assert looked_at is not None and looked_at.would_start, looked_at
    run_stages(run, "train")
    for one in (*run.before, run):
        assert (one.folder / "checkpoints" / "step-00000010").is_dir()
        assert (one.folder / "model" / "modules.json").is_file()
