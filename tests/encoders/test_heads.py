"""Poolings, layer mix, projection: against plain loops, and saved so that plain sentence-transformers reads them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.build import build_encoder
from nearfield.encoders.load import save_encoder, shipped_files
from nearfield.encoders.packing import embed, packed_features, packing_kind, padded_features
from nearfield.encoders.shipped.nearfield_pooling import AttentionPooling, LatentAttentionPooling
from nearfield.errors import BadInputError
from tests.encoders.tiny import draw_rows, save_tiny

TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8 word9 word10"]
CPU = torch.device("cpu")
SHIPPED_FILE = "nearfield_pooling.py"
POOLINGS: list[Any] = [
    "mean",
    "cls",
    "last",
    "weighted_mean",
    "max",
    {"kind": "attention", "heads": 4},
    {"kind": "latent_attention", "latents": 5, "heads": 4},
    {"kind": "latent_attention", "latents": 3, "heads": 2, "head_dimension": 7, "expansion": 2, "gated": False},
]
ENDS = [2, 6, 9]  # a padded batch of 9 tokens with so many real ones a text, and a prompt of 2


def built(model: Path, **settings: Any) -> Any:
    return build_encoder(EncoderConfig.model_validate({"model": str(model), **settings}), "cpu").model.eval()


def shaken(module: torch.nn.Module, scale: float = 0.3) -> None:
    """No longer neutral."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=random))


