"""Replacements of torch's operations in a loaded model: attention without padding, fast dropout, gradients of embedding tables.

transformers hands every model's queries, keys and values to the function that its config names. Ours sees from the ``segments``
of a call where texts begin and end and lets each attend to itself alone: by torch's variable-length kernel (or flash-attn's, where it
is installed) on a GPU in half precision, by one call a text on a CPU. A call without segments is an ordinary padded one and goes
to transformers' own function.

torch draws a double a number for dropout on a CPU (about 8 ns each), and its attention leaves the fast kernel as soon as there is
dropout. Here a mask takes 16 bits a number from torch's default generator, so that ``torch.manual_seed`` replays it, for any
number of threads. A rate p becomes the nearest k / 65,536, and what is kept is scaled by exactly 1 / (1 - k / 65,536), so
that the expectation is the input.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

_LEVELS = 1 << 16
_LOWEST = -(1 << 15)
_CACHED_CELLS = 1 << 17


def levels(rate: float) -> int:
    """How many of the 65,536 values of a draw mean 'drop'."""
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate is at least 0 and below 1, not {rate}")
    return min(round(rate * _LEVELS), _LEVELS - 1)


def kept_scale(rate: float) -> float:
    """The factor of kept numbers."""
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

    Some heads at a time, so that their probabilities stay in the cache. One matrix a head is kept for the backward: the
    probabilities, negative where they were dropped.
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
            dropped_out = draw_kept(probabilities.shape, rate, probabilities.dtype).mul_(probabilities)
            output[part] = torch.bmm(dropped_out, value[part])
            torch.add(probabilities.neg_(), dropped_out, alpha=2, out=signed[part])
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

    The dropout inside attention comes with :mod:`nearfield.encoders.kernels`, which
    :func:`nearfield.encoders.trials.packing_kind` puts in place where it is found right. Only the class of a layer
    changes: weights, their names and saved files do not. On a GPU the layers are torch's own.
    """
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = FastDropout


class _LookUp(torch.autograd.Function):
    """Rows of a table, whose gradient is added in float32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.type, ctx.padding = weight.shape, weight.dtype, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, device=ids.device)
        total.index_add_(0, ids.reshape(-1), gradients[0].reshape(-1, ctx.shape[1]).float())
        if ctx.padding is not None:
            total[ctx.padding] = 0
        return total.to(ctx.type), None, None


def add_tables_in_float32(model: nn.Module) -> None:
    """Let tables in half precision add their gradients in float32; those in float32 do as before."""
    for module in model.modules():
        if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
            module.forward = _look_up(module)  # type: ignore[method-assign]


def _look_up(module: nn.Embedding) -> Any:
    plain = module.forward

    def forward(ids: Tensor) -> Tensor:
        weight = module.weight
        if weight.dtype not in (torch.bfloat16, torch.float16) or not weight.requires_grad or module.sparse:
            return plain(ids)
        rows: Tensor = _LookUp.apply(weight, ids, module.padding_idx)  # type: ignore[no-untyped-call]
        return rows

    return forward


_MANY_ROWS = 4096


def sparse_embedding_gradients(model: nn.Module) -> None:
    """Let large embedding tables pass sparse gradients through a backward, which become dense once, in ``.grad``.

    Optimisers and clipping see dense gradients as before. For models whose parameters are whole on each process: sharding
    backends hook into gradients themselves.
    """
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.num_embeddings < _MANY_ROWS or module.sparse:
            continue
        # A frozen table has no gradient, and takes no hook.
        if module.weight.requires_grad:
            module.sparse = True
            module.weight.register_post_accumulate_grad_hook(_densify)  # type: ignore[no-untyped-call]


def _densify(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()


ATTENTION = "nearfield"


@dataclass(frozen=True)
class Segments:
    """Where texts that lie end to end begin and end."""

    lengths: tuple[int, ...]
    """Tokens of each text."""
    device: torch.device

    @cached_property
    def bounds(self) -> Tensor:
        """(n + 1,) int32: the first token of each text, and the end of the last."""
        sums = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return sums.to(self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths)


def unmasked(device: torch.device) -> Tensor:
    """(1, 1, 0, 0): stands where a model wants a mask; with four dimensions transformers passes it on as it is."""
    return torch.zeros((1, 1, 0, 0), dtype=torch.bool, device=device)


def set_attention(model: PreTrainedModel) -> None:
    """Let a transformers model call our attention. Saving is not affected: configs do not store the function's name."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Queries, keys and values (batch, heads, tokens, d) -> (batch, tokens, heads, d), as transformers' interface has it.

    Of what else models pass on, ``segments`` are ours; ``is_causal`` and ``sliding_window`` are transformers'.
    """
    segments: Segments | None = kwargs.pop("segments", None)
    is_causal: bool | None = kwargs.pop("is_causal", None)
    sliding_window: int | None = kwargs.pop("sliding_window", None)
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    if segments is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise RuntimeError(
                "this model does not pass a call's arguments on to its attention, so it cannot be packed"
            )
        if dropout > 0 and query.device.type == "cpu" and not special:
            return _dropped(module, query, key, value, attention_mask, dropout, scaling, is_causal), None
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if special:
        raise RuntimeError("attention with a soft cap, a position bias or a sink cannot be packed")
    made_causal = bool(getattr(module, "is_causal", True))
    causal = made_causal if is_causal is None else is_causal
    radius = None
    if sliding_window is not None:
        # A window counts the token itself; for a decoder that was made bidirectional transformers leaves it out.
        radius = sliding_window if made_causal and not causal else sliding_window - 1
    attend = _each_text if query.device.type == "cpu" else _variable_length
    return attend(query, key, value, segments, causal, radius, dropout, scaling), None


def band(length: int, causal: bool, radius: int, device: torch.device) -> Tensor:
    """(length, length) bool: which keys each query sees through a window of ``radius`` tokens to a side."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None, :]
    return (behind <= radius) & (behind >= (0 if causal else -radius))


