"""Gradients of embedding tables that touch only the rows that were looked up.

A chunk of a few hundred tokens looks up a few hundred rows of a table of tens of thousands, but torch's gradient of it
is a table of zeros with those rows filled in, made and added anew for each chunk.
"""

from __future__ import annotations

from torch import Tensor, nn

_MANY_ROWS = 4096


def sparse_embedding_gradients(model: nn.Module) -> None:
    """Let large embedding tables pass sparse gradients through a backward, which become dense once, in ``.grad``.

    What optimisers and clipping see is dense as before. For models whose parameters are whole on each process: sharding
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
