"""LoRA: what gets an adapter, what is trained, and that a saved model is the model that was trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nearfield.config import load_config
from nearfield.encoders import EncoderConfig, LoRAConfig, load_encoder
from nearfield.encoders.adapters import lora_targets, merge_adapter, relink
from nearfield.encoders.load import build_encoder, build_tokenizer, save_encoder
from nearfield.encoders.private import has_adapter
from nearfield.encoders.source import folder_revision
from nearfield.errors import BadInputError

TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8 word9 word10"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def built(model: Path | str, dtype: Any = "float32", seed: int = 0, **settings: Any) -> Any:
    adapter = LoRAConfig.model_validate({"r": 4, "save": "adapter", **settings})
    return build_encoder(EncoderConfig(model=str(model), adapter=adapter), "cpu", dtype=dtype, seed=seed).model


def trained(model: Path | str, **settings: Any) -> Any:
    """A model whose adapter is no longer that of the beginning."""
    found = built(model, **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in found.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found.eval()


def small(kind: str) -> Any:
    """A transformer of an architecture with two layers, random."""
    from transformers import CONFIG_MAPPING, AutoModel

    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    if kind in ("llama", "qwen3"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    return AutoModel.from_config(CONFIG_MAPPING[kind](**sizes))


ROLES = {
    "bert": (
        {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
        {"intermediate.dense", "output.dense"},
    ),
    "modernbert": ({"attn.Wqkv", "attn.Wo"}, {"mlp.Wi", "mlp.Wo"}),
    "llama": (
        {f"self_attn.{part}_proj" for part in "qkvo"},
        {f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    ),
}
ROLES["qwen3"] = ROLES["llama"]


@pytest.mark.parametrize("kind", list(ROLES))
def test_roles_across_architectures(kind: str) -> None:
    transformer = small(kind)
    attention, mlp = ROLES[kind]
    prefix = "encoder.layer" if kind == "bert" else "layers"
    for role, wanted in (("attention", attention), ("mlp", mlp), ("all-linear", attention | mlp)):
        found = lora_targets(transformer, role)
        assert sorted(found) == sorted(f"{prefix}.{layer}.{name}" for layer in (0, 1) for name in wanted)


def test_targets_by_name_and_those_that_are_not_there() -> None:
    transformer = small("bert")
    assert lora_targets(transformer, ("query", "encoder.layer.1.output.dense")) == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.output.dense",
    ]
    with pytest.raises(BadInputError, match="BertModel has no linear module 'q_proj'") as error:
        lora_targets(transformer, ("query", "q_proj"))
    assert error.value.where == "encoder.adapter.targets.1"
    transformer.encoder = torch.nn.Identity()
    with pytest.raises(BadInputError, match="no module of BertModel is known as attention") as error:
        lora_targets(transformer, "attention")
    assert "pooler.dense" in str(error.value.hint)


def test_routers_of_experts_get_no_adapter() -> None:
    layer = torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2), "gate_proj": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": layer})])})
    assert lora_targets(model, "all-linear") == ["layers.0.mlp.gate_proj"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_only_the_adapter_is_trained_and_starts_as_nothing(tiny_model: Path, use_dora: bool) -> None:
    plain = load_encoder(str(tiny_model), device="cpu").model
    model = built(tiny_model, use_dora=use_dora, targets="attention")
    model.eval()
    np.testing.assert_allclose(model.encode(TEXTS), plain.encode(TEXTS), atol=1e-6)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora_" in name and ".attention." in name for name in names)
    assert len(names) == 2 * 4 * (3 if use_dora else 2)
    model(model.preprocess(TEXTS))["sentence_embedding"].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name


def test_the_beginning_is_a_function_of_the_seed(tiny_model: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = built(tiny_model), built(tiny_model), built(tiny_model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    name = next(name for name, parameter in first.named_parameters() if parameter.requires_grad)
    weights = [dict(model.named_parameters())[name] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def no_machine_paths(folder: Path, *machine: Path) -> None:
    for file in folder.rglob("*.json"):
        for path in machine:
            assert str(path) not in file.read_text(), file


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_is_a_whole_model(tiny_model: Path, tmp_path: Path, use_dora: bool) -> None:
    from sentence_transformers import SentenceTransformer

    model = trained(tiny_model, use_dora=use_dora)
    vectors = model.encode(TEXTS)
    assert np.abs(vectors - load_encoder(str(tiny_model), device="cpu").model.encode(TEXTS)).max() > 1e-2
    save_encoder(model, tmp_path / "saved")
    assert has_adapter(model), "the model that was saved is as it was"
    np.testing.assert_array_equal(model.encode(TEXTS), vectors)
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) >= set(load_file(tiny_model / "model.safetensors"))
    no_machine_paths(tmp_path / "saved", tiny_model, tmp_path)
    for loaded in (
        load_encoder(str(tmp_path / "saved"), device="cpu").model,
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
    ):
        assert not has_adapter(loaded)
        np.testing.assert_allclose(loaded.encode(TEXTS), vectors, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_alone_on_a_folder(
    tiny_model: Path, tmp_path: Path, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    model = trained(tiny_model, use_dora=use_dora)
    model.prompts = {"query": "word9 ", "document": ""}
    vectors = model.encode(TEXTS)
    saved = tmp_path / "run" / "model"
    save_encoder(model, saved, adapter="adapter")
    assert not (saved / "model.safetensors").exists()
    no_machine_paths(saved, tiny_model, tmp_path)
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"local/{tiny_model.name}"
    assert config["revision"] == folder_revision(tiny_model)
    way = json.loads((saved / "adapter_base.json").read_text())["path"]
    assert not Path(way).is_absolute() and (saved / way).resolve() == tiny_model.resolve()

    # Found on the way from the adapter's folder, whatever the current one, by plain sentence-transformers too.
    monkeypatch.chdir(tmp_path)
    for loaded in (load_encoder(str(saved), device="cpu").model, SentenceTransformer(str(saved), device="cpu")):
        np.testing.assert_array_equal(loaded.encode(TEXTS), vectors)
        assert loaded.prompts["query"] == "word9 "
    given = load_encoder(str(saved), device="cpu", base=str(tiny_model)).model
    np.testing.assert_array_equal(given.encode(TEXTS), vectors)

    # Moved together they stay together; alone, the adapter says what it lacks.
    revision = folder_revision(saved)
    far = tmp_path / "far" / "run" / "model"
    shutil.copytree(saved, far)
    with pytest.raises(
        BadInputError, match=f"holds an adapter only, and its base .the folder '{tiny_model.name}'"
    ) as lacks:
        load_encoder(str(far), device="cpu")
    assert "--base" in str(lacks.value.hint)
    with pytest.raises((OSError, FileNotFoundError), match=tiny_model.name):
        SentenceTransformer(str(far), device="cpu")
    shutil.copytree(tiny_model, (far / way).resolve())
    for loaded in (load_encoder(str(far), device="cpu").model, SentenceTransformer(str(far), device="cpu")):
        np.testing.assert_array_equal(loaded.encode(TEXTS), vectors)
    shutil.move((far / way).resolve(), tmp_path / "elsewhere")
    relink(far, str(tmp_path / "elsewhere"))
    for loaded in (load_encoder(str(far), device="cpu").model, SentenceTransformer(str(far), device="cpu")):
        np.testing.assert_array_equal(loaded.encode(TEXTS), vectors)
    assert folder_revision(far) == revision, "where the base lies is no part of what the model is"
    shutil.move(tmp_path / "elsewhere", far.parent / tiny_model.name)
    beside = load_encoder(str(far), device="cpu").model
    np.testing.assert_array_equal(beside.encode(TEXTS), vectors)

    save_encoder(beside, tmp_path / "again", adapter="adapter")
    again = json.loads((tmp_path / "again" / "adapter" / "adapter_config.json").read_text())
    assert again["revision"] == config["revision"]
    weights = load_file(saved / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name])
    no_machine_paths(tmp_path / "again", tmp_path)
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS), vectors)

    other = load_file(far.parent / tiny_model.name / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in other.items()}
    save_file(other, far.parent / tiny_model.name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match="is not the base that this adapter was trained on"):
        load_encoder(str(far), device="cpu")
    with pytest.raises(BadInputError, match="is not the base that this adapter was trained on"):
        relink(far, str(far.parent / tiny_model.name))
    with pytest.raises(BadInputError, match="it has no base"):
        load_encoder(str(tiny_model), device="cpu", base=str(tiny_model))
    with pytest.raises(BadInputError, match="it has no base"):
        relink(tiny_model, str(tiny_model))


@pytest.mark.parametrize("shards", ["two files", "pytorch"])
def test_an_adapter_alone_finds_the_weights_of_any_layout(tiny_model: Path, tmp_path: Path, shards: str) -> None:
    from sentence_transformers import SentenceTransformer

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if shards == "pytorch":
        torch.save(weights, base / "pytorch_model.bin")
    else:
        names = sorted(weights)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, own in parts.items():
            save_file({name: weights[name] for name in own}, base / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    model = trained(base)
    save_encoder(model, tmp_path / "saved", adapter="adapter")
    for loaded in (
        load_encoder(str(tmp_path / "saved"), device="cpu").model,
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
    ):
        np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_an_adapter_on_a_hub_model(tmp_path: Path) -> None:
    """The base is found in the offline package by our loader, in the hub's cache by sentence-transformers itself."""
    from huggingface_hub import constants
    from sentence_transformers import SentenceTransformer

    base = load_encoder(MINILM, device="cpu")
    model = trained(MINILM, targets=["query", "value"])
    vectors = model.encode(["a text", "another"])
    save_encoder(model, tmp_path / "saved", adapter="adapter")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (MINILM, base.revision)
    no_machine_paths(tmp_path / "saved", Path(base.path))
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(loaded.model.encode(["a text", "another"]), vectors)
    assert loaded.name == "local/saved"

    cached = Path(constants.HF_HUB_CACHE) / f"models--{MINILM.replace('/', '--')}"
    if cached.exists():
        pytest.skip("the hub's cache of this machine holds the model already")
    snapshot = tmp_path / "cache" / cached.name / "snapshots" / base.revision
    shutil.copytree(base.path, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(base.revision)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu", cache_folder=str(tmp_path / "cache"))
    np.testing.assert_array_equal(plain.encode(["a text", "another"]), vectors)


def test_the_base_of_a_hub_model_is_that_revision(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model = trained(tiny_model)
    save_encoder(model, tmp_path / "saved", adapter="adapter")
    file = tmp_path / "saved" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "org/base", "revision": "1" * 40}))
    with pytest.raises(BadInputError, match="cannot be loaded from the hub") as error:
        load_encoder(str(tmp_path / "saved"), device="cpu")
    assert error.value.where == "org/base"
    asked = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu").model
    assert asked == [("org/base", "1" * 40)]
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(BadInputError, match="does not say what it was trained on"):
        load_encoder(str(tmp_path / "saved"), device="cpu")


