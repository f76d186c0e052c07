"""Dropout that is fast on a CPU, in hidden layers and in attention.

torch draws a double a number on a CPU (about 8 ns each), and its attention leaves the fast kernel as soon as there is
dropout. Here a mask takes 16 bits a number from torch's default generator, so that ``torch.manual_seed`` replays it, for
any number of threads. A rate p becomes the nearest k / 65,536, and what is kept is scaled by exactly
1 / (1 - k / 65,536), so that the expectation is the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEVELS = 1 << 16
_LOWEST = -(1 << 15)
_CACHED_CELLS = 1 << 17


def levels(rate: float) -> int:
    """How many of the 65,536 values of a draw mean 'drop'."""
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate is at least 0 and below 1, not {rate}")
    return min(round(rate * _LEVELS), _LEVELS - 1)


def kept_scale(rate: float) -> float:
    """What kept numbers are multiplied by."""
    return _LEVELS / (_LEVELS - levels(rate))


def draw_kept(shape: torch.Size | tuple[int, ...], rate: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask of ones (kept) and zeros (dropped) from the CPU's default generator."""
    count = 1
    for size in shape:
        count *= size
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    lanes = words.view(torch.int16)[:count].view(shape)
    # Written into floats at once: torch multiplies by a bool mask at a third of the speed.
    return torch.ge(lanes, _LOWEST + levels(rate), out=torch.empty(shape, dtype=dtype))


def dropout(values: Tensor, rate: float) -> Tensor:
    """Each number of a tensor on the CPU dropped with this rate, or scaled."""
    with torch.no_grad():
        mask = draw_kept(values.shape, rate, values.dtype).mul_(kept_scale(rate))
    return values * mask


class FastDropout(nn.Dropout):
    """A dropout layer that draws its mask the fast way while it trains on a CPU, and is torch's own elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        """Numbers of any shape."""
        if self.training and self.p > 0 and input.device.type == "cpu" and input.is_floating_point():
            return dropout(input, self.p)
        return super().forward(input)


class _Attention(torch.autograd.Function):
    """softmax(q k' scale + bias), dropped out, times v; all (heads, tokens, d).

    Some heads at a time, so that their probabilities stay in the cache. What is kept for the backward is one matrix a
    head: the probabilities, negative where they were dropped.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, rate: float
    ) -> Tensor:
        heads, tokens, seen = query.shape[0], query.shape[1], key.shape[1]
        scaled, keys = query * scaling, key.transpose(1, 2)
        signed = query.new_empty((heads, tokens, seen))
        output = _like_tokens(value, tokens)
        for part in _head_blocks(heads, tokens * seen):
            scores = torch.bmm(scaled[part], keys[part])
            if bias is not None:
                scores += bias if len(bias) == 1 else bias[part]
            probabilities = torch.softmax(scores, -1)
            kept = draw_kept(probabilities.shape, rate, probabilities.dtype).mul_(probabilities)
            output[part] = torch.bmm(kept, value[part])
            torch.add(probabilities.neg_(), kept, alpha=2, out=signed[part])
        ctx.save_for_backward(scaled, key, value, signed)
        ctx.scaling, ctx.rate = scaling, rate
        return output.mul_(kept_scale(rate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, key, value, signed = ctx.saved_tensors
        gradient = gradient * kept_scale(ctx.rate)
        heads, tokens, seen = signed.shape
        d_query, d_key, d_value = _like_tokens(scaled, tokens), _like_tokens(key, seen), _like_tokens(value, seen)
        values = value.transpose(1, 2)
        for part in _head_blocks(heads, tokens * seen):
            mine = signed[part]
            d_value[part] = torch.bmm(torch.relu(mine).transpose(1, 2), gradient[part])
            d_probabilities = torch.ops.aten.threshold_backward(torch.bmm(gradient[part], values[part]), mine, 0)
            d_scores = torch.ops.aten._softmax_backward_data(d_probabilities, mine.abs(), -1, mine.dtype)
            d_query[part] = torch.bmm(d_scores, key[part])
            d_key[part] = torch.bmm(d_scores.transpose(1, 2), scaled[part])
        return d_query.mul_(ctx.scaling), d_key, d_value, None, None, None


def _head_blocks(heads: int, cells: int) -> list[slice]:
    """Slices of heads whose score matrices, of so many cells each, fit a core's cache together."""
    step = max(1, _CACHED_CELLS // cells)
    return [slice(start, start + step) for start in range(0, heads, step)]


def _like_tokens(tensor: Tensor, tokens: int) -> Tensor:
    """An empty (heads, tokens, d) that lies in memory as (tokens, heads, d), as the layers around attention have it."""
    return tensor.new_empty((tokens, tensor.shape[0], tensor.shape[2])).transpose(0, 1)


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float | None, rate: float
) -> Tensor:
    """Attention of (batch, heads, tokens, d) on a CPU with dropout of the probabilities.

    ``mask`` is True (or 0, where it is of numbers) for keys that are seen, broadcast to (batch, heads, tokens, tokens).
    """
    batch, heads, tokens, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    if mask is None and causal:
        mask = torch.ones((tokens, tokens), dtype=torch.bool, device=query.device).tril()
    bias = None
    if mask is not None:
        bias = _bias(mask, query.dtype)
        # (1, tokens, tokens) where all are alike, else one a text and head.
        alike = bias.dim() == 2 or (bias.shape[0] == 1 and bias.shape[1] == 1)
        bias = bias.expand(1 if alike else batch, 1 if alike else heads, tokens, -1).reshape(-1, tokens, bias.shape[-1])
    flat = (tensor.reshape(batch * heads, tensor.shape[2], tensor.shape[3]) for tensor in (query, key, value))
    output: Tensor = _Attention.apply(*flat, bias, scale, rate)  # type: ignore[no-untyped-call]
    return output.view(batch, heads, tokens, -1)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    # A finite number, so that a padding token that sees no key does not become NaN.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min / 2)


def use_fast_dropout(model: nn.Module) -> None:
    """Let a model's dropout layers draw their masks the fast way while they train on a CPU.

    The dropout inside attention comes with :mod:`nearfield.encoders.attention`, which
    :func:`nearfield.encoders.packing.packing_kind` puts in place where it is found right. Only the class of a layer
    changes: weights, their names and saved files do not. On a GPU the layers are torch's own.
    """
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = FastDropout
