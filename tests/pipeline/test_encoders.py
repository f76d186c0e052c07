"""A run whose encoder is not the base as it is: heads and adapters are trained, saved, told of in the card, and load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from nearfield.encoders import load_encoder
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.pipeline import open_run, run_stages

TEXTS = ["word1 word2 word3", "word4"]


def test_a_run_with_bottlenecks_and_latent_attention(toy_recipe: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = [
        "encoder.adapter={kind: bottleneck, width: 4}",
        "encoder.pooling={kind: latent_attention, latents: 3, heads: 2}",
        "encoder.pool_prompt=false",
        "encoder.projection={dimensions: 8}",
        "prompts.fallback.query='word7 word8 '",
        "training.max_steps=2",
    ]
    folder = tmp_path / "runs" / "toy"
    run_stages(open_run(toy_recipe, settings, folder), "train")
    model = folder / "model"
    card = (model / "README.md").read_text()
    assert 'SentenceTransformer("this-folder", trust_remote_code=True)' in card
    assert "Loading runs `nearfield_adapters.py` and `nearfield_pooling.py` of that folder." in card
    adapters = load_file(model / "adapters.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in adapters.items() if ".up." in name), "they were trained"
    loaded = load_encoder(str(model), device="cpu").model
    plain = SentenceTransformer(str(model), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(
        plain.encode(TEXTS, prompt_name="query"), loaded.encode(TEXTS, prompt_name="query"), atol=1e-6
    )
    assert plain.get_embedding_dimension() == 8
    meta = TaskEncoder(loaded, name="local/toy", revision="1").mteb_model_meta
    assert meta.loader_kwargs["trust_remote_code"] is True
    as_it_is = TaskEncoder(load_encoder(str(tiny_model), device="cpu").model, name="local/tiny", revision="1")
    assert "trust_remote_code" not in as_it_is.mteb_model_meta.loader_kwargs
