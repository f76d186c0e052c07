"""The fast dropout drops at its rate, independently, and the same again for the same seed.

A table in bfloat16 has the gradient of one in float64, but for one rounding.

Sparse gradients of embedding tables add up to the dense ones.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from nearfield.encoders.kernels import (
    ATTENTION,
    FastDropout,
    _Attention,
    _head_blocks,
    add_tables_in_float32,
    attention_with_dropout,
    draw_kept,
    dropout,
    kept_scale,
    levels,
    sparse_embedding_gradients,
    use_fast_dropout,
)
from nearfield.encoders.packing import embed, packed_features, padded_features
from nearfield.encoders.trials import packing_kind
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


@pytest.fixture()
def table() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(5, 8, padding_idx=3)


def gradient(table: nn.Embedding, ids: Tensor, upstream: Tensor) -> Tensor:
    rows = table(ids)
    rows.backward(upstream.to(rows.dtype))
    assert table.weight.grad is not None
    return table.weight.grad.double()


def test_many_tokens_of_one_row(table: nn.Embedding) -> None:
    ids = torch.cat([torch.zeros(2000, dtype=torch.long), torch.arange(5)]).reshape(5, -1)
    upstream = torch.randn(*ids.shape, 8).add(0.3).bfloat16()
    expected = gradient(copy.deepcopy(table).double(), ids, upstream.double())
    plain, ours = copy.deepcopy(table).bfloat16(), table.bfloat16()
    add_tables_in_float32(ours)
    assert torch.equal(ours(ids), plain(ids))
    scale = expected.abs().max()
    assert (gradient(ours, ids, upstream) - expected).abs().max() / scale < 2**-8
    assert (gradient(plain, ids, upstream) - expected).abs().max() / scale > 0.05, "what this is for"
    assert ours.weight.grad is not None and ours.weight.grad[3].count_nonzero() == 0


def test_other_tables_do_as_before(table: nn.Embedding) -> None:
    whole, frozen = copy.deepcopy(table), copy.deepcopy(table).bfloat16().requires_grad_(False)
    add_tables_in_float32(nn.ModuleList([whole, frozen]))
    ids = torch.arange(5)
    assert torch.equal(gradient(whole, ids, torch.ones(5, 8)), gradient(table, ids, torch.ones(5, 8)))
    assert not frozen(ids).requires_grad


class Words(nn.Module):
    """A large table, a small one, and a layer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(5000, 3, padding_idx=0)
        self.places = nn.Embedding(10, 3)
        self.layer = nn.Linear(3, 2)
        self.tied = tied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = self.words(ids) + self.places(ids % 10)
        plain = self.layer(values).sin()
        return plain.sum() + (values @ self.words.weight[:7].T).cos().sum() if self.tied else plain.sum()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_dense_ones(tied: bool, kept: bool) -> None:
    """With words that come often, padding, several chunks in one backward or in several, over two steps."""
    torch.manual_seed(0)
    dense, sparse = Words(tied), Words(tied)
    sparse.load_state_dict(dense.state_dict())
    sparse_embedding_gradients(sparse)
    sparse_embedding_gradients(sparse)
    assert sparse.words.sparse
    assert not sparse.places.sparse
    for seed in range(2):
        chunks = torch.randint(0, 40, (4, 50), generator=torch.Generator().manual_seed(seed))
        for model in (dense, sparse):
            model.zero_grad()
            if kept:
                torch.stack([model(chunk) for chunk in chunks]).sum().backward()
            else:
                for chunk in chunks:
                    model(chunk).backward()
        for (name, one), other in zip(dense.named_parameters(), sparse.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            assert not other.grad.is_sparse
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_the_same_bits_each_time() -> None:
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Words()
        sparse_embedding_gradients(model)
        for chunk in torch.randint(0, 40, (4, 5000), generator=torch.Generator().manual_seed(1)):
            model(chunk).backward()
        gradients.append(model.words.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_a_frozen_table_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(5000, 4))
    model[0].weight.requires_grad_(False)
    sparse_embedding_gradients(model)
    assert not model[0].sparse
