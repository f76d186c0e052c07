"""Triton kernels for tiles on CUDA: masks, logits and row statistics in one pass over a tile, masks and probabilities in another.

The products stay with torch: they are the same bits that every other implementation compares with limits, and the vendor's
matrix product is the faster one in float32. The dozen passes that torch makes over a tile, some of which wait for the CPU, are one
kernel here. Ids are compared in the kernel: a row has few known positives.

A module of its own, since Triton reads ``TRITON_INTERPRET`` when kernels are declared.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfield.objectives.statistics import Block, Join, Running

ROWS, COLUMNS = 16, 128
"""Cells that a program holds at a time."""
JOINS = 3
"""A block of logits has at most so many."""


@triton.jit
def _joined(row_ids, row_width, column_ids, column_width, r, r_in, c, c_in):
    """(R, C) whether row and column have an id in common; negative ones are none."""
    common = (r[:, None] < 0) & (c[None, :] < 0)
    for k in range(row_width):
        left = tl.load(row_ids + r * row_width + k, mask=r_in, other=-1)
        for n in range(column_width):
            right = tl.load(column_ids + c * column_width + n, mask=c_in, other=-1)
            common = common | ((left[:, None] == right[None, :]) & (left[:, None] >= 0))
    return common


@triton.jit
def _logits(
    tile, rows, columns, r, c, factor, limit, row_labels, column_labels, row_sources, column_sources, guide, guide_limit,
    row_ids_0, column_ids_0, row_width_0, column_width_0, row_ids_1, column_ids_1, row_width_1, column_width_1,
    row_ids_2, column_ids_2, row_width_2, column_width_2,
    scaled: tl.constexpr, limited: tl.constexpr, labelled: tl.constexpr, sourced: tl.constexpr, guided: tl.constexpr,
    joins: tl.constexpr,
):  # fmt: skip
    """(R, C) logits; minus infinity for cells outside, and for those that are no candidates."""
    r_in, c_in = r < rows, c < columns
    inside = r_in[:, None] & c_in[None, :]
    where = r[:, None] * columns + c[None, :]
    score = tl.load(tile + where, mask=inside, other=0.0)
    out = inside == 0
    if limited:
        out = out | (score > tl.load(limit + r, mask=r_in, other=0.0)[:, None])
    if guided:
        scored = tl.load(guide + where, mask=inside, other=0.0)
        out = out | (scored > tl.load(guide_limit + r, mask=r_in, other=0.0)[:, None])
    if labelled:
        left = tl.load(row_labels + r, mask=r_in, other=-1)[:, None]
        out = out | ((left == tl.load(column_labels + c, mask=c_in, other=-1)[None, :]) & (left >= 0))
    if sourced:
        one = tl.load(row_sources + r, mask=r_in, other=-1)[:, None]
        other = tl.load(column_sources + c, mask=c_in, other=-1)[None, :]
        out = out | ((one != other) & (one >= 0) & (other >= 0))
    if joins > 0:
        out = out | _joined(row_ids_0, row_width_0, column_ids_0, column_width_0, r, r_in, c, c_in)
    if joins > 1:
        out = out | _joined(row_ids_1, row_width_1, column_ids_1, column_width_1, r, r_in, c, c_in)
    if joins > 2:
        out = out | _joined(row_ids_2, row_width_2, column_ids_2, column_width_2, r, r_in, c, c_in)
    if scaled:
        score = score * tl.load(factor + r, mask=r_in, other=0.0)[:, None]
    return tl.where(out, float("-inf"), score)


@triton.jit
def _add_kernel(
    tile, rows, columns, factor, limit, row_labels, column_labels, row_sources, column_sources, guide, guide_limit,
    row_ids_0, column_ids_0, row_width_0, column_width_0, row_ids_1, column_ids_1, row_width_1, column_width_1,
    row_ids_2, column_ids_2, row_width_2, column_width_2, highest, summed, total, count,
    scaled: tl.constexpr, limited: tl.constexpr, labelled: tl.constexpr, sourced: tl.constexpr, guided: tl.constexpr,
    joins: tl.constexpr, sums: tl.constexpr, R: tl.constexpr, C: tl.constexpr,  # noqa: N803
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    r_in = r < rows
    most = tl.load(highest + r, mask=r_in, other=0.0)
    running = tl.load(summed + r, mask=r_in, other=0.0)
    if sums:
        added = tl.load(total + r, mask=r_in, other=0.0)
        number = tl.load(count + r, mask=r_in, other=0.0)
    for start in range(0, columns, C):
        c = start + tl.arange(0, C)
        logits = _logits(
            tile, rows, columns, r, c, factor, limit, row_labels, column_labels, row_sources, column_sources,
            guide, guide_limit, row_ids_0, column_ids_0, row_width_0, column_width_0,
            row_ids_1, column_ids_1, row_width_1, column_width_1, row_ids_2, column_ids_2, row_width_2, column_width_2,
            scaled, limited, labelled, sourced, guided, joins,
        )  # fmt: skip
        if sums:
            finite = logits > float("-inf")
            added += tl.sum(tl.where(finite, logits, 0.0), axis=1)
            number += tl.sum(tl.where(finite, 1.0, 0.0), axis=1)
        now = tl.maximum(most, tl.max(logits, axis=1))
        running = running * tl.exp(most - now) + tl.sum(tl.exp(logits - now[:, None]), axis=1)
        most = now
    tl.store(highest + r, most, mask=r_in)
    tl.store(summed + r, running, mask=r_in)
    if sums:
        tl.store(total + r, added, mask=r_in)
        tl.store(count + r, number, mask=r_in)


@triton.jit
def _weigh_kernel(
    tile, rows, columns, factor, limit, row_labels, column_labels, row_sources, column_sources, guide, guide_limit,
    row_ids_0, column_ids_0, row_width_0, column_width_0, row_ids_1, column_ids_1, row_width_1, column_width_1,
    row_ids_2, column_ids_2, row_width_2, column_width_2, shift, weight, total,
    scaled: tl.constexpr, limited: tl.constexpr, labelled: tl.constexpr, sourced: tl.constexpr, guided: tl.constexpr,
    joins: tl.constexpr, sums: tl.constexpr, R: tl.constexpr, C: tl.constexpr,  # noqa: N803
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    r_in = r < rows
    logits = _logits(
        tile, rows, columns, r, c, factor, limit, row_labels, column_labels, row_sources, column_sources,
        guide, guide_limit, row_ids_0, column_ids_0, row_width_0, column_width_0,
        row_ids_1, column_ids_1, row_width_1, column_width_1, row_ids_2, column_ids_2, row_width_2, column_width_2,
        scaled, limited, labelled, sourced, guided, joins,
    )  # fmt: skip
    gradient = tl.exp(logits - tl.load(shift + r, mask=r_in, other=0.0)[:, None])
    if sums:
        gradient = gradient * tl.load(weight + r, mask=r_in, other=0.0)[:, None]
        each = tl.load(total + r, mask=r_in, other=0.0)[:, None]
        gradient += tl.where(logits > float("-inf"), each, 0.0)
    tl.store(tile + r[:, None] * columns + c[None, :], gradient, mask=r_in[:, None] & (c < columns)[None, :])


@dataclass(frozen=True)
class Marks:
    """Limits that rule out cells of a tile: a number or a few a row and a column, and the guide's scores."""

    row_labels: Tensor | None
    column_labels: Tensor | None
    row_sources: Tensor | None
    column_sources: Tensor | None
    guide: Tensor | None
    """(r, c) scores."""
    guide_limit: Tensor | None
    ids: list[tuple[Tensor, Tensor]]
    """(r, K) and (c, L) of each join."""


