"""Losses on tokens as an objective: means over all tokens, whoever holds which rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from nearfield.errors import BadInputError
from nearfield.methods.masked_tokens import MaskedTokensConfig, TokenLosses
from nearfield.objectives import CombinedConfig, ContrastiveBatch, ObjectiveConfig
from nearfield.objectives.config import Reading, SimCSEConfig

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
    assert (masked.reading, masked.token_task) == (Reading(views=1), masked)
    assert masked.summary == "masked_tokens, next, 0.2 of the tokens, a decoder that does not see 0.6"
    assert (SimCSEConfig().reading, SimCSEConfig().token_task) == (Reading(views=2), None)
    both = PARSE({"kind": "combined", "parts": [{"objective": {"kind": "infonce"}}, {"objective": masked}]})
    assert isinstance(both, CombinedConfig) and both.token_task == masked
    assert both.readings({"pairs": "retrieval", "plain": "text"}) == {"pairs": Reading(), "plain": Reading(views=1)}
    with pytest.raises(ValidationError, match="only one part can be masked_tokens"):
        PARSE({"kind": "combined", "parts": [{"objective": masked}] * 2})
