"""Row statistics -> losses: the algebra that all implementations share, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor

from nearfield.objectives.blocks import RowStatistics, floor

if TYPE_CHECKING:
    from nearfield.objectives.config import FocalConfig


@dataclass(frozen=True)
class CandidateSums:
    """Candidates of n softmaxes, for M prefixes."""

    log_sum: Tensor
    """(M, n)."""
    total: Tensor
    """(M, n) sum of logits, and their number; of no row where nobody asks."""
    count: Tensor

    @classmethod
    def of(cls, statistics: RowStatistics) -> CandidateSums:
        """The candidates of a block."""
        return cls(statistics.log_sum, statistics.total, statistics.count)

    def pick(self, index: Tensor) -> CandidateSums:
        """The softmaxes with these numbers."""
        has = self.total.shape == self.log_sum.shape
        return CandidateSums(
            self.log_sum[:, index],
            self.total[:, index] if has else self.total,
            self.count[:, index] if has else self.count,
        )

    def gather(self, row: Tensor, rows: int) -> CandidateSums:
        """Join softmaxes that belong to the same row."""
        has = self.total.shape == self.log_sum.shape
        return CandidateSums(
            segment_log_sum(self.log_sum, row, rows),
            segment_sum(self.total, row, rows) if has else self.total,
            segment_sum(self.count, row, rows) if has else self.count,
        )


def join(groups: Sequence[CandidateSums]) -> CandidateSums:
    """All candidates of several groups."""
    return reduce(
        lambda a, b: CandidateSums(torch.logaddexp(a.log_sum, b.log_sum), a.total + b.total, a.count + b.count), groups
    )


def listed(logits: Tensor, kept: Tensor, row: Tensor, rows: int, sums: bool) -> CandidateSums:
    """(M, E) logits, whether they are candidates, and (E,) the row that each belongs to -> their group."""
    filled = logits.masked_fill(~kept, floor(logits.dtype))
    none = logits.new_zeros(0)
    return CandidateSums(
        segment_log_sum(filled, row, rows),
        segment_sum(logits.masked_fill(~kept, 0), row, rows) if sums else none,
        segment_sum(kept.to(logits.dtype), row, rows) if sums else none,
    )


def segment_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(M, n) -> (M, rows)."""
    return values.new_zeros(len(values), rows).index_add(1, row, values)


def segment_log_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(M, n) -> (M, rows) logarithm of the sum of exponentials; ``floor`` for a row of none."""
    lowest = floor(values.dtype)
    peak = values.new_full((len(values), rows), lowest)
    peak = peak.scatter_reduce_(1, row.expand_as(values), values.detach(), "amax")
    total = segment_sum((values - peak[:, row]).exp(), row, rows)
    empty = total == 0
    return torch.where(empty, lowest, peak + total.masked_fill(empty, 1).log())


@dataclass(frozen=True)
class Positives:
    """The positive side of n softmaxes."""

    log_sum: Tensor
    """(M, n) logarithm of the sum of the exponentials of the positives' logits."""
    total: Tensor
    """(M, n) sum of their logits."""
    count: Tensor
    """(n,) their number."""


def losses(positives: Positives, negatives: CandidateSums, smoothing: float, focal: FocalConfig | None) -> Tensor:
    """(M, n) losses of softmaxes over the positives and the negatives."""
    # Not the difference of two logarithms, which loses the digits of a small loss.
    plain = -functional.logsigmoid(positives.log_sum - negatives.log_sum)
    loss = plain
    if smoothing:
        mean = (positives.total + negatives.total) / (positives.count + negatives.count)
        loss = plain + smoothing * (positives.log_sum - mean)
    return loss if focal is None else loss * focal_weight(plain, focal)


def focal_weight(loss: Tensor, focal: FocalConfig) -> Tensor:
    """(1 - probability of the positive) ** gamma from -log of that probability."""
    if not focal.gamma:
        return torch.ones_like(loss)
    if focal.detach:
        return (-torch.expm1(-loss.detach())).pow(focal.gamma)
    # Below one, the power has no slope at 0; there the weight times the loss has slope 0.
    solved = loss.detach() <= 0
    missed = -torch.expm1(-loss.masked_fill(solved, 1))
    return torch.where(solved, 0, missed.pow(focal.gamma))