def reference(pooling: Any, module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """One vector from a text's tokens (length, d) that count, in float64, one head and token at a time."""
    tokens = tokens.double()
    d = tokens.shape[1]
    if pooling == "mean":
        return tokens.mean(0)
    if pooling == "cls":
        return tokens[0]
    if pooling == "last":
        return tokens[-1]
    if pooling == "max":
        return tokens.max(0).values
    weights = {name: value.detach().double() for name, value in module.named_parameters()}
    if pooling["kind"] == "attention":
        parts = []
        for head, query in enumerate(weights["queries"]):
            share = torch.softmax(torch.stack([token @ query / math.sqrt(d) for token in tokens]), 0)
            width = d // module.heads
            parts.append(
                sum(a * token[head * width : (head + 1) * width] for a, token in zip(share, tokens, strict=True))
            )
        return torch.cat(parts)

    def norm(vector: torch.Tensor, name: str) -> torch.Tensor:
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    latents = [norm(latent, "latent_norm") for latent in weights["dictionary"]]
    keys_values = [weights["key_value.weight"] @ latent for latent in latents]
    inner = module.heads * module.head_dimension
    total = torch.zeros(d, dtype=torch.float64)
    for token in tokens:
        query = weights["query.weight"] @ norm(token, "token_norm")
        found = torch.zeros(inner, dtype=torch.float64)
        for head in range(module.heads):
            at = slice(head * module.head_dimension, (head + 1) * module.head_dimension)
            scores = [query[at] @ both[:inner][at] / math.sqrt(module.head_dimension) for both in keys_values]
            share = torch.softmax(torch.stack(scores), 0)
            found[at] = sum(a * both[inner:][at] for a, both in zip(share, keys_values, strict=True))
        hidden = token + weights["attention_output.weight"] @ found
        inside = weights["forward_input.weight"] @ norm(hidden, "forward_norm") + weights["forward_input.bias"]
        if module.gated:
            value, gate = inside.chunk(2)
            inside = value * torch.nn.functional.gelu(gate)
        else:
            inside = torch.nn.functional.gelu(inside)
        total += hidden + weights["forward_output.weight"] @ inside + weights["forward_output.bias"]
    return total / len(tokens)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pool_prompt", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_poolings_equal_loops(tiny_model: Path, pooling: Any, pool_prompt: bool, side: str) -> None:
    module = built(tiny_model, pooling=pooling, pool_prompt=pool_prompt)[1]
    shaken(module)
    tokens = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, end in enumerate(ENDS):
        mask[row, slice(0, end) if side == "right" else slice(9 - end, 9)] = 1
    features = {"token_embeddings": tokens, "attention_mask": mask, "prompt_length": 2}
    found = module(dict(features))["sentence_embedding"]
    noise = torch.where(mask[..., None].bool(), tokens, tokens + 5)
    disturbed = module({**features, "token_embeddings": noise})["sentence_embedding"]
    skip = 0 if pool_prompt else 2
    for row, end in enumerate(ENDS):
        if end == skip:
            if not isinstance(pooling, str) or pooling == "mean":
                assert found[row].abs().max() == 0, "a text that is all prompt"
            continue
        torch.testing.assert_close(disturbed[row], found[row])
        real = tokens[row][mask[row].bool()]
        if pooling == "weighted_mean":
            places = torch.arange(1, end + 1, dtype=torch.float64)[skip:, None]
            wanted = (real[skip:].double() * places).sum(0) / places.sum()
        else:
            wanted = reference(pooling, module, real[skip:])
        torch.testing.assert_close(found[row].double(), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS[5:], ids=str)
def test_poolings_with_weights_begin_as_the_mean(tiny_model: Path, pooling: Any) -> None:
    wanted = built(tiny_model, pooling="mean").encode(TEXTS)
    np.testing.assert_allclose(built(tiny_model, pooling=pooling).encode(TEXTS), wanted, atol=1e-6)


def test_a_dictionary_has_no_order_and_leaves_no_trace_in_the_shape() -> None:
    module = LatentAttentionPooling(16, latents=6, heads=4)
    shaken(module)
    for length in (1, 512):
        tokens = torch.randn(2, length, 16)
        features = {"token_embeddings": tokens, "attention_mask": torch.ones(2, length)}
        found = module(dict(features))["sentence_embedding"]
        assert found.shape == (2, 16)
        with torch.no_grad():
            module.dictionary.copy_(module.dictionary[torch.tensor([3, 1, 5, 0, 2, 4])].clone())
        torch.testing.assert_close(module(dict(features))["sentence_embedding"], found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", [AttentionPooling(16, 2), LatentAttentionPooling(16, 5, 2)], ids=["plain", "latent"])
def test_texts_end_to_end_are_pooled_as_padded_ones(module: Any) -> None:
    shaken(module)
    module.include_prompt = False
    tokens, lengths = torch.randn(12, 16), [5, 3, 4]
    mask = torch.zeros(3, 5)
    padded = torch.zeros(3, 5, 16)
    for row, part in enumerate(torch.split(tokens, lengths)):
        padded[row, : len(part)], mask[row, : len(part)] = part, 1
    wanted = module({"token_embeddings": padded, "attention_mask": mask, "prompt_length": torch.tensor([1])})
    flat = module(
        {
            "token_embeddings": tokens[None],
            "cu_seq_lens_q": torch.tensor([0, 5, 8, 12]),
            "prompt_length": torch.tensor([1]),
        }
    )
    torch.testing.assert_close(flat["sentence_embedding"], wanted["sentence_embedding"])


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_a_saved_pooling_is_the_same(tiny_model: Path, tmp_path: Path, pooling: Any) -> None:
    model = built(tiny_model, pooling=pooling, pool_prompt=False, normalize=True)
    shaken(model[1])
    model.prompts = {"query": "word9 word8 ", "document": ""}
    vectors = model.encode(TEXTS, prompt_name="query")
    saved = tmp_path / "saved"
    save_encoder(model, saved)
    own = not isinstance(pooling, str)
    assert shipped_files(model) == ([SHIPPED_FILE] if own else [])
    assert (saved / SHIPPED_FILE).exists() == own
    types = [module["type"] for module in json.loads((saved / "modules.json").read_text())]
    assert all(kind.startswith(("sentence_transformers.", "nearfield_pooling.")) for kind in types)
    if own:
        with pytest.raises(ValueError, match="trust_remote_code"):
            SentenceTransformer(str(saved), device="cpu")
    plain = SentenceTransformer(str(saved), device="cpu", trust_remote_code=own)
    loaded = load_encoder(str(saved), device="cpu").model
    assert type(loaded[1]) is type(model[1])
    for again in (plain, loaded):
        np.testing.assert_allclose(again.encode(TEXTS, prompt_name="query"), vectors, atol=1e-6)
    save_encoder(loaded, tmp_path / "again")
    np.testing.assert_allclose(
        load_encoder(str(tmp_path / "again"), device="cpu").model.encode(TEXTS, prompt_name="query"), vectors, atol=1e-6
    )


def test_loading_runs_no_code_of_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    save_encoder(built(tiny_model, pooling={"kind": "attention"}), tmp_path)
    (tmp_path / SHIPPED_FILE).write_text("raise SystemExit('the code of the folder ran')")
    load_encoder(str(tmp_path), device="cpu")


def test_the_shipped_files_need_nothing_of_ours(tmp_path: Path) -> None:
    folder = Path(sys.modules[AttentionPooling.__module__].__file__ or "").parent
    for file in ("nearfield_adapters.py", SHIPPED_FILE):
        shutil.copy(folder / file, tmp_path)
    code = "import sys, nearfield_pooling, nearfield_adapters; assert not any(name.split('.')[0] == 'nearfield' for name in sys.modules)"
    subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.'); {code}"], cwd=tmp_path, check=True
    )


def test_heads_that_do_not_divide_are_refused(tiny_model: Path) -> None:
    with pytest.raises(BadInputError, match="3 heads do not divide the model's 32 dimensions"):
        built(tiny_model, pooling={"kind": "attention", "heads": 3})


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_layer_mix_of_the_last_layer_alone_is_the_model(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny(tmp_path / "base", architecture)
    plain, neutral = built(folder), built(folder, layer_mix={"from_layer": 2})
    np.testing.assert_allclose(neutral.encode(TEXTS), plain.encode(TEXTS), atol=1e-6)
    model = built(folder, layer_mix={"from_layer": 0}, pooling="mean")
    with torch.no_grad():
        model[1].layer_weights.copy_(torch.tensor([0.5, 2.0, -1.0]))
        features = model.preprocess(TEXTS)
        layers = (
            plain[0]
            .auto_model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"], output_hidden_states=True
            )
            .hidden_states
        )
        mixed = (0.5 * layers[0] + 2 * layers[1] - layers[2]) / 1.5
        mask = features["attention_mask"][..., None]
    vectors = model.encode(TEXTS)
    np.testing.assert_allclose(vectors, ((mixed * mask).sum(1) / mask.sum(1)).numpy(), atol=1e-5)
    save_encoder(model, tmp_path / "saved")
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), vectors, atol=1e-6
    )
    model.zero_grad()
    model(model.preprocess(TEXTS))["sentence_embedding"].square().sum().backward()
    assert model[1].layer_weights.grad.abs().min() > 0
    rows = draw_rows([9, 3, 17, 1])
    with torch.no_grad():
        padded = embed(model, padded_features(rows, pad_token=0, side="right", device=CPU, prompt_length=0))
        kind = packing_kind(model, CPU)
        assert kind == "varlen"
        packed = embed(model, packed_features(rows, kind=kind, device=CPU, prompt_length=0))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)


def test_layers_that_are_not_there(tiny_model: Path) -> None:
    with pytest.raises(BadInputError, match="the model has 2 layers"):
        built(tiny_model, layer_mix={"from_layer": 3})
    with pytest.raises(BadInputError, match="the model has 2 layers, not 3"):
        built(tiny_model, layers=3)


@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu", "relu"])
def test_a_projection(tiny_model: Path, tmp_path: Path, activation: str) -> None:
    model = built(tiny_model, normalize=True, projection={"dimensions": 7, "activation": activation})
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]
    functions = {"identity": lambda x: x, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu, "relu": torch.relu}
    pooled = torch.from_numpy(built(tiny_model).encode(TEXTS))
    wanted = functions[activation](model[2].linear(pooled)).detach()
    wanted = wanted / wanted.norm(dim=1, keepdim=True).clamp(min=1e-12)
    np.testing.assert_allclose(model.encode(TEXTS), wanted.numpy(), atol=1e-6)
    same = built(tiny_model, normalize=True, projection={"dimensions": 7, "activation": activation})
    assert torch.equal(same[2].linear.weight, model[2].linear.weight), "a function of the seed"
    save_encoder(model, tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert plain.get_embedding_dimension() == 7
    np.testing.assert_allclose(plain.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
