"""The key of kept vectors: everything that changes a vector changes it, and nothing else does."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nearfield.encoders import LoadedEncoder, identity, load_encoder
from nearfield.encoders.identity import model_fingerprint
from nearfield.encoders.load import save_encoder
from nearfield.encoders.source import locate
from nearfield.evaluation import open_model

from .tiny import tiny_encoder

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["word1 word2 word3 word4", "word5 word6 word7 word8 word9 word10"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with pooling, projection and normalisation, as a folder."""
    folder = tmp_path_factory.mktemp("identity")
    model = tiny_encoder(folder / "base", "llama", dense=True)
    model.save_pretrained(str(folder / "model"), create_model_card=True)
    return folder / "model"


def key(folder: Path | LoadedEncoder) -> str:
    """The key under which vectors are kept."""
    model = folder if isinstance(folder, LoadedEncoder) else str(folder)
    return open_model(model).computes


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return change


def swap_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["word1"], words["word2"] = words["word2"], words["word1"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_normalize(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:-1]))


def other_projection(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("2_*/model.safetensors")
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)


def rope(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["rope_parameters"] = {**content["rope_parameters"], "rope_theta": 3.0}
    (folder / "config.json").write_text(json.dumps(content))


FILES: dict[str, Callable[[Path], None]] = {
    "attention both ways": change_json("config.json", is_causal=False),
    "rotation of positions": rope,
    "number of heads": change_json("config.json", num_attention_heads=2, num_key_value_heads=1, head_dim=16),
    "activation": change_json("config.json", hidden_act="relu"),
    "epsilon of the norm": change_json("config.json", rms_norm_eps=0.5),
    "pooling": change_json("1_Pooling/config.json", pooling_mode="max"),
    "prompt pooled": change_json("1_Pooling/config.json", include_prompt=False),
    "list of modules": without_normalize,
    "weights of the projection": other_projection,
    "activation of the projection": change_json(
        "2_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"
    ),
    "vocabulary": swap_tokens,
    "tokenizer's settings": change_json("tokenizer_config.json", padding_side="left"),
    "longest text": change_json("sentence_bert_config.json", max_seq_length=3),
    "code beside the weights": lambda folder: (folder / "own.py").write_text("SCALE = 2\n") and None,
    "a file that such code may read": lambda folder: (folder / "weights.npy").write_bytes(b"1") and None,
    "a chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}") and None,
}


@pytest.mark.parametrize("what", FILES)
def test_each_file_that_loading_reads_changes_the_key(saved: Path, tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    if what == "attention both ways":
        # The same weights, whatever the name of the folder.
        assert key(folder) == key(saved)
    before, known = load_encoder(str(folder), device="cpu").model.encode(TEXTS), locate(str(folder))
    FILES[what](folder)
    after = load_encoder(str(folder), device="cpu").model.encode(TEXTS)
    found = locate(str(folder))
    assert found.content != known.content and found.revision != known.revision
    assert key(folder) != key(saved)
    says_nothing = ("prompt pooled", "tokenizer's settings", "code", "a file", "a chat")
    assert what.startswith(says_nothing) or before.shape != after.shape or abs(before - after).max() > 1e-3


def test_the_memory_alone_tells_what_config_and_module_settings_say(saved: Path, tmp_path: Path) -> None:
    known = model_fingerprint(load_encoder(str(saved), device="cpu").model)
    for what in list(FILES)[:13]:
        folder = Path(shutil.copytree(saved, tmp_path / what.replace(" ", "-")))
        FILES[what](folder)
        assert model_fingerprint(load_encoder(str(folder), device="cpu").model) != known, what


def test_subfolders_behind_links_count(saved: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(saved / "1_Pooling", tmp_path / "pooling"))
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    shutil.rmtree(folder / "1_Pooling")
    (folder / "1_Pooling").symlink_to(elsewhere)
    (folder / "2_Dense" / "above").symlink_to(folder)  # a circle ends
    known = key(folder)
    change_json("config.json", pooling_mode="max")(elsewhere)
    assert key(folder) != known


def test_what_changes_no_vector_changes_no_key(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "another-name"))
    (folder / "README.md").write_text("# Another card")
    (folder / ".hidden").write_text("x")
    change_json("config_sentence_transformers.json", prompts={"query": "q: "})(folder)
    encoder = load_encoder(str(folder), device="cpu")
    known = model_fingerprint(load_encoder(str(saved), device="cpu").model)
    assert model_fingerprint(encoder.model) == known
    encoder.model.encode(TEXTS, prompt="word1 ")
    encoder.model.similarity(torch.zeros(1, 8), torch.zeros(1, 8))
    encoder.model.train()
    encoder.model.prompts = {"query": "other: "}
    assert model_fingerprint(encoder.model) == known
    (folder / "config_sentence_transformers.json").write_bytes(
        (saved / "config_sentence_transformers.json").read_bytes()
    )
    assert key(folder) == key(saved)


