"""Freezing, layers computed twice, compiling: the gradient stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nearfield.encoders import load_encoder
from nearfield.encoders.load import save_encoder
from nearfield.errors import BadInputError
from nearfield.training.engine import (
    compile_transformer,
    enable_checkpointing,
    freeze_parameters,
    set_attention_dropout,
    set_training_mode,
)
from tests.encoders.tiny import save_tiny


def features(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(5, 200, (rows, length), generator=generator), "attention_mask": mask}


def gradients(model: Any, batch: dict[str, Tensor], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    embeddings = model(dict(batch))["sentence_embedding"]
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    (embeddings * weights).sum().backward()
    return embeddings.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama", "gpt2", "gpt_neox"])
def test_attention_drops_out_as_much_as_is_said(tmp_path: Path, architecture: str) -> None:
    model = load_encoder(str(save_tiny(tmp_path, architecture)), device="cpu").model
    config = model[0].auto_model.config
    for name in ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(config, name):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
    before = config.to_dict()
    set_attention_dropout(model, 0.0)
    set_training_mode(model, dropout=True)
    off = model(features())["sentence_embedding"]
    assert torch.equal(model(features())["sentence_embedding"], off)
    set_attention_dropout(model, 0.3)
    assert not torch.equal(model(features())["sentence_embedding"], off)
    set_training_mode(model, dropout=False)
    torch.testing.assert_close(model(features())["sentence_embedding"], off)
    assert config.to_dict() == before, "what is saved"


def test_freezing_by_pattern(tiny_model: Path) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    frozen = freeze_parameters(model.named_parameters(), ["*.embeddings.*", "*.layer.0.*.bias"])
    for name, parameter in model.named_parameters():
        expected = ".embeddings." in name or (".layer.0." in name and name.endswith(".bias"))
        assert (name in frozen) == expected == (not parameter.requires_grad), name
    assert freeze_parameters(model.named_parameters(), []) == []
    found = gradients(model, features())[1]
    assert found
    assert not set(found) & set(frozen)


def test_patterns_that_cannot_be_meant(tiny_model: Path) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    with pytest.raises(BadInputError, match="'embedings' matches no parameter") as error:
        freeze_parameters(model.named_parameters(), ["*", "embedings"])
    assert error.value.where == "training.freeze.1"
    assert ".embeddings." in str(error.value.hint)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(BadInputError, match="matches no parameter") as error:
        freeze_parameters(model.named_parameters(), ["layer.1"])
    assert ".layer.1." in str(error.value.hint)
    with pytest.raises(BadInputError, match="freeze every parameter"):
        freeze_parameters(model.named_parameters(), ["*"])


@pytest.mark.parametrize("dropout", [False, True])
def test_checkpointing_keeps_the_gradient(tiny_model: Path, dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, twice = (load_encoder(str(tiny_model), device="cpu").model for _ in range(2))
    enable_checkpointing(twice)
    for model in (plain, twice):
        set_training_mode(model, dropout=dropout)
    calls = []
    feed_forward = type(twice[0].auto_model.encoder.layer[0]).feed_forward_chunk
    monkeypatch.setattr(
        type(twice[0].auto_model.encoder.layer[0]),
        "feed_forward_chunk",
        lambda self, hidden: calls.append(0) or feed_forward(self, hidden),
    )
    embeddings, wanted = gradients(plain, features())
    assert len(calls) == 2
    again, found = gradients(twice, features())
    assert len(calls) == 2 + 4, "each of two layers is computed twice"
    assert torch.equal(embeddings, again)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    other = gradients(twice, features(), seed=1)[0]
    assert torch.equal(other, again) is not dropout
    twice.eval()
    assert not any(module.training for module in twice.modules())


def test_a_model_without_a_transformer() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    for enable, setting in ((enable_checkpointing, "gradient_checkpointing"), (compile_transformer, "compile")):
        with pytest.raises(BadInputError, match="first module is a StaticEmbedding") as error:
            enable(model)
        assert error.value.where == f"training.{setting}"


def test_models_that_cannot(tiny_model: Path) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    model[0].auto_model.supports_gradient_checkpointing = False
    with pytest.raises(BadInputError, match="cannot compute its layers again"):
        enable_checkpointing(model)
    model[0].auto_model.encoder.layer = nn.ModuleList()
    with pytest.raises(BadInputError, match="has no layers to compile"):
        compile_transformer(model)


@pytest.mark.slow
def test_compiling_keeps_embeddings_gradient_and_dropout(tiny_model: Path, tmp_path: Path) -> None:
    plain, compiled = (load_encoder(str(tiny_model), device="cpu").model for _ in range(2))
    compile_transformer(compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for model in (plain, compiled):
        set_training_mode(model, dropout=True)
    for rows, length in ((3, 7), (5, 11), (2, 20)):
        batch = features(rows, length)
        embeddings, wanted = gradients(plain, batch)
        again, found = gradients(compiled, batch)
        torch.testing.assert_close(again, embeddings, atol=1e-5, rtol=1e-5)
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.manual_seed(0)
            first = compiled(dict(batch))["sentence_embedding"]
        assert torch.equal(first, again), "the pass without a graph draws the dropout of the pass with one"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "with and without gradient, for all lengths"
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.eval()
    save_encoder(compiled, tmp_path / "saved")
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu").model
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
