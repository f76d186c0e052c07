"""The fast dropout drops at its rate, independently, and the same again for the same seed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from nearfield.encoders.attention import ATTENTION
from nearfield.encoders.dropout import (
    FastDropout,
    _Attention,
    _head_blocks,
    attention_with_dropout,
    draw_kept,
    dropout,
    kept_scale,
    levels,
    use_fast_dropout,
)
from nearfield.encoders.packing import embed, packed_features, packing_kind, padded_features
from tests.encoders.tiny import draw_rows, tiny_encoder

CPU = torch.device("cpu")
DRAWS = 1 << 20


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003, 0.9])
def test_the_rate(rate: float) -> None:
    """A two-sided binomial test; its seed is fixed, so it cannot fail by chance."""
    assert abs(levels(rate) / 65536 - rate) <= 0.5 / 65536
    dropped = DRAWS - int(draw_kept((DRAWS,), rate).sum())
    assert stats.binomtest(dropped, DRAWS, levels(rate) / 65536).pvalue > 0.001


def test_each_lane_of_a_draw_has_the_rate() -> None:
    """Four masks come from one draw of 64 bits; also the topmost bit must be random."""
    kept = draw_kept((DRAWS,), 0.5).view(-1, 4)
    for lane in kept.unbind(1):
        assert stats.binomtest(int(lane.sum()), len(lane), 0.5).pvalue > 0.001


def test_neighbours_are_independent() -> None:
    """All 16 patterns of four neighbours, within a draw and across draws, come as often as they should."""
    kept = draw_kept((DRAWS,), 0.1).long()
    chance = 1 - levels(0.1) / 65536
    for shift in range(4):
        groups = kept[shift : shift + DRAWS - 4].view(-1, 4)
        counts = torch.bincount(groups @ torch.tensor([8, 4, 2, 1]), minlength=16).tolist()
        expected = [
            len(groups) * math.prod(chance if number >> bit & 1 else 1 - chance for bit in range(4))
            for number in range(16)
        ]
        assert stats.chisquare(counts, expected).pvalue > 0.001


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 384])
def test_no_serial_correlation(lag: int) -> None:
    kept = draw_kept((DRAWS,), 0.1).double()
    kept -= kept.mean()
    correlation = float((kept[lag:] * kept[:-lag]).mean() / kept.square().mean())
    assert abs(correlation) < 4 / math.sqrt(DRAWS)


def test_masks_one_after_another_are_independent() -> None:
    first, second = (draw_kept((DRAWS,), 0.1).bool() for _ in range(2))
    both = int((~first & ~second).sum())
    assert stats.binomtest(both, DRAWS, (levels(0.1) / 65536) ** 2).pvalue > 0.001


def test_a_seed_replays_the_mask_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    masks = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(9)
            masks.append(draw_kept((333, 77), 0.1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], draw_kept((333, 77), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_zero_or_scaled_and_so_are_their_gradients(dtype: torch.dtype) -> None:
    values = torch.ones((7, 5, 3), dtype=dtype, requires_grad=True)
    result = dropout(values, 0.25)
    result.sum().backward()
    assert result.dtype == dtype
    assert set(result.detach().unique().tolist()) == {0.0, torch.tensor(kept_scale(0.25), dtype=dtype).item()}
    assert values.grad is not None
    assert torch.equal(values.grad, result.detach())


def test_the_scale_is_that_of_the_rate_in_effect() -> None:
    assert kept_scale(0.1) == 65536 / (65536 - 6554)
    assert kept_scale(0.0) == 1.0
    with pytest.raises(ValueError, match="below 1"):
        levels(1.0)


def test_rate_zero_in_evaluation_and_in_training() -> None:
    values = torch.randn(50)
    assert torch.equal(FastDropout(0.5).eval()(values), values)
    assert torch.equal(FastDropout(0.0).train()(values), values)
    assert not torch.equal(FastDropout(0.5).train()(values), values)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None, kept: torch.Tensor
) -> torch.Tensor:
    """The textbook's attention with a given mask of kept probabilities."""
    scores = query @ key.transpose(-1, -2) * 0.3
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) * kept) @ value


