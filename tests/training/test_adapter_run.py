"""A run that trains an adapter, from the recipe to the saved model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from nearfield.encoders import load_encoder
from nearfield.pipeline import open_run, run_stages


def test_an_adapter_is_trained_and_merged(toy_recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    settings = [
        "encoder.adapter={kind: lora, r: 4, targets: attention}",
        "training.max_steps=4",
        "training.optimizer={kind: muon}",
        "training.layer_decay=0.5",
        "training.learning_rate=0.01",
    ]
    result = run_stages(open_run(toy_recipe, settings, tmp_path / "runs" / "toy"), "train")
    model = load_encoder(str(result.folder / "model"), device="cpu").model
    assert list(model.state_dict()) == list(load_encoder(str(tiny_model), device="cpu").model.state_dict())
    after, before = (load_file(folder / "model.safetensors") for folder in (result.folder / "model", tiny_model))
    for name, tensor in before.items():
        adapted = ".attention." in name and name.endswith(".weight") and "LayerNorm" not in name
        assert torch.equal(after[name], tensor) is not adapted, name


@pytest.mark.parametrize("kind", ["lora, r: 4", "bottleneck"])
def test_an_adapter_saved_alone_by_a_run_finds_its_base(
    toy_recipe: Path, tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    """The model is written aside, one folder deeper than where it will stand: the way to the base begins there."""
    settings = [
        f"encoder.adapter={{kind: {kind}, save: adapter}}",
        "training.max_steps=2",
        "training.learning_rate=0.01",
    ]
    folder = run_stages(open_run(toy_recipe, settings, tmp_path / "runs" / "toy"), "train").folder / "model"
    way = json.loads((folder / "adapter_base.json").read_text())["path"]
    assert (folder / way).resolve() == tiny_model.resolve()
    vectors = load_encoder(str(folder), device="cpu").model.encode(["word1 word2"])
    np.testing.assert_array_equal(
        SentenceTransformer(str(folder), device="cpu", trust_remote_code=True).encode(["word1 word2"]), vectors
    )
    assert np.abs(vectors - load_encoder(str(tiny_model), device="cpu").model.encode(["word1 word2"])).max() > 1e-6
