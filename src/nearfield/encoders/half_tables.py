"""Gradients of embedding tables in half precision, added up in float32.

On a CPU torch adds what the tokens of a batch give a row in the table's own type: the row of token types, which every
token looks up, was off by a fifth after 150 tokens in bfloat16. Kernels of GPUs add in float32 by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