@pytest.mark.parametrize("case", ["all", "causal", "text mask", "shared mask"])
def test_attention_and_its_gradients(case: str) -> None:
    """Against the textbook in float64, with the very mask that was drawn."""
    batch, heads, tokens, rate = 2, 3, 9, 0.3
    query, key, value = (
        torch.randn((batch, heads, tokens, 4), dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    masks = {
        "all": None,
        "causal": None,
        "text mask": torch.arange(tokens) < torch.tensor([9, 4])[:, None, None, None],
        "shared mask": torch.ones((tokens, tokens), dtype=torch.bool).triu(),
    }
    mask = masks[case]
    seen = torch.ones((tokens, tokens), dtype=torch.bool).tril() if case == "causal" else mask
    torch.manual_seed(3)
    kept = draw_kept((batch * heads, tokens, tokens), rate, torch.float64).view(batch, heads, tokens, tokens)
    expected = plain_attention(query, key, value, seen, kept * kept_scale(rate))
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    torch.manual_seed(3)
    actual = attention_with_dropout(query, key, value, mask, case == "causal", 0.3, rate)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), (query, key, value))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_some_heads_at_a_time() -> None:
    """Longer texts are done in several blocks of heads; at rate zero their size cannot matter."""
    assert _head_blocks(12, 256 * 256) == [slice(start, start + 2) for start in range(0, 12, 2)]
    assert _head_blocks(5, 1 << 30) == [slice(start, start + 1) for start in range(5)]
    query, key, value = (torch.randn((5, 300, 4), dtype=torch.float64, requires_grad=True) for _ in range(3))
    actual = _Attention.apply(query, key, value, None, 0.3, 0.0)
    expected = plain_attention(query, key, value, None, torch.ones(()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weights).sum(), (query, key, value)),
        torch.autograd.grad((expected * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_the_mean_over_masks_is_attention_without_dropout(packed: bool) -> None:
    """Attention is linear in its probabilities, so the mean over many masks tends to the plain output."""
    query, key, value = (torch.randn((1, 2, 6, 4)) for _ in range(3))
    draws = torch.stack([attention_with_dropout(query, key, value, None, packed, None, 0.1) for _ in range(4000)])
    plain = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=packed)
    error = (draws.mean(0) - plain).abs() / (draws.std(0) / math.sqrt(len(draws)) + 1e-7)
    assert float(error.max()) < 4.5


@pytest.mark.parametrize("kind", ["padded", "varlen", "block"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen2"])
def test_models_replay_and_agree_without_dropout(tmp_path: Path, architecture: str, kind: str) -> None:
    model = tiny_encoder(tmp_path, architecture, attention_dropout=0.2)
    rows = draw_rows([9, 1, 30, 17])
    padded = padded_features(rows, pad_token=0, side="right", device=CPU, prompt_length=0)
    features = padded if kind == "padded" else packed_features(rows, kind=kind, device=CPU, prompt_length=0)
    before = embed(model.eval(), padded)
    names = [*model.state_dict()]
    use_fast_dropout(model)
    assert packing_kind(model, CPU) == "varlen"
    assert [*model.state_dict()] == names
    assert not [module for module in model.modules() if type(module) is nn.Dropout]
    torch.testing.assert_close(embed(model, features), before, rtol=0, atol=1e-5)
    model.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(embed(model, features))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-4)
    assert all(bool(result.isfinite().all()) for result in results)


def test_saved_files_are_the_same(tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path / "made", "bert")
    model.save_pretrained(str(tmp_path / "before"), create_model_card=False)
    use_fast_dropout(model)
    assert packing_kind(model, CPU) == "varlen"
    model.save_pretrained(str(tmp_path / "after"), create_model_card=False)
    files = sorted(file.relative_to(tmp_path / "before") for file in (tmp_path / "before").rglob("*") if file.is_file())
    assert files
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes(), file
    assert model[0].auto_model.config._attn_implementation == ATTENTION


def test_autocast_and_checkpointing(tmp_path: Path) -> None:
    """Gradient checkpointing replays the masks of the forward, since it restores torch's generator."""
    gradients = []
    for name in ("plain", "checkpointed"):
        model = tiny_encoder(tmp_path / name, "bert").train()
        use_fast_dropout(model)
        assert packing_kind(model, CPU) == "varlen"
        if name == "checkpointed":
            model[0].auto_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(2)
        features = packed_features(draw_rows([9, 1, 30]), kind="varlen", device=CPU, prompt_length=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = embed(model, features)
        embeddings.float().square().cumsum(1).sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key
