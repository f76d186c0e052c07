"""Bottleneck adapters, several adapters on one base, low-rank ones in every architecture."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from nearfield.encoders import EncoderConfig, activate, load_adapters, load_encoder, using
from nearfield.encoders.adapters import lora_targets, merge_adapter
from nearfield.encoders.load import build_encoder, save_encoder
from nearfield.encoders.packing import embed, packed_features, padded_features
from nearfield.encoders.source import folder_revision, weights_hash
from nearfield.encoders.trials import packing_kind
from nearfield.errors import BadInputError
from nearfield.methods.bottleneck import bottleneck_places
from nearfield.provenance import derive_seed
from tests.encoders.tiny import DECODERS, draw_rows, save_tiny

TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8 word9 word10"]
CPU = torch.device("cpu")
LORA = {"kind": "lora", "r": 2}
BOTTLENECK = {"kind": "bottleneck", "width": 4}
PREFIX = {"kind": "prefix", "length": 3}
OURS = pytest.mark.parametrize("adapter", [BOTTLENECK, PREFIX], ids=["bottleneck", "prefix"])
ENDS = {
    "bert": ("attention.output.dense", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


def built(folder: Path, adapter: Any = None, **settings: Any) -> Any:
    config = EncoderConfig.model_validate({"model": str(folder), "adapter": adapter, **settings})
    return build_encoder(config, "cpu").model.eval()


def trained(folder: Path, adapter: Any, seed: int = 1) -> Any:
    """A model whose adapter is no longer that of the beginning."""
    model = built(folder, adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "modernbert", *DECODERS])
def test_adapters_in_every_architecture(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny(tmp_path, architecture)
    plain = built(folder)
    transformer = plain[0].auto_model
    roles = [set(lora_targets(transformer, role)) for role in ("attention", "mlp")]
    assert not roles[0] & roles[1]
    assert roles[0] | roles[1] == set(lora_targets(transformer, "all-linear"))
    layers = transformer.config.num_hidden_layers
    ends = ENDS.get(architecture, ("attention.attn.o", "output.dense") if architecture == "mpnet" else None)
    ends = ends or ("self_attn.o_proj", "mlp.down_proj")
    places = bottleneck_places(plain, "both")
    assert len(places) == 2 * layers
    assert {place.split(".", 2)[-1].removeprefix("0.").removeprefix("1.") for place in places} == set(ends)
    assert len(bottleneck_places(plain, "mlp")) == layers
    rows = draw_rows([5, 3, 9])
    features = padded_features(rows, pad_token=0, side="right", device=CPU, prompt_length=0)
    with torch.no_grad():
        wanted = embed(plain, features)
        dora = [{**LORA, "use_dora": True}] if architecture in ("bert", "llama", "gpt2") else []
        for adapter in (LORA, *dora, BOTTLENECK):
            model = built(folder, adapter)
            torch.testing.assert_close(embed(model, features), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
            model = trained(folder, adapter)
            moved = embed(model, features)
            assert float((moved - wanted).abs().max()) > 1e-3
            if adapter is not BOTTLENECK:
                merge_adapter(model)
                scale = float(moved.abs().max())
                torch.testing.assert_close(embed(model, features), moved, atol=1e-4 * scale, rtol=0)


def test_only_the_bottlenecks_are_trained(tiny_model: Path) -> None:
    model = built(tiny_model, BOTTLENECK)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 2 * 4
    assert all(name.startswith("0.adapters.default.") for name in names)
    model(model.preprocess(TEXTS))["sentence_embedding"].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
    again = built(tiny_model, BOTTLENECK)
    for one, other in zip(model[0].adapters.parameters(), again[0].adapters.parameters(), strict=True):
        assert torch.equal(one, other), "a function of the seed"


def test_a_bottleneck_is_what_it_says(tiny_model: Path) -> None:
    model = trained(tiny_model, {**BOTTLENECK, "places": "mlp"})
    place = "encoder.layer.1.output.dense"
    adapter = model[0].adapters["default"][place.replace(".", "__")]
    seen: list[torch.Tensor] = []
    handle = model[0].auto_model.get_submodule(place).register_forward_hook(lambda _m, _i, out: seen.append(out))
    inputs: list[torch.Tensor] = []
    model[0].auto_model.get_submodule(place).register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    model.encode(TEXTS[0])
    handle.remove()
    linear = model[0].auto_model.get_submodule(place)
    plain = inputs[0] @ linear.weight.T + linear.bias
    inside = torch.nn.functional.gelu(plain @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(seen[0], plain + inside @ adapter.up.weight.T + adapter.up.bias)


@OURS
def test_off_is_the_base_to_the_bit(tiny_model: Path, adapter: Any) -> None:
    base = built(tiny_model).encode(TEXTS)
    model = trained(tiny_model, adapter)
    moved = model.encode(TEXTS)
    assert np.abs(moved - base).max() > 1e-3
    with using(model, None):
        np.testing.assert_array_equal(model.encode(TEXTS), base)
    activate(model, "default")
    np.testing.assert_array_equal(model.encode(TEXTS), moved)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(twin.encode(TEXTS), moved)
    if adapter is BOTTLENECK:
        np.testing.assert_array_equal(model.encode(TEXTS), base)
    with pytest.raises(BadInputError, match="there is no adapter 'law'"):
        activate(model, "law")


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_packed_texts_go_through_the_adapters(tmp_path: Path, architecture: str) -> None:
    model = trained(save_tiny(tmp_path, architecture), BOTTLENECK)
    rows = draw_rows([9, 3, 17, 1])
    with torch.no_grad():
        padded = embed(model, padded_features(rows, pad_token=0, side="right", device=CPU, prompt_length=0))
        kind = packing_kind(model, CPU)
        assert kind == "varlen"
        packed = embed(model, packed_features(rows, kind=kind, device=CPU, prompt_length=0))
    torch.testing.assert_close(packed, padded, atol=1e-4 * float(padded.abs().max()), rtol=0)


@OURS
def test_saved_with_the_base(tiny_model: Path, tmp_path: Path, adapter: Any) -> None:
    model = trained(tiny_model, adapter)
    vectors = model.encode(TEXTS)
    save_encoder(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for again in (
        SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True),
        load_encoder(str(tmp_path / "saved"), device="cpu").model,
    ):
        np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-6)
    assert str(tiny_model) not in (tmp_path / "saved" / "adapters.json").read_text()


@OURS
def test_saved_alone(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Any) -> None:
    model = trained(tiny_model, {**adapter, "save": "adapter"})
    model.max_seq_length = 20
    vectors = model.encode(TEXTS)
    saved = tmp_path / "run" / "model"
    save_encoder(model, saved, adapter="adapter")
    assert not (saved / "model.safetensors").exists()
    for file in saved.rglob("*.json"):
        assert str(tiny_model) not in file.read_text(), file
    base = json.loads((saved / "adapters.json").read_text())["base"]
    wanted = {"name": f"local/{tiny_model.name}", "revision": folder_revision(tiny_model)}
    assert base == {**wanted, "weights": weights_hash(str(tiny_model))}
    monkeypatch.chdir(tmp_path)
    for found in (
        load_encoder(str(saved), device="cpu").model,
        SentenceTransformer(str(saved), device="cpu", trust_remote_code=True),
    ):
        np.testing.assert_array_equal(found.encode(TEXTS), vectors)
    # Away from its base it says what it lacks.
    shutil.copytree(saved, tmp_path / "far" / "run" / "model")
    saved = tmp_path / "far" / "run" / "model"
    with pytest.raises(BadInputError, match="holds an adapter only"):
        load_encoder(str(saved), device="cpu")
    with pytest.raises(
        FileNotFoundError, match=f"their base, the folder {tiny_model.name} .content {base['revision']}"
    ):
        SentenceTransformer(str(saved), device="cpu", trust_remote_code=True)
    given = load_encoder(str(saved), device="cpu", base=str(tiny_model)).model
    assert given.max_seq_length == 20
    np.testing.assert_array_equal(given.encode(TEXTS), vectors)
    save_encoder(given, tmp_path / "again", adapter="adapter")
    assert json.loads((tmp_path / "again" / "adapters.json").read_text())["base"] == base
    shutil.copytree(tiny_model, saved.parent / tiny_model.name)
    np.testing.assert_array_equal(load_encoder(str(saved), device="cpu").model.encode(TEXTS), vectors)
    shutil.copytree(tiny_model, tmp_path / "local" / tiny_model.name)
    plain = SentenceTransformer(str(saved), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(plain.encode(TEXTS), vectors)


@pytest.mark.parametrize(
    "adapter",
    [LORA, {**LORA, "use_dora": True}, BOTTLENECK, PREFIX],
    ids=["lora", "dora", "bottleneck", "prefix"],
)
def test_domains_switched_on_one_base(tiny_model: Path, tmp_path: Path, adapter: Any) -> None:
    vectors = {}
    for seed, name in enumerate(("law", "health"), start=1):
        model = trained(tiny_model, {**adapter, "save": "adapter"}, seed)
        vectors[name] = model.encode(TEXTS)
        save_encoder(model, tmp_path / name, adapter="adapter")
    loaded = load_encoder(str(tiny_model), device="cpu")
    model = loaded.model
    alone = model.encode(TEXTS)
    load_adapters(loaded, {name: tmp_path / name for name in vectors})
    np.testing.assert_array_equal(model.encode(TEXTS), alone)
    for name in ("law", "health", "law"):
        with using(model, name):
            np.testing.assert_allclose(model.encode(TEXTS), vectors[name], atol=1e-6)
    np.testing.assert_array_equal(model.encode(TEXTS), alone)
    activate(model, "law")
    first = model.encode(TEXTS)
    activate(model, "health")
    assert np.abs(model.encode(TEXTS) - first).max() > 1e-3
    activate(model, "law")
    np.testing.assert_array_equal(model.encode(TEXTS), first)
    copied = shutil.copytree(tiny_model, tmp_path / "copied")
    save_file({"other": torch.ones(2)}, copied / "model.safetensors")
    for what, wrong in (
        ("revision", {"revision": "0" * 32}),
        ("weights", {"path": str(copied)}),
        ("name", {"name": "x/y"}),
    ):
        with pytest.raises(BadInputError, match=f"another base: its {what}"):
            load_adapters(replace(loaded, **wrong), {"law": tmp_path / "law"})


def test_kinds_do_not_mix(tiny_model: Path, tmp_path: Path) -> None:
    for name, adapter in (("law", LORA), ("health", BOTTLENECK)):
        save_encoder(built(tiny_model, {**adapter, "save": "adapter"}), tmp_path / name, adapter="adapter")
    loaded = load_encoder(str(tiny_model), device="cpu")
    with pytest.raises(BadInputError, match="cannot stand on one model together"):
        load_adapters(loaded, {n: tmp_path / n for n in ("law", "health")})
    with pytest.raises(BadInputError, match="does not hold an adapter alone"):
        load_adapters(loaded, {"law": tiny_model})
    mixed = load_encoder(str(tiny_model), device="cpu")
    save_encoder(trained(tiny_model, {**PREFIX, "save": "adapter"}), tmp_path / "prefix", adapter="adapter")
    load_adapters(mixed, {n: tmp_path / n for n in ("health", "prefix")})
    with using(mixed.model, "prefix"):
        np.testing.assert_allclose(mixed.model.encode(TEXTS), trained(tiny_model, PREFIX).encode(TEXTS), atol=1e-6)
    with using(mixed.model, "health"):
        np.testing.assert_allclose(mixed.model.encode(TEXTS), built(tiny_model, BOTTLENECK).encode(TEXTS), atol=1e-6)


def test_adapters_of_ours_are_not_merged(tiny_model: Path) -> None:
    for adapter in (BOTTLENECK, PREFIX):
        with pytest.raises(BadInputError, match="cannot be merged into the weights"):
            merge_adapter(built(tiny_model, adapter))
    with pytest.raises(BadInputError, match="no adapter that could be merged"):
        merge_adapter(built(tiny_model))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet", "modernbert", *DECODERS])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prefix_in_every_architecture(tmp_path: Path, architecture: str, side: str) -> None:
    folder = save_tiny(tmp_path, architecture)
    plain = built(folder)
    if side == "left":
        plain.tokenizer.padding_side = "left"
        plain.save_pretrained(str(tmp_path / "left"), create_model_card=False)
        folder = tmp_path / "left"
    model = built(folder, PREFIX)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"0.adapters.default.states"}
    rows = [row % 199 + 5 for row in draw_rows([5, 1, 9])]
    pad = plain.tokenizer.pad_token_id

    def vectors(model: Any, rows: Any) -> torch.Tensor:
        with torch.no_grad():
            return embed(model, padded_features(rows, pad_token=pad, side=side, device=CPU, prompt_length=0))

    together = vectors(model, rows)
    scale = float(together.abs().max())
    for row, vector in zip(rows, together, strict=True):
        torch.testing.assert_close(vectors(model, [row])[0], vector, atol=1e-4 * scale, rtol=0)
    assert float((together - vectors(plain, rows)).abs().max()) > 1e-3
    assert packing_kind(model, CPU) is None
    model(padded_features(rows, pad_token=pad, side=side, device=CPU, prompt_length=0))[
        "sentence_embedding"
    ].square().sum().backward()
    assert bool((model[0].adapters["default"].states.grad.abs().amax((1, 2)) > 0).all()), "every layer's states learn"


def test_a_prefix_of_words_is_what_a_decoder_reads_before_the_text(tmp_path: Path) -> None:
    """At its beginning the prefix is the states of words: a causal decoder gives what it gives behind those words."""
    model = built(save_tiny(tmp_path, "llama"), PREFIX, attention="causal")
    base = built(tmp_path, attention="causal")
    words = np.random.Generator(np.random.PCG64(derive_seed(0, "prefix"))).integers(0, 205, 3).astype(np.int32)
    row = draw_rows([6])[0]
    n = model[0].model.config.num_hidden_layers
    with torch.no_grad():
        # Where texts are counted from behind the prefix, as the words themselves would have them.
        model[0].model.forward = shifted(model[0].model.forward, 3)
        found = model[0](padded_features([row], pad_token=0, side="right", device=CPU, prompt_length=0))
        longer = np.concatenate([words, row])
        wanted = base[0](padded_features([longer], pad_token=0, side="right", device=CPU, prompt_length=0))
    assert n == 2
    torch.testing.assert_close(found["token_embeddings"][0], wanted["token_embeddings"][0, 3:], atol=1e-5, rtol=1e-5)


def shifted(forward: Any, count: int) -> Any:
    def wrapped(input_ids: Any, attention_mask: Any, position_ids: Any, **kwargs: Any) -> Any:
        position_ids = torch.arange(input_ids.shape[1])[None]
        return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    return wrapped


def test_the_prefix_is_not_pooled_and_takes_no_place(tiny_model: Path) -> None:
    model = built(tiny_model, PREFIX)
    limit = model[0].model.config.max_position_embeddings
    row = (np.arange(limit) % 190 + 5).astype(np.int32)
    features = padded_features([row], pad_token=0, side="right", device=CPU, prompt_length=0)
    with torch.no_grad():
        found = model(dict(features))
    assert found["token_embeddings"].shape[1] == limit
    torch.testing.assert_close(found["sentence_embedding"][0], found["token_embeddings"][0].mean(0))