def test_processors_of_pictures_and_chat_templates_count(tmp_path: Path) -> None:
    from PIL import Image

    from nearfield.conformance.tiny_models import save_tiny_vlm

    folder = save_tiny_vlm(tmp_path / "model")
    model = load_encoder(str(folder), device="cpu").model
    known = model_fingerprint(model)
    model.encode([TEXTS[0]])
    model.encode([Image.new("RGB", (40, 30))])
    assert model_fingerprint(model) == known
    for change in (
        lambda processor: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
        lambda processor: setattr(processor, "chat_template", "{{ messages }}"),
    ):
        other = copy.deepcopy(model)
        change(other[0].processor)
        assert model_fingerprint(other) != known


def test_static_embeddings_have_a_key(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"word1": 0, "word2": 1, "[UNK]": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    known = model_fingerprint(model)
    model.encode(TEXTS)
    assert model_fingerprint(model) == known
    tokenizer.enable_truncation(1)
    assert model_fingerprint(model) != known


class Scaled(nn.Module):
    """A module of a user's own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["sentence_embedding"] = features["sentence_embedding"] * self._factor + shift()
        return features


def shift() -> float:
    return SHIFT


SHIFT = 0.0


def other_class(body: str) -> type[nn.Module]:
    """A class that was typed in: there is no file with its source."""
    held: dict[str, Any] = {"nn": nn, "__name__": "typed"}
    exec(f"class Typed(nn.Module):\n    def forward(self, features):\n        {body}\n        return features\n", held)
    return held["Typed"]  # type: ignore[no-any-return]


def attention(model: Any) -> None:
    model[0].auto_model.set_attn_implementation("eager")


def hook(model: Any) -> None:
    model[0].auto_model.layers[0].register_forward_hook(lambda module, given, output: output)


def patched(model: Any) -> None:
    model[1].forward = types.MethodType(lambda self, features: {**features, "sentence_embedding": None}, model[1])


def adapter(model: Any) -> None:
    from peft import LoraConfig

    model[0].auto_model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))


def adapter_scaled(model: Any) -> None:
    adapter(model)
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = dict.fromkeys(module.scaling, 7.0)


def adapter_off(model: Any) -> None:
    adapter(model)
    model[0].auto_model.disable_adapters()


def weight(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1


def tokenizer(model: Any) -> None:
    model.tokenizer.add_tokens(["word1 word2"])


MEMORY: dict[str, Callable[[Any], Any]] = {
    "one weight": weight,
    "dtype": lambda model: model.bfloat16(),
    "a buffer that is not saved": lambda model: model[0].auto_model.rotary_emb.inv_freq.mul_(2),
    "config": lambda model: setattr(model[0].auto_model.config, "is_causal", False),
    "epsilon of a norm": lambda model: setattr(model[0].auto_model.norm, "variance_epsilon", 0.5),
    "heads of a layer": lambda model: setattr(model[0].auto_model.layers[0].self_attn, "scaling", 9.0),
    "attention kernel": attention,
    "pooling": lambda model: setattr(model[1], "include_prompt", False),
    "longest text": lambda model: setattr(model, "max_seq_length", 5),
    "dimensions kept": lambda model: setattr(model, "truncate_dim", 4),
    "a module more": lambda model: model.append(Scaled(1.0)),
    "a hook": hook,
    "a method replaced": patched,
    "an adapter": adapter,
    "an adapter's scale": adapter_scaled,
    "an adapter switched off": adapter_off,
    "words of the tokenizer": tokenizer,
    "side of padding": lambda model: setattr(model.tokenizer, "padding_side", "left"),
    "order of modules": lambda model: model.insert(2, model.pop(3)),
}


def test_each_part_of_a_model_in_memory_changes_the_key(saved: Path) -> None:
    loaded = load_encoder(str(saved), device="cpu").model
    seen = {"as it was": model_fingerprint(loaded), "a copy": model_fingerprint(copy.deepcopy(loaded))}
    assert len(set(seen.values())) == 1
    del seen["a copy"]
    for what, change in MEMORY.items():
        model = copy.deepcopy(loaded)
        change(model)
        seen[what] = model_fingerprint(model)
    assert len(set(seen.values())) == len(seen), seen


def doubled(own: Callable[..., Any], factor: float = 2.0) -> Callable[..., Any]:
    """A function in the place of another, under its name."""

    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return function


REPLACED: dict[str, Callable[[pytest.MonkeyPatch, Any, float], Any]] = {
    "a method of a library's class": lambda patch, llama, factor: patch.setattr(
        llama.LlamaMLP, "forward", doubled(llama.LlamaMLP.forward, factor)
    ),
    "a function of a library's module": lambda patch, llama, factor: patch.setattr(
        llama, "apply_rotary_pos_emb", doubled(llama.apply_rotary_pos_emb, factor)
    ),
    "an attention function": lambda patch, llama, factor: patch.setitem(
        llama.ALL_ATTENTION_FUNCTIONS._local_mapping,
        "sdpa",
        doubled(llama.ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"], factor),
    ),
    "a hook of all modules": lambda patch, llama, factor: patch.setitem(
        nn.modules.module._global_forward_hooks,
        1_000_000,
        lambda module, given, output: output * factor if isinstance(module, nn.Linear) else None,
    ),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_put_in_the_place_of_a_librarys_code_counts(saved: Path, what: str) -> None:
    import transformers.models.llama.modeling_llama as llama

    model = load_encoder(str(saved), device="cpu").model
    seen, vectors = [model_fingerprint(model)], [model.encode(TEXTS)]
    for factor in (2.0, 3.0):
        with pytest.MonkeyPatch.context() as patch:
            REPLACED[what](patch, llama, factor)
            seen.append(model_fingerprint(model)), vectors.append(model.encode(TEXTS))
    assert len(set(seen)) == 3
    assert all(abs(vectors[i] - vectors[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert model_fingerprint(model) == seen[0]


def test_own_classes_count_by_their_code_and_settings(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(module: nn.Module) -> str:
        model = load_encoder(str(saved), device="cpu").model
        model.append(module)
        return model_fingerprint(model)

    plain = of(Scaled(2.0))
    assert plain == of(Scaled(2.0)) != of(Scaled(3.0))
    monkeypatch.setitem(globals(), "SHIFT", 1.0)  # a setting of the module's file that a function reads
    assert of(Scaled(2.0)) != plain
    first, second = other_class("features['a'] = 1"), other_class("features['a'] = 2")
    assert of(first()) == of(other_class("features['a'] = 1")()) != of(second())


def test_versions_that_change_numbers_count(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_encoder(str(saved), device="cpu").model
    known, now = model_fingerprint(model), identity.computing_versions()
    assert {"torch", "transformers", "sentence-transformers", "tokenizers"} <= set(now)
    for package in identity.PACKAGES:
        monkeypatch.setattr(identity, "computing_versions", lambda package=package: {**now, package: "0.0.1"})
        assert model_fingerprint(model) != known, package


def test_vectors_are_not_taken_from_a_model_of_another_configuration(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))

    def vectors(**options: Any) -> Any:
        made = open_model(str(folder), **options)
        assert made.encoder is not None
        return made.encoder.vectors(TEXTS), made.encoder.encoder.reused

    first, _ = vectors(cache=tmp_path / "kept")
    again, reused = vectors(cache=tmp_path / "kept")
    assert reused == len(TEXTS) and (again == first).all()
    FILES["attention both ways"](folder)
    other, reused = vectors(cache=tmp_path / "kept")
    assert reused == 0 and (other == vectors()[0]).all() and abs(other - first).max() > 1e-3


def test_a_base_counts_in_what_stands_on_it(tmp_path: Path) -> None:
    from nearfield.encoders import EncoderConfig
    from nearfield.encoders.load import build_encoder

    base = tmp_path / "base"
    tiny_encoder(base, "llama")
    settings = {"model": str(base), "adapter": {"kind": "lora", "r": 2, "alpha": 4, "save": "adapter"}}
    save_encoder(build_encoder(EncoderConfig(**settings), "cpu").model, tmp_path / "adapter", adapter="adapter")
    known = locate(str(tmp_path / "adapter")).content
    assert known == load_encoder(str(tmp_path / "adapter"), device="cpu").content
    rope(base)
    assert locate(str(tmp_path / "adapter")).content != known


def test_a_name_on_the_hub_stands_for_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfield.provenance import hub_commit

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir(parents=True)
    contents = []
    for commit in ("a" * 40, "b" * 40):
        (refs / "main").write_text(commit)
        hub_commit.cache_clear()
        contents.append(locate("some/model").content)
    assert contents == ["a" * 40, "b" * 40]
    hub_commit.cache_clear()


def test_settings_beside_a_gguf_file_count(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    plain = locate(str(file)).content
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert locate(str(file)).content != plain
    known = locate(str(file)).content
    file.write_bytes(b"GGUG")
    assert locate(str(file)).content != known
