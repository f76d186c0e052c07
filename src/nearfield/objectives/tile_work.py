"""What is done with a tile of products beside making it, by torch operations; :mod:`.kernels` does the same on CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nearfield.objectives.masks import Block, Excluded, excluded_cells


@dataclass(frozen=True)
class Running:
    """Statistics of r rows over the tiles so far, changed in place."""

    highest: Tensor
    """(r,) the greatest logit."""
    summed: Tensor
    """(r,) sum of the exponentials of logits less the greatest."""
    total: Tensor | None
    """(r,) sum of the logits, and their number, where these are asked for."""
    count: Tensor | None


class TileWork(Protocol):
    """Masks, logits, row statistics and probabilities of a tile of scores. ``factor`` (r,) is what scores are multiplied by to be
    logits, none where they are already; ``limit`` (r,) the greatest score of a candidate."""

    def cells(self, block: Block, low: int, high: int, start: int, stop: int) -> Any:
        """The cells of a tile that ids, labels, sources or the guide rule out, in a form of one's own."""
        ...

    def add(self, tile: Tensor, out: Any, factor: Tensor | None, limit: Tensor | None, running: Running) -> None:
        """Add a tile of scores (r, c) to the statistics of its rows; the tile is spent."""
        ...

    def weigh(
        self,
        tile: Tensor,
        out: Any,
        factor: Tensor | None,
        limit: Tensor | None,
        shift: Tensor,
        weight: Tensor,
        total: Tensor | None,
    ) -> Tensor:
        """Scores -> in place what, times the (r,) weights that come back, is the gradient of the logits.

        ``shift`` is the logarithm of the rows' sums, ``weight`` the gradient of that, ``total`` that of the logits' sum.
        """
        ...


class TorchTiles:
    """By torch operations, on any device."""

    def cells(self, block: Block, low: int, high: int, start: int, stop: int) -> Excluded:
        return excluded_cells(block, low, high, start, stop)

    def add(self, tile: Tensor, out: Excluded, factor: Tensor | None, limit: Tensor | None, running: Running) -> None:
        _finish(tile, out, factor, limit)
        if running.total is not None and running.count is not None:
            kept = tile > -torch.inf
            running.total.add_(torch.where(kept, tile, 0).sum(dim=1))
            running.count.add_(kept.sum(dim=1))
        now = torch.maximum(running.highest, tile.amax(dim=1))
        here = tile.sub_(now[:, None]).exp_().sum(dim=1)
        running.summed.mul_((running.highest - now).exp_()).add_(here)
        running.highest.copy_(now)

    def weigh(
        self,
        tile: Tensor,
        out: Excluded,
        factor: Tensor | None,
        limit: Tensor | None,
        shift: Tensor,
        weight: Tensor,
        total: Tensor | None,
    ) -> Tensor:
        _finish(tile, out, factor, limit)
        if total is None:
            tile.sub_(shift[:, None]).exp_()
            return weight
        kept = tile > -torch.inf
        tile.sub_(shift[:, None]).exp_().mul_(weight[:, None])
        tile.add_(kept * total[:, None])
        return torch.ones_like(weight)


def _finish(tile: Tensor, out: Excluded, factor: Tensor | None, limit: Tensor | None) -> None:
    """Scores -> logits in place; cells that are no candidates become minus infinity."""
    if limit is not None:
        over = tile > limit[:, None]
        out = Excluded(out.row, out.column, over if out.mask is None else over | out.mask)
    if factor is not None:
        tile.mul_(factor[:, None])
    out.fill(tile, -torch.inf)


def tile_work(triton: bool) -> TileWork:
    """How tiles are worked on."""
    if not triton:
        return TorchTiles()
    from nearfield.objectives.kernels import TritonTiles

    return TritonTiles()
