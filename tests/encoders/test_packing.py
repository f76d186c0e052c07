"""Texts without padding give the same embeddings and gradients as texts with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from nearfield.encoders import kernels, packing, trials
from nearfield.encoders.kernels import ATTENTION, band, set_attention
from nearfield.encoders.packing import embed, pack_rows, packed_features, packed_tokens, padded_features
from nearfield.encoders.trials import packing_kind
from tests.encoders.tiny import CAUSAL, draw_rows, embeddings_and_gradients, tiny_encoder

CPU = torch.device("cpu")
ENCODERS = ("bert", "roberta", "modernbert")
BOTH = tuple(f"{name}-both" for name in CAUSAL)
KINDS = ("varlen", "block")
LENGTHS = [9, 1, 30, 1, 1, 2, 17, 12, 1, 25]
SORTED = [30, 30, 17, 17, 17, 9, 9, 5, 1, 1]
"""As in chunks, where texts of one length lie side by side."""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SentenceTransformer]:
    """``make(architecture, pooling, ...)``: tiny models, each made once."""

    @cache
    def made(*args: Any, **kwargs: Any) -> SentenceTransformer:
        return tiny_encoder(tmp_path_factory.mktemp("tiny"), *args, **kwargs).eval()

    return made


def assert_equal(
    model: SentenceTransformer, lengths: list[int], kind: str, side: str = "right", prompt: int = 0, width: int = 32
) -> None:
    """Embeddings and every gradient agree to 1e-5."""
    rows = draw_rows(lengths)
    if kind == "varlen":
        set_attention(model[0].auto_model)
    packed = packed_features(rows, kind=kind, device=CPU, prompt_length=prompt, width=width, pad_token=1)
    pad = model[0].auto_model.config.pad_token_id
    padded = padded_features(rows, pad_token=pad, side=side, device=CPU, prompt_length=prompt)
    expected, expected_gradients = embeddings_and_gradients(model, padded)
    actual, actual_gradients = embeddings_and_gradients(model, packed)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert expected_gradients.keys() == actual_gradients.keys()
    for name, gradient in expected_gradients.items():
        limit = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            actual_gradients[name], gradient, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, SORTED], ids=["ragged", "sorted"])
@pytest.mark.parametrize("architecture", [*ENCODERS, *CAUSAL, *BOTH])
def test_packed_is_padded(
    make: Callable[..., SentenceTransformer], architecture: str, lengths: list[int], kind: str
) -> None:
    assert_equal(make(architecture), lengths, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", [*CAUSAL, *BOTH, "modernbert"])
def test_left_padding(make: Callable[..., SentenceTransformer], architecture: str, kind: str) -> None:
    assert_equal(make(architecture, "lasttoken"), LENGTHS, kind, side="left")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max", "weightedmean", ("mean", "max")])
def test_every_pooling_with_a_prompt(
    make: Callable[..., SentenceTransformer], pooling: Any, include_prompt: bool, kind: str
) -> None:
    model = make("bert", pooling, include_prompt=include_prompt, dense=True)
    assert_equal(model, [9, 4, 30, 5, 17], kind, prompt=3)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), width=st.integers(1, 64))
def test_any_lengths(make: Callable[..., SentenceTransformer], lengths: list[int], width: int) -> None:
    for kind in KINDS:
        assert_equal(make("bert"), lengths, kind, width=width)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_many_texts_of_one_token(make: Callable[..., SentenceTransformer], lengths: list[int]) -> None:
    """Where segments are told from positions, two texts of one token each look like one of two."""
    for kind in KINDS:
        assert_equal(make("llama"), lengths, kind)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), width=st.integers(1, 80))
def test_rows_hold_each_text_once_and_no_more_than_their_width(lengths: list[int], width: int) -> None:
    rows = pack_rows(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= max(width, *lengths)
    assert sum(2 * total <= width for total in sums) <= 1, "two rows that are half empty fit into one"
    assert rows == pack_rows(list(lengths), width)


def test_first_fit_decreasing() -> None:
    assert pack_rows([3, 8, 5, 2, 2], 10) == [[1, 3], [2, 0, 4]]


def test_tokens_of_packed_and_padded_features() -> None:
    rows = draw_rows([3, 8, 5, 2, 2])
    assert packed_tokens(packed_features(rows, kind="varlen", device=CPU, prompt_length=0)) == (20, 20)
    assert packed_tokens(packed_features(rows, kind="block", device=CPU, prompt_length=0, width=11)) == (20, 22)
    padded = padded_features(rows, pad_token=0, side="right", device=CPU, prompt_length=0)
    assert packed_tokens(padded) == (20, 40)


def test_padded_features_by_side() -> None:
    rows = [np.array([5, 6], dtype=np.int32), np.array([7], dtype=np.int32)]
    right = padded_features(rows, pad_token=9, side="right", device=CPU, prompt_length=4)
    left = padded_features(rows, pad_token=9, side="left", device=CPU, prompt_length=4)
    assert right["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert right["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert left["input_ids"].tolist() == [[5, 6], [9, 7]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert right["prompt_length"] == 4


def test_a_window_sees_so_many_tokens_to_a_side() -> None:
    assert band(4, True, 1, CPU).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert band(3, False, 1, CPU).int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("architecture", [*ENCODERS, *CAUSAL, *BOTH])
def test_supported_models_are_found_by_trial(tmp_path: Path, architecture: str) -> None:
    model = tiny_encoder(tmp_path, architecture).train()
    state = torch.get_rng_state()
    assert packing_kind(model, CPU) == "varlen"
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_the_interface_is_padded(tmp_path: Path) -> None:
    """MPNet adds a bias by relative position to its scores, which neither packing can know."""
    model = tiny_encoder(tmp_path, "mpnet")
    before = model[0].auto_model.config._attn_implementation
    assert packing_kind(model, CPU) is None
    assert model[0].auto_model.config._attn_implementation == before


def test_a_model_whose_text_vectors_depend_on_padding_is_padded(tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path, "bert")
    model.tokenizer.padding_side = "left"  # BERT's learnt positions then start at the padding
    assert packing_kind(model, CPU) is None


def test_the_trial_sees_texts_that_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the texts' borders ignored, no kind would be accepted."""
    real = packing.packed_features

    def leaking(rows: Any, **kwargs: Any) -> Any:
        features = real(rows, **kwargs)
        if "text_ids" in features:
            features["text_ids"] = torch.zeros_like(features["text_ids"])
        else:
            features["segments"] = type(features["segments"])((sum(len(row) for row in rows),), CPU)
        return features

    monkeypatch.setattr(trials, "packed_features", leaking)
    assert packing_kind(tiny_encoder(tmp_path, "bert"), CPU) is None


