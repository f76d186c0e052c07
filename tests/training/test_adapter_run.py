"""A run that trains an adapter, from the recipe to the saved model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

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