def test_a_damaged_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_encoder(trained(tiny_model, use_dora=True), tmp_path / "saved", adapter="adapter")
    file = tmp_path / "saved" / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    for gone in (".lora_B.", ".lora_magnitude_vector"):
        left = {name: t for name, t in whole.items() if not (gone in name and "layer.1" in name)}
        save_file(left, file, metadata={"format": "pt"})
        with pytest.raises(BadInputError, match="tensors of the model are not in its weights file"):
            load_encoder(str(tmp_path / "saved"), device="cpu", base=str(tiny_model))


def test_dora_as_peft_names_it_loads_too(tiny_model: Path, tmp_path: Path) -> None:
    """Such folders load wrongly in sentence-transformers, with a warning only; here they load rightly."""
    model = trained(tiny_model, use_dora=True)
    save_encoder(model, tmp_path / "saved", adapter="adapter")
    file = tmp_path / "saved" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    named = {n.replace("magnitude_vector.weight", "magnitude_vector"): t for n, t in tensors.items()}
    assert set(named) != set(tensors)
    save_file(named, file, metadata={"format": "pt"})
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu", base=str(tiny_model)).model
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert set(load_file(file)) == set(named), "loading leaves the folder as it is"


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_round_trips_of_other_architectures(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    base = tmp_path / kind
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = small(kind)
    transformer.resize_token_embeddings(300)
    transformer.save_pretrained(base)
    model = trained(base)
    vectors = model.encode(TEXTS)
    save_encoder(model, tmp_path / "adapter", adapter="adapter")
    save_encoder(model, tmp_path / "merged")
    np.testing.assert_array_equal(load_encoder(str(tmp_path / "adapter"), device="cpu").model.encode(TEXTS), vectors)
    merged = load_encoder(str(tmp_path / "merged"), device="cpu").model
    np.testing.assert_allclose(merged.encode(TEXTS), vectors, atol=1e-5)


def test_full_fine_tuning_goes_round(tiny_model: Path, tmp_path: Path) -> None:
    model = build_encoder(EncoderConfig(model=str(tiny_model)), "cpu").model
    assert not has_adapter(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.mul_(1.1)
    save_encoder(model, tmp_path / "saved", adapter="adapter")
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu").model
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_bfloat16_weights_and_a_float32_adapter(tiny_model: Path, tmp_path: Path) -> None:
    for use_dora in (False, True):
        model = trained(tiny_model, dtype="bfloat16", use_dora=use_dora)
        dtypes = {(".lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
        model(model.preprocess(TEXTS))["sentence_embedding"].float().square().sum().backward()
        save_encoder(model, tmp_path / f"merged-{use_dora}")
        tensors = load_file(tmp_path / f"merged-{use_dora}" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        loaded = load_encoder(str(tmp_path / f"merged-{use_dora}"), device="cpu").model
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        ours, theirs = loaded.encode(TEXTS), model.encode(TEXTS, convert_to_tensor=True).float().numpy()
        assert np.abs(ours - theirs).max() < 0.05 * np.abs(ours).max()
    plain = build_encoder(EncoderConfig(model=str(tiny_model)), "cpu", dtype="bfloat16").model
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}


def test_training_goes_on_from_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """An adapter as the base of a recipe is merged first: all is trained, or a new adapter on the sum."""
    first = trained(tiny_model)
    base = tmp_path / "run" / tiny_model.name
    shutil.copytree(tiny_model, base)
    save_encoder(first, tmp_path / "run" / "model", adapter="adapter")
    again = build_encoder(EncoderConfig(model=str(tmp_path / "run" / "model")), "cpu").model
    assert not has_adapter(again)
    assert all(p.requires_grad for name, p in again.named_parameters() if "pooler" not in name)
    np.testing.assert_allclose(again.encode(TEXTS), first.encode(TEXTS), atol=1e-5)
    second = trained(tmp_path / "run" / "model", save="merged")
    save_encoder(second, tmp_path / "second")
    np.testing.assert_allclose(
        load_encoder(str(tmp_path / "second"), device="cpu").model.encode(TEXTS), second.encode(TEXTS), atol=1e-5
    )
    loaded = load_encoder(str(tmp_path / "run" / "model"), device="cpu").model
    save_encoder(loaded, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(tensors) >= set(load_file(tiny_model / "model.safetensors"))
    merged = load_encoder(str(tmp_path / "merged"), device="cpu").model
    np.testing.assert_allclose(merged.encode(TEXTS), first.encode(TEXTS), atol=1e-5)
    renamed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match="are not in its weights file"):
        load_encoder(str(tmp_path / "merged"), device="cpu")
    with pytest.raises(BadInputError, match="is an adapter on another model"):
        built(tmp_path / "run" / "model")
    merge_adapter(first)
    np.testing.assert_allclose(first.encode(TEXTS), again.encode(TEXTS), atol=1e-5)


def test_the_pooler_is_not_trained_and_saved_as_loaded(tiny_model: Path, tmp_path: Path) -> None:
    model = build_encoder(EncoderConfig(model=str(tiny_model)), "cpu").model
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"0.model.pooler.dense.{part}" for part in ("weight", "bias")}
    model(model.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    assert all((parameter.grad is None) == (name in frozen) for name, parameter in model.named_parameters())
    pooler = model[0].auto_model.pooler.dense.weight.detach().clone()
    save_encoder(model, tmp_path / "saved")
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")["pooler.dense.weight"], pooler)


def test_tokens_need_no_adapter(tiny_model: Path) -> None:
    config = EncoderConfig(model=str(tiny_model), adapter=LoRAConfig(quantize="4bit", save="adapter"))
    assert not has_adapter(build_tokenizer(config).model)


def test_quantised_bases_need_bitsandbytes_and_cuda(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    for found, message in ((None, "pip install bitsandbytes"), (object(), "needs a CUDA device; this is cpu")):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, found=found: found if name == "bitsandbytes" else find_spec(name, *rest),
        )
        with pytest.raises(BadInputError, match=message) as error:
            built(tiny_model, quantize="4bit")
        assert error.value.where == "encoder.adapter.quantize"


def test_a_model_without_a_transformer(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel

    words = Words(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=4)], device="cpu").save_pretrained(
        str(tmp_path / "static")
    )
    with pytest.raises(BadInputError, match="adapters need a transformer, and the model's first module is a Static"):
        built(tmp_path / "static")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{kind: lora, r: 0}", "greater than or equal to 1"),
        ("{kind: lora, targets: []}", "at least 1 item"),
        ("{kind: lora, quantize: 4bit}", "say save: adapter"),
        ("{kind: ia3}", "unknown kind 'ia3'"),
        ("{kind: lora, rank: 4}", "unknown key 'adapter.rank'"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: str, words: str) -> None:
    file = tmp_path / "encoder.yaml"
    file.write_text(f"adapter: {settings}\n")
    with pytest.raises(BadInputError, match=words):
        load_config(EncoderConfig, file)