def test_dropout_is_drawn_from_torchs_generator(make: Callable[..., SentenceTransformer]) -> None:
    """The same seed replays a chunk, another does not."""
    model = make("bert")
    set_attention(model[0].auto_model)
    features = packed_features(draw_rows(LENGTHS), kind="varlen", device=CPU, prompt_length=0)
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(embed(model, features))
    model.eval()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel as torch documents it: (tokens, heads, d), a window of so many keys to the left and right, -1 for all."""
    assert query.dtype == torch.bfloat16
    assert torch.equal(bounds, key_bounds)
    assert longest == longest_key == int(bounds.diff().max())
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    outputs = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        seen = torch.ones_like(behind, dtype=torch.bool)
        if window_size[0] >= 0:
            seen &= behind <= window_size[0]
        if window_size[1] >= 0:
            seen &= -behind <= window_size[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("architecture", [*ENCODERS, *CAUSAL, *BOTH])
def test_what_is_handed_to_the_kernel_of_a_gpu(
    make: Callable[..., SentenceTransformer], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself needs a GPU; here a plain one stands in its place."""
    model = make(architecture)
    set_attention(model[0].auto_model)
    rows = draw_rows(LENGTHS)
    features = packed_features(rows, kind="varlen", device=CPU, prompt_length=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = embed(model, features).float()
        monkeypatch.setattr(kernels, "_each_text", kernels._variable_length)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
        actual = embed(model, features).float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.03)
    # A text too many or too few in view moves some embedding by more.
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda *given, window_size, **named: plain_varlen(*given, window_size=(1, window_size[1]), **named),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float((embed(model, features).float() - expected).detach().abs().max()) > 0.06


def test_gradient_checkpointing_keeps_the_borders(tmp_path: Path) -> None:
    plain, checkpointed = (tiny_encoder(tmp_path / name, "bert").eval() for name in ("a", "b"))
    for model in (plain, checkpointed):
        set_attention(model[0].auto_model)
    checkpointed[0].auto_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.train()
    for module in checkpointed.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    features = packed_features(draw_rows(LENGTHS), kind="varlen", device=CPU, prompt_length=0)
    expected, expected_gradients = embeddings_and_gradients(plain, features)
    actual, actual_gradients = embeddings_and_gradients(checkpointed, features)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_saving_leaves_no_trace(tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path / "made", "bert")
    assert packing_kind(model, CPU) == "varlen"
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    assert not [file for file in (tmp_path / "saved").rglob("*.json") if ATTENTION in file.read_text()]
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert loaded[0].auto_model.config._attn_implementation == "sdpa"
    texts = ["word1 word2 word3", "word4"]
    np.testing.assert_allclose(loaded.encode(texts), model.encode(texts), atol=1e-6)


def test_a_window_that_no_text_reaches_is_no_reason_to_pad(tmp_path: Path) -> None:
    """It is longer than what is tried, and how this architecture counts it is not known: the length of a training decides."""
    model = tiny_encoder(tmp_path, "phi3", sliding_window=1_000, max_position_embeddings=2_048)
    model.max_seq_length = 2_000
    assert packing_kind(model, torch.device("cpu")) is None
    assert packing_kind(model, torch.device("cpu"), longest=1_001) is None
    assert packing_kind(model, torch.device("cpu"), longest=1_000) is not None