class TritonTiles:
    """By Triton kernels; see :class:`~nearfield.objectives.statistics.TileWork`."""

    def cells(self, block: Block, low: int, high: int, start: int, stop: int) -> Marks:
        guide = limit = None
        if block.guide is not None:
            vectors = block.guide.vectors
            left = vectors.take(block.rows.side, block.rows.part(low, high))
            guide = left @ vectors.take(block.columns.side, block.columns.part(start, stop)).T
            limit = block.guide.limit[low:high].contiguous()
        labelled = block.row_labels is not None and block.column_labels is not None
        sourced = block.row_sources is not None and block.column_sources is not None
        return Marks(
            block.row_labels[low:high].contiguous() if labelled else None,  # type: ignore[index]
            block.column_labels[start:stop].contiguous() if labelled else None,  # type: ignore[index]
            block.row_sources[low:high].contiguous() if sourced else None,  # type: ignore[index]
            block.column_sources[start:stop].contiguous() if sourced else None,  # type: ignore[index]
            guide,
            limit,
            [_ids(join, low, high, start, stop) for join in block.joins],
        )

    def add(self, tile: Tensor, out: Marks, factor: Tensor | None, limit: Tensor | None, running: Running) -> None:
        sums = running.total is not None
        more = [running.highest, running.summed, running.total, running.count]
        grid = (triton.cdiv(tile.shape[0], ROWS),)
        _run(_add_kernel, grid, tile, out, factor, limit, more, sums)

    def weigh(
        self,
        tile: Tensor,
        out: Marks,
        factor: Tensor | None,
        limit: Tensor | None,
        shift: Tensor,
        weight: Tensor,
        total: Tensor | None,
    ) -> Tensor:
        grid = (triton.cdiv(tile.shape[0], ROWS), triton.cdiv(tile.shape[1], COLUMNS))
        more = [shift.contiguous(), weight.contiguous(), None if total is None else total.contiguous()]
        _run(_weigh_kernel, grid, tile, out, factor, limit, more, total is not None)
        return weight if total is None else torch.ones_like(weight)


def _ids(join: Join, low: int, high: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    return join.rows[low:high].contiguous(), join.columns[start:stop].contiguous()


def _run(
    kernel: object,
    grid: tuple[int, ...],
    tile: Tensor,
    out: Marks,
    factor: Tensor | None,
    limit: Tensor | None,
    more: list[Tensor | None],
    sums: bool,
) -> None:
    """Call a kernel; what is not asked for is the tile, which it does not read as such."""
    rows, columns = tile.shape
    assert len(out.ids) <= JOINS
    ids: list[Tensor | int] = []
    for number in range(JOINS):
        left, right = out.ids[number] if number < len(out.ids) else (tile, tile)
        ids += [left, right, left.shape[1], right.shape[1]]
    # A learnt temperature is one number for all rows, without a stride.
    given = [
        factor,
        limit,
        out.row_labels,
        out.column_labels,
        out.row_sources,
        out.column_sources,
        out.guide,
        out.guide_limit,
    ]
    kernel[grid](  # type: ignore[index]
        tile, rows, columns, *(tile if one is None else one.contiguous() for one in given), *ids,
        *(tile if one is None else one for one in more),
        scaled=factor is not None, limited=limit is not None, labelled=out.row_labels is not None,
        sourced=out.row_sources is not None, guided=out.guide is not None, joins=len(out.ids), sums=sums,
        R=ROWS, C=COLUMNS,
    )  # fmt: skip