def _dropped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    causal = attention_mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    output = attention_with_dropout(query, key, value, attention_mask, causal, scaling, dropout)
    return output.transpose(1, 2).contiguous()


def _each_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    causal: bool,
    radius: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    # Chunks are sorted by length, so that texts of one length lie side by side: they attend in one call.
    runs = [(length, len(list(equal))) for length, equal in itertools.groupby(segments.lengths)]
    # Splitting once keeps the backward to one concatenation; slices would each fill a gradient of all tokens.
    sizes = [length * count for length, count in runs]
    parts = zip(*(torch.split_with_sizes(tensor, sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (length, count), of_run in zip(runs, parts, strict=True):
        q, k, v = (part[0].unflatten(1, (count, length)).transpose(0, 1) for part in of_run)
        mask = None
        if radius is not None and length > radius + 1:
            mask = band(length, causal, radius, q.device)
        if dropout > 0:
            output = attention_with_dropout(q, k, v, mask, causal and mask is None, scaling, dropout)
        else:
            output = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scaling
            )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    causal: bool,
    radius: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    dtype = query.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        # Rotary embeddings may leave float32 behind under autocast; the kernels take half precision only.
        if not torch.is_autocast_enabled(query.device.type):
            raise RuntimeError("the variable-length attention kernels take half precision only")
        dtype = torch.get_autocast_dtype(query.device.type)
    q, k, v = (tensor[0].transpose(0, 1).to(dtype).contiguous() for tensor in (query, key, value))
    side = -1 if radius is None else radius
    window = (side, 0 if causal else side)
    bounds, longest = segments.bounds, segments.longest
    output: Tensor
    if has_flash_attn():
        output = importlib.import_module("flash_attn").flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, dropout, scaling, causal=causal, window_size=(side, side)
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        if dropout > 0:
            raise RuntimeError("torch's variable-length attention has no dropout")
        grouped = q.shape[1] != k.shape[1]
        result = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
        )
        assert isinstance(result, Tensor)  # a pair only where more is asked for
        output = result
    return output[None].to(query.dtype)


def has_flash_attn() -> bool:
    """Whether the flash-attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None
