"""An attention function for transformers' attention interface that takes texts laid end to end, without padding.

transformers hands every model's queries, keys and values to the function that its config names. Ours sees from the
``segments`` of a call where texts begin and end and lets each attend to itself alone: by torch's variable-length kernel
(or flash-attn's, where it is installed) on a GPU in half precision, by one call a text on a CPU. A call without
segments is an ordinary padded one and goes to transformers' own function.
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
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from nearfield.encoders.dropout import attention_with_dropout

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
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Queries, keys and values (batch, heads, tokens, d) -> (batch, tokens, heads, d), as transformers' interface has it."""
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
