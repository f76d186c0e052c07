"""Rules: which candidates become negatives, and which examples are kept.

Every comparison is strict and made in float64. ``positive`` is the smallest score of a query's positives (the strict choice
where there are several), ``best_positive`` the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.mining.documents import Rows, Vectors

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Candidates:
    """What a teacher found for n queries, best first; known positives and the query itself are not among them."""

    rows: Rows
    """[n, N] document rows; -1 where there is none."""
    scores: Vectors
    """[n, N]; -inf where there is none."""
    positive: Vectors
    """[n] the smallest score of the query's positives."""
    best_positive: Vectors
    """[n] the largest."""

    @property
    def present(self) -> Mask:
        """[n, N]"""
        return self.rows >= 0

    def below(self, bars: npt.NDArray[np.float64]) -> Mask:
        """[n, N] whether a candidate scores less than its query's bar [n]."""
        return self.scores.astype(np.float64) < bars[:, None]


class Rule:
    """A rule keeps some candidates, and may drop whole examples or draw the negatives itself."""

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """[n, N] those of the candidates ``kept`` so far that stay."""
        return kept

    def keep_examples(self, candidates: Candidates) -> Mask | None:
        """[n] the examples that stay; None: all."""
        return None

    def weights(self, candidates: Candidates, kept: Mask) -> npt.NDArray[np.float64] | None:
        """[n, N] log-weights to draw the kept ones by; inf is always drawn; None: the best are taken."""
        return None


class Naive(Rule):
    """Keeps all."""


@dataclass(frozen=True)
class Shifted(Rule):
    """Passes over the first ``skip`` ranks."""

    skip: int

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """Ranks from ``skip`` on."""
        return kept & (np.arange(kept.shape[1]) >= self.skip)


@dataclass(frozen=True)
class Absolute(Rule):
    """Keeps scores below a number."""

    limit: float

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """t(n) < limit."""
        return kept & candidates.below(np.full(len(kept), self.limit))


@dataclass(frozen=True)
class MarginToPositive(Rule):
    """Keeps scores below the positive's less a margin."""

    margin: float

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """t(n) < a - margin."""
        return kept & candidates.below(candidates.positive.astype(np.float64) - self.margin)


@dataclass(frozen=True)
class PercentOfPositive(Rule):
    """Keeps scores below a share of the positive's."""

    share: float

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """t(n) < a - (1 - share) |a|: share * a would lie above a negative a."""
        positive = candidates.positive.astype(np.float64)
        return kept & candidates.below(positive - np.abs(positive) * (1 - self.share))


@dataclass(frozen=True)
class AdaptiveMargin(Rule):
    """Keeps scores below the positive's less a margin that moves with it."""

    at_zero: float
    at_one: float

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """t(n) < a - m(a), m a straight line between its values at 0 and 1 and level outside."""
        positive = candidates.positive.astype(np.float64)
        margin = self.at_zero + (self.at_one - self.at_zero) * np.clip(positive, 0, 1)
        return kept & candidates.below(positive - margin)


@dataclass(frozen=True)
class RankWindow(Rule):
    """Draws evenly from the ranks ``start`` to ``stop`` (not included)."""

    start: int
    stop: int

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """The window."""
        ranks = np.arange(kept.shape[1])
        return kept & (ranks >= self.start) & (ranks < self.stop)

    def weights(self, candidates: Candidates, kept: Mask) -> npt.NDArray[np.float64] | None:
        """All alike."""
        return np.zeros(kept.shape)


@dataclass(frozen=True)
class SampledTopK(Rule):
    """Draws from the first ``k`` kept by a softmax over their scores."""

    k: int
    temperature: float
    keep_first: bool

    def keep(self, candidates: Candidates, kept: Mask) -> Mask:
        """The first ``k`` of those kept so far."""
        return kept & (np.cumsum(kept, axis=1) <= self.k)

    def weights(self, candidates: Candidates, kept: Mask) -> npt.NDArray[np.float64] | None:
        """Scores over the temperature; the best one is certain where ``keep_first`` is set."""
        weights = np.where(kept, candidates.scores, 0).astype(np.float64) / self.temperature
        if self.keep_first:
            weights[kept & (np.cumsum(kept, axis=1) == 1)] = np.inf
        return weights


@dataclass(frozen=True)
class Consistency(Rule):
    """Keeps an example whose best positive is among the first ``top`` of the corpus."""

    top: int

    def keep_examples(self, candidates: Candidates) -> Mask | None:
        """Fewer than ``top`` documents that are no positives score more than the best positive."""
        better = candidates.scores > candidates.best_positive[:, None]
        mask: Mask = better.sum(axis=1) < self.top
        return mask
