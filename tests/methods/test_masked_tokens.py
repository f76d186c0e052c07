"""Hidden tokens: their shares, the tokens that are never hidden, and that they depend on the text's numbers alone.

Losses on tokens: against transformers' own language models, and against plain loops; as an objective, means over all tokens, whoever
holds which rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor

from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.encoders import EncoderConfig
from nearfield.encoders.load import build_encoder
from nearfield.encoders.packing import TARGETS, packed_features, padded_features
from nearfield.errors import BadInputError
from nearfield.methods.masked_tokens import (
    NOTHING,
    Decoder,
    DecoderConfig,
    MaskedTokens,
    MaskedTokensConfig,
    Masking,
    TokenLosses,
    mask_token,
    seen_by_decoder,
)
from nearfield.objectives import CombinedConfig, ContrastiveBatch, ObjectiveConfig
from nearfield.objectives.config import Reading, SimCSEConfig
from nearfield.provenance import generator
from tests.encoders.tiny import draw_rows, save_tiny, tiny_config

SPECIAL = np.array([0, 2, 3], dtype=np.int64)
CPU = torch.device("cpu")


def masking(config: MaskedTokensConfig) -> Masking:
    return Masking(config, mask=4, vocabulary=200, special=SPECIAL)


def text(length: int, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).integers(5, 200, length).astype(np.int32)


def test_shares_and_what_becomes_of_hidden_tokens() -> None:
    row = text(40_000)
    config = MaskedTokensConfig(share=0.2, random=0.1, kept=0.15)
    found = masking(config).text(row, generator(0, "x"), 0)
    hidden = found.labels != NOTHING
    assert abs(hidden.mean() - 0.2) < 4 * (0.2 * 0.8 / 40_000) ** 0.5
    assert np.array_equal(found.labels[hidden], row[hidden])
    assert np.array_equal(found.tokens[~hidden], row[~hidden])
    shares = {
        "mask": (found.tokens[hidden] == 4).mean(),
        "kept": (found.tokens[hidden] == row[hidden]).mean(),
    }
    assert abs(shares["mask"] - 0.75) < 0.02
    assert abs(shares["kept"] - (0.15 + 0.1 / 200)) < 0.02
    plain = masking(MaskedTokensConfig(share=0.2, random=0, kept=0)).text(row, generator(0, "x"), 0)
    assert set(plain.tokens[plain.labels != NOTHING]) == {4}


@pytest.mark.parametrize(("predict", "prompt", "first"), [("masked", 0, 0), ("next", 0, 1), ("masked", 3, 3)])
def test_what_is_never_hidden(predict: str, prompt: int, first: int) -> None:
    row = text(30)
    row[10], row[-1] = 2, 3
    config = MaskedTokensConfig.model_validate({"predict": predict, "share": 0.999})
    hidden = np.zeros(30, dtype=bool)
    for seed in range(20):
        found = masking(config).text(row, generator(seed, "x"), prompt)
        hidden |= found.labels != NOTHING
        words = found.words
    wanted = np.ones(30, dtype=bool)
    wanted[:first], wanted[10], wanted[-1] = False, False, False
    assert np.array_equal(hidden, wanted)
    assert np.array_equal(words, wanted)


def test_a_function_of_seed_step_and_text_alone() -> None:
    rows = [text(9, 1), text(4, 2), text(6, 3)]
    keys = [(7, 3, item, 0) for item in (11, 12, 13)]
    config = MaskedTokensConfig(share=0.5, decoder=DecoderConfig())

    def drawn(which: list[int], side: str = "right", step: int = 3) -> list[list[int]]:
        read, targets = masking(config).chunk(
            [rows[i] for i in which],
            [(seed, step, item, prompt) for seed, _, item, prompt in (keys[i] for i in which)],
            [True] * len(which),
            0,
            side,
            CPU,
        )
        longest = max(len(rows[i]) for i in which)
        for line, i in enumerate(which):
            length = len(rows[i])
            place = slice(longest - length, longest) if side == "left" else slice(0, length)
            assert targets.ids is not None and targets.seen is not None
            assert targets.ids[line, place].tolist() == rows[i].tolist()
            outside = torch.ones(longest, dtype=torch.bool)
            outside[place] = False
            assert not targets.seen[line][:, outside].any() and not targets.seen[line][outside].any()
            assert (targets.labels[line, outside] == NOTHING).all()
        return [row.tolist() for row in read]

    together = drawn([0, 1, 2])
    assert [drawn([i])[0] for i in range(3)] == together
    assert drawn([2, 0])[::-1] == [together[0], together[2]]
    assert drawn([0, 1, 2], "left") == together
    assert drawn([0, 1, 2], step=4) != together


def test_texts_that_are_not_chosen_stay() -> None:
    rows = [text(9, 1), text(4, 2)]
    read, targets = masking(MaskedTokensConfig(share=0.9)).chunk(
        rows, [(0, 0, 0, 0), (0, 0, 1, 0)], [False, True], 0, "right", CPU
    )
    assert read[0].tolist() == rows[0].tolist() and read[1].tolist() != rows[1].tolist()
    assert (targets.labels[0] == NOTHING).all() and (targets.labels[1] != NOTHING).any()
    assert targets.ids is None


def test_what_a_decoder_sees() -> None:
    seen = seen_by_decoder(300, 0.6, generator(0, "x"))
    assert not seen.diagonal().any()
    assert abs(seen.sum() / (300 * 299) - 0.4) < 0.01
    assert not (seen == seen[0]).all(), "each place has its own"
    assert not seen_by_decoder(10, 1.0, generator(0, "x")).any()


def test_shares_that_contradict() -> None:
    with pytest.raises(ValidationError, match="more than all masked tokens"):
        MaskedTokensConfig(random=0.6, kept=0.6)


ROWS = draw_rows([9, 3, 14])
KEYS = [(5, 2, item, 0) for item in range(3)]


def save_language_model(folder: Path, architecture: str, **changes: Any) -> Any:
    """A whole language model with random weights, and a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    save_tiny_bert(folder)
    config = tiny_config(architecture, **changes)
    kind = AutoModelForMaskedLM if architecture in MASKED else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


