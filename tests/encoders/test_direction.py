"""Decoders made bidirectional: each architecture tried out, and refused where the setting is not heeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.build import build_encoder, save_encoder
from nearfield.encoders.packing import Features, Tokens, embed, packed_features, packing_kind, padded_features
from nearfield.errors import BadInputError
from tests.encoders.tiny import DECODERS, draw_rows, save_tiny

TEXTS = draw_rows([5, 1, 20])
CPU = torch.device("cpu")


def built(folder: Path, attention: Any = "bidirectional", **settings: Any) -> Any:
    return build_encoder(EncoderConfig(model=str(folder), attention=attention, **settings), "cpu").model


def features(model: Any, rows: list[Tokens]) -> Features:
    return padded_features(rows, pad_token=0, side=model.tokenizer.padding_side, device=CPU, prompt_length=0)


def vectors(model: Any, rows: list[Tokens]) -> torch.Tensor:
    with torch.no_grad():
        return embed(model.eval(), features(model, rows))


def states(model: Any, row: Tokens) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model[0](features(model, [row]))["token_embeddings"][0]
    return found


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_decoder_is_made_bidirectional(tmp_path: Path, architecture: str) -> None:
    from sentence_transformers import SentenceTransformer

    folder = save_tiny(tmp_path / "base", architecture)
    model, causal = built(folder), built(folder, "causal")
    row, other = TEXTS[0], np.array([*TEXTS[0][:-1], TEXTS[1][0]], dtype=np.int32)
    assert float((states(model, row)[0] - states(model, other)[0]).abs().max()) > 1e-4
    assert torch.equal(states(causal, row)[:-1], states(causal, other)[:-1])

    found = vectors(model, TEXTS)
    scale = float(found.abs().max())
    assert float((found - vectors(causal, TEXTS)).abs().max()) > 1e-3
    for text, vector in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(vectors(model, [text])[0], vector, atol=1e-5 * scale, rtol=0)

    save_encoder(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["is_causal"] is False
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(vectors(plain, TEXTS), found)
    assert torch.equal(vectors(load_encoder(str(tmp_path / "saved"), device="cpu").model, TEXTS), found)
    plain[0].auto_model.set_attn_implementation("eager")
    torch.testing.assert_close(vectors(plain, TEXTS), found, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("architecture", DECODERS)
def test_packed_is_padded_where_it_is_packed(tmp_path: Path, architecture: str) -> None:
    model = built(save_tiny(tmp_path, architecture), normalize=True).eval()
    rows = draw_rows([9, 3, 17, 1, 9, 30])
    padded = padded_features(rows, pad_token=0, side="right", device=CPU, prompt_length=0)
    with torch.no_grad():
        wanted = embed(model, padded)
        kind = packing_kind(model, CPU)
        assert (kind is None) == (architecture in ("bloom", "gemma2")), kind
        if kind is not None:
            found = embed(model, packed_features(rows, kind=kind, device=CPU, prompt_length=0))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padding_on_either_side_is_nothing(tmp_path: Path, side: str, attention: str) -> None:
    model = built(save_tiny(tmp_path, "llama"), attention, pooling="last")
    model.tokenizer.padding_side = side
    for text, vector in zip(TEXTS, vectors(model, TEXTS), strict=True):
        torch.testing.assert_close(states(model, text)[-1], vector, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "complaint"),
    [
        ("stablelm", "alone does not see the last one"),
        ("nemotron", "alone does not see the last one"),
        ("mamba", "does not see the last one|cannot be tried"),
    ],
)
def test_an_architecture_that_does_not_heed_the_setting_is_refused(
    tmp_path: Path, architecture: str, complaint: str
) -> None:
    folder = save_tiny(tmp_path, architecture)
    load_encoder(str(folder), device="cpu")
    with pytest.raises(BadInputError, match=f"is not bidirectional .*({complaint})"):
        built(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    with pytest.raises(BadInputError, match="is not bidirectional"):
        load_encoder(str(folder), device="cpu")


def test_absolute_positions_are_refused_with_padding_on_the_left(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "gpt2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    with pytest.raises(BadInputError, match="padded on the left has other hidden states"):
        built(folder)


def test_kernels_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = modeling_llama.eager_attention_forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output, weights = eager(*args, **kwargs)
        return output * 1.1, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    with pytest.raises(BadInputError, match="attention by eager gives other hidden states than by sdpa"):
        built(save_tiny(tmp_path, "llama"))


def test_one_layer_that_looks_back_only_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = modeling_llama.LlamaAttention.forward

    def stubborn(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 1:
            length = hidden_states.shape[1]
            kwargs = {**kwargs, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).tril()}
        return attend(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", stubborn)
    with pytest.raises(BadInputError, match="in layer 1 the first token does not see the last one"):
        built(save_tiny(tmp_path, "llama"))


def test_an_encoder_is_not_causal(tiny_model: Path) -> None:
    with pytest.raises(BadInputError, match=r"is not causal .*beside a longer one sees the last one"):
        built(tiny_model, "causal")
    model = built(tiny_model)
    assert torch.equal(vectors(model, TEXTS), vectors(load_encoder(str(tiny_model), device="cpu").model, TEXTS))


def test_an_adapter_alone_would_lose_the_setting(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="loads on its base as it is, without attention, layers"):
        EncoderConfig.model_validate(
            {
                "model": str(tiny_model),
                "attention": "bidirectional",
                "layers": 1,
                "adapter": {"kind": "lora", "save": "adapter"},
            }
        )


def test_checkpointed_layers_look_both_ways_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    gradients = []
    for checkpointed in (False, True):
        model = built(folder).train()
        if checkpointed:
            model[0].auto_model.gradient_checkpointing_enable()
        embed(model, features(model, TEXTS)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