MASKED = ("bert", "roberta", "mpnet", "modernbert")


def built(folder: Path, **settings: Any) -> Any:
    return build_encoder(EncoderConfig(model=str(folder), **settings), "cpu").model.eval()


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        *((name, True) for name in (*MASKED, "llama", "qwen3", "gemma2", "gpt2", "bloom")),
        *((name, False) for name in ("llama", "gpt_neox", "phi")),
    ],
)
def test_the_head_is_that_of_the_language_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    whole = save_language_model(tmp_path, architecture, tie_word_embeddings=tied)
    model = built(tmp_path)
    task = MaskedTokens(model, MaskedTokensConfig(), str(tmp_path), 0)
    ids = torch.from_numpy(ROWS[0]).long()[None]
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits[0]
        states = model[0].auto_model(input_ids=ids).last_hidden_state[0]
        found = task.head(states)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    table = model[0].auto_model.get_input_embeddings().weight
    assert any(parameter is table for parameter in task.head.parameters()) is tied
    own = {name for name, parameter in task.named_parameters() if parameter is not table}
    assert all(dict(task.named_parameters())[name].requires_grad for name in own)
    with torch.no_grad():
        assert task.head(states[:0]).shape == (0, wanted.shape[1])


def test_a_base_without_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The table of embeddings stands in for a matrix that is not there; the rest begins by the seed, and is trained."""
    folder = save_tiny(tmp_path, "llama", tie_word_embeddings=False)
    model = built(folder)
    task = MaskedTokens(model, MaskedTokensConfig(), str(folder), 0)
    table = model[0].auto_model.get_input_embeddings().weight
    assert [parameter is table for parameter in task.head.parameters()] == [True]
    bert = save_tiny_bert(tmp_path / "bert")
    heads = []
    for seed, adapter in ((0, None), (0, {"kind": "lora", "r": 2}), (1, None)):
        encoder = built(bert, adapter=adapter)
        with caplog.at_level("INFO", "nearfield.methods"):
            heads.append(MaskedTokens(encoder, MaskedTokensConfig(), str(bert), seed).head)
        assert "cls.predictions.transform.dense.weight" in caplog.text
        table = encoder[0].auto_model.get_input_embeddings().weight
        assert table.requires_grad is (adapter is None)
        assert all(p.requires_grad for p in heads[-1].parameters() if p is not table)
    dense = [head.head.cls.predictions.transform.dense.weight for head in heads]
    assert torch.equal(dense[0], dense[1]) and not torch.equal(dense[0], dense[2])


def test_with_an_adapter_a_head_that_was_learnt_stays(tmp_path: Path) -> None:
    save_language_model(tmp_path, "bert")
    model = built(tmp_path, adapter={"kind": "lora", "r": 2})
    task = MaskedTokens(model, MaskedTokensConfig(decoder=DecoderConfig()), str(tmp_path), 0)
    assert not any(parameter.requires_grad for parameter in task.head.parameters())
    assert task.decoder is not None and all(parameter.requires_grad for parameter in task.decoder.parameters())


def features_of(model: Any, task: MaskedTokens, packing: str | None = None, side: str = "right") -> Any:
    read, targets = task.hide(ROWS, KEYS, [True] * 3, 0, side, CPU)
    if packing is None:
        made = padded_features(read, pad_token=0, side=side, device=CPU, prompt_length=0)
    else:
        made = packed_features(read, kind=packing, device=CPU, prompt_length=0)  # type: ignore[arg-type]
    return read, targets, {**made, TARGETS: targets}


@pytest.mark.parametrize(
    ("architecture", "predict", "side"),
    [("bert", "masked", "right"), ("llama-both", "next", "right"), ("llama-both", "next", "left")],
)
def test_the_loss_is_that_of_a_plain_loop(tmp_path: Path, architecture: str, predict: str, side: str) -> None:
    whole = save_language_model(tmp_path, architecture)
    model = built(tmp_path)
    model.tokenizer.padding_side = side
    task = MaskedTokens(model, MaskedTokensConfig.model_validate({"predict": predict, "share": 0.5}), str(tmp_path), 0)
    read, targets, features = features_of(model, task, side=side)
    with torch.no_grad():
        found = task(model, features)
    assert found.shape == (3, 32 + 2)
    for line, (row, masked) in enumerate(zip(ROWS, read, strict=True)):
        with torch.no_grad():
            logits = whole(input_ids=torch.from_numpy(masked).long()[None]).logits[0].double().log_softmax(-1)
        total, count = 0.0, 0
        for place, label in enumerate(targets.labels[line][-len(row) :] if side == "left" else targets.labels[line]):
            if place < len(row) and int(label) != NOTHING:
                assert int(label) == int(row[place])
                total -= float(logits[place - (predict == "next"), int(label)])
                count += 1
        assert count == int(found[line, 33])
        assert math.isclose(total, float(found[line, 32]), rel_tol=1e-4, abs_tol=1e-4)
    assert int(found[:, 33].sum()) > 5


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "varlen"), ("bert", "block"), ("llama-both", "block")])
def test_packed_is_padded(tmp_path: Path, architecture: str, kind: str) -> None:
    from nearfield.encoders.kernels import set_attention

    save_language_model(tmp_path, architecture)
    model = built(tmp_path)
    task = MaskedTokens(model, MaskedTokensConfig(share=0.4, decoder=DecoderConfig()), str(tmp_path), 0)
    with torch.no_grad():
        padded = task(model, features_of(model, task)[2])
        if kind == "varlen":
            set_attention(model[0].auto_model)
        packed = task(model, features_of(model, task, kind)[2])
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)


def test_a_decoder_is_what_it_says() -> None:
    torch.manual_seed(0)
    decoder = Decoder(8, 2, 3, 16).double()
    vectors, tokens = torch.randn(1, 8).double(), torch.randn(1, 5, 8).double()
    seen = torch.rand(1, 5, 5) < 0.5
    seen[0].fill_diagonal_(False)
    found = decoder(vectors, tokens, torch.arange(5)[None], seen)[0]
    vector = decoder.vector_norm(vectors)[0]
    for place in range(5):
        query = vector + decoder.positions.weight[place]
        context = [vector]
        for other in range(5):
            token = decoder.token_norm(tokens[0, other]) + decoder.positions.weight[other]
            context += [token] if seen[0, place, other] else []
        states = torch.stack(context)
        heads = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            q, k, v = decoder.query(query)[part], decoder.key(states)[:, part], decoder.value(states)[:, part]
            heads.append((k @ q / 2.0).softmax(0) @ v)
        hidden = decoder.attention_norm(query + decoder.attended(torch.cat(heads)))
        inside = torch.nn.functional.gelu(decoder.wide(hidden))
        wanted = decoder.output_norm(hidden + decoder.narrow(inside))
        torch.testing.assert_close(found[place], wanted)


def test_a_decoder_sees_no_token_that_it_must_tell(tmp_path: Path) -> None:
    """Its loss at a place depends on the embedding and the tokens seen there: on nothing else of the text."""
    save_language_model(tmp_path, "bert")
    model = built(tmp_path)
    task = MaskedTokens(model, MaskedTokensConfig(decoder=DecoderConfig(share=0.5)), str(tmp_path), 0)
    _, targets, _ = features_of(model, task)
    assert task.decoder is not None and targets.ids is not None and targets.seen is not None
    tokens = model[0].auto_model.get_input_embeddings()(targets.ids).detach().requires_grad_()
    vectors = torch.randn(3, 32, requires_grad=True)
    states = task.decoder(vectors, tokens, torch.arange(14).expand(3, -1), targets.seen)
    weights = torch.linspace(-1, 2, 32).sin()
    for place in range(9):
        by_token, by_vector = torch.autograd.grad(
            (states[0, place] * weights).sum(), [tokens, vectors], retain_graph=True
        )
        reached = by_token[0].abs().amax(1) > 0
        assert torch.equal(reached, targets.seen[0, place])
        assert bool(by_vector[0].abs().max() > 0) and not bool(by_vector[1:].abs().max() > 0)


def test_a_decoder_learns_to_use_the_embedding(tmp_path: Path) -> None:
    """After some steps the loss is higher where the embedding is taken away."""
    folder = save_tiny_bert(tmp_path, dropout=0.0)
    model = built(folder)
    task = MaskedTokens(model, MaskedTokensConfig(share=0.3, decoder=DecoderConfig(share=0.7)), str(folder), 0)
    parameters = {id(p): p for p in [*model.parameters(), *task.parameters()] if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    random = np.random.default_rng(0)
    # A text is one word many times: whoever knows the embedding knows all of it.
    rows = [np.full(8, random.integers(5, 205), dtype=np.int32) for _ in range(32)]

    def loss(step: int, vectors_away: bool = False) -> float:
        read, targets = task.hide(rows, [(0, step, item, 0) for item in range(32)], [True] * 32, 0, "right", CPU)
        features = padded_features(read, pad_token=0, side="right", device=CPU, prompt_length=0)
        found = task(model, {**features, TARGETS: targets})
        total = found[:, -4].sum() / found[:, -3].sum() + found[:, -2].sum() / found[:, -1].sum()
        if not vectors_away:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return float((found[:, -2].sum() / found[:, -1].sum()).detach())

    for step in range(60):
        loss(step)
    assert task.decoder is not None
    with torch.no_grad():
        kept = loss(100, vectors_away=True)
        decoder = task.decoder.forward
        task.decoder.forward = lambda vectors, *rest: decoder(torch.zeros_like(vectors), *rest)  # type: ignore[method-assign]
        away = loss(100, vectors_away=True)
    assert away > kept + 0.2, (kept, away)


def test_what_cannot_be(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    model = built(folder)
    assert mask_token(model.tokenizer, None) == 4
    assert mask_token(model.tokenizer, "word3") == 8
    with pytest.raises(BadInputError, match="no token of"):
        mask_token(model.tokenizer, "<absent>")
    with pytest.raises(BadInputError, match="3 heads do not divide"):
        MaskedTokens(model, MaskedTokensConfig(decoder=DecoderConfig(heads=3)), str(folder), 0)
    from sentence_transformers import SentenceTransformer

    wide = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32, ("mean", "cls"))], device="cpu")
    with pytest.raises(BadInputError, match="a pooling of 32 dimensions, the model's has 64"):
        MaskedTokens(wide, MaskedTokensConfig(decoder=DecoderConfig()), str(folder), 0)


PARSE = TypeAdapter(ObjectiveConfig).validate_python


def batch(losses: Tensor, weights: Tensor | None = None, rows: Tensor | None = None) -> ContrastiveBatch:
    count = len(losses)
    vectors, numbers = torch.randn(count, 4, dtype=torch.float64), torch.arange(count)
    return ContrastiveBatch(
        vectors, vectors, numbers, numbers >= 0, numbers, numbers[:, None], rows, weights=weights, token_losses=losses
    )


LOSSES = torch.tensor([[6.0, 3, 8, 4], [1.0, 1, 5, 5], [0.0, 0, 2, 1], [9.0, 2, 0, 0]], dtype=torch.float64)


def test_the_mean_is_over_all_tokens() -> None:
    losses = LOSSES.clone().requires_grad_()
    found = TokenLosses([1.0, 0.5])(batch(losses))
    loss = found.total / found.denominator
    assert float(loss.detach()) == pytest.approx(16 / 6 + 0.5 * 15 / 10)
    assert float(found.rows.sum() / found.denominator) == pytest.approx(float(loss.detach()))
    (gradient,) = torch.autograd.grad(loss, losses)
    assert torch.allclose(gradient, torch.tensor([1 / 6, 0, 0.05, 0], dtype=torch.float64).expand(4, -1))


def test_ranks_add_up_and_weights_count() -> None:
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    whole = TokenLosses([1.0, 1.0])(batch(LOSSES, weights))
    mean = float(whole.total) / whole.denominator
    assert mean == pytest.approx((2 * 1 + 0 + 0.5 * 9) / (2 + 0 + 1) + (2 * 5 + 2 + 0) / (10 + 1))
    parts = [TokenLosses([1.0, 1.0])(batch(LOSSES, weights, torch.tensor(rows))) for rows in ([0, 2], [1, 3])]
    assert sum(float(part.total) for part in parts) / whole.denominator == pytest.approx(mean)
    assert {part.denominator for part in parts} == {whole.denominator}


def test_a_batch_that_hides_nothing_costs_nothing() -> None:
    found = TokenLosses([1.0])(batch(torch.zeros(3, 2, dtype=torch.float64)))
    assert float(found.total) == 0.0


def test_figures_are_those_of_a_token() -> None:
    figures = TokenLosses([1.0, 0.5]).watch(batch(LOSSES))
    assert figures == pytest.approx(
        {"loss/masked": 16 / 6, "tokens/masked": 6, "loss/decoded": 1.5, "tokens/decoded": 10}
    )
    with pytest.raises(BadInputError, match="no losses of tokens"):
        TokenLosses([1.0])(replace(batch(LOSSES), token_losses=None))


def test_settings() -> None:
    masked = PARSE({"kind": "masked_tokens", "predict": "next", "decoder": {"share": 0.6}})
    assert isinstance(masked, MaskedTokensConfig)
    assert masked.reading == Reading(views=1) and masked.token_task is not None
    assert masked.summary == "masked_tokens, next, 0.2 of the tokens, a decoder that does not see 0.6"
    assert (SimCSEConfig().reading, SimCSEConfig().token_task) == (Reading(views=2), None)
    both = PARSE({"kind": "combined", "parts": [{"objective": {"kind": "infonce"}}, {"objective": masked}]})
    assert isinstance(both, CombinedConfig) and both.token_task is not None
    assert both.readings({"pairs": "retrieval", "plain": "text"}) == {"pairs": Reading(), "plain": Reading(views=1)}
    with pytest.raises(ValidationError, match="only one part can be masked_tokens"):
        PARSE({"kind": "combined", "parts": [{"objective": masked}] * 2})
