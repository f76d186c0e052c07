"""Units that share content so that no part of them is independent of the rest: queries of the same documents, pairs of
the same sentences.

Where one connected component holds much of all units, neither single units nor whole components can be resampled. The
variance of a mean is then the sum of the products of the residuals of all pairs of units that share something (Aronow,
Samii & Assenova, 2015; Cameron, Gelbach & Miller, 2011), made unbiased for effects of the contents; Student's t has the
degrees of freedom that the variance would have if the contents explained everything. ``docs/statistics.md`` has the
coverage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nearfield.evaluation.statistics import LINEAR, Floats, Interval, Ints, Scale, t_interval

FEWEST = 15
"""With fewer effective contents than this, 95 % intervals cover 85 to 92 % where the contents' effects are skewed."""
_MOST_PAIRS = 50_000_000
_COUNTED, _PROBES = 512, 128
"""So many contents are counted one by one; of more, so many random vectors tell."""


@dataclass(frozen=True)
class Sharing:
    """The contents of each unit, as numbers; a unit without any shares nothing."""

    contents: tuple[tuple[int, ...], ...]

    @classmethod
    @lru_cache(maxsize=32)
    def of(cls, contents: tuple[tuple[int, ...], ...]) -> Sharing:
        """One object for the same contents, which works out what is needed of them once."""
        return cls(contents)

    @cached_property
    def _weights(self) -> Any:
        """The sparse matrix ``[units, contents]`` of how much of a unit each content is: its rows have length one."""
        from scipy import sparse

        free = 1 + max((number for of_unit in self.contents for number in of_unit), default=0)
        # A unit without content has one of its own.
        lists = [sorted(set(of_unit)) or [free + i] for i, of_unit in enumerate(self.contents)]
        sizes = np.array([len(one) for one in lists])
        _, columns = np.unique(np.concatenate(lists), return_inverse=True)
        rows = np.repeat(np.arange(len(lists)), sizes)
        return sparse.csr_matrix(
            (1 / np.sqrt(sizes[rows]), (rows, columns)), shape=(len(lists), int(columns.max()) + 1)
        )

    @cached_property
    def _holders(self) -> Floats:
        """How many units have each content."""
        return np.asarray((self._weights > 0).sum(axis=0), dtype=np.float64).ravel()

    @property
    def total(self) -> int:
        """How many contents there are."""
        return len({number for of_unit in self.contents for number in of_unit})

    @property
    def shared(self) -> int:
        """How many contents several units have."""
        return int((self._holders > 1).sum())

    @property
    def components(self) -> Ints:
        """The number of the connected component of each unit."""
        from scipy import sparse
        from scipy.sparse import csgraph

        both = sparse.bmat([[None, self._weights], [self._weights.T, None]])
        return np.asarray(csgraph.connected_components(both, directed=False)[1][: len(self.contents)], dtype=np.int64)

    @cached_property
    def _pairs(self) -> Any:
        """The sparse 0/1 matrix ``[units, units]`` of those that share something, without the diagonal."""
        from scipy import sparse

        held = (self._weights > 0).astype(np.float64)
        pairs = (held @ held.T).tocsr()
        pairs.data[:] = 1.0
        pairs = (pairs - sparse.identity(len(self.contents))).tocsr()
        pairs.eliminate_zeros()
        return pairs

    @cached_property
    def _coefficients(self) -> tuple[float, float] | None:
        """The weights of the products of residuals within units and within pairs, so that the variance of a mean is unbiased.

        It is so for units of equal variance whose covariance grows with the contents that they share. None where the
        mean takes all variation with it, as when all units share one content.
        """
        n = len(self.contents)
        within = self._weights @ (self._weights.T @ np.ones(n)) - 1
        total = float(within.sum())
        partners = np.asarray(self._pairs.sum(axis=1), dtype=np.float64).ravel()
        pairs = float(partners.sum())
        crossed = total - 2 / n * float(partners @ within) + pairs * total / n**2
        expected = np.array([[n - 1, -total / n], [-pairs / n, crossed]])
        if abs(np.linalg.det(expected)) < 1e-9 * n * max(crossed, 1.0):
            return None
        own, other = np.linalg.solve(expected.T, np.array([n, total]) / n**2)
        return float(own), float(other)

    @cached_property
    def effective(self) -> float:
        """Degrees of freedom of the variance by Satterthwaite where all variation is that of the contents.

        So many equal and independent contents would tell the error as well.
        """
        held = self._holders[self._holders > 1]
        if float((held**2).sum()) > _MOST_PAIRS or self._coefficients is None:
            return 0.0
        weights, (own, other) = self._weights, self._coefficients
        units, count = weights.shape
        sums = weights.T @ np.ones(units)
        mean = float(sums @ sums) / units**2
        square = 0.0
        rng = np.random.default_rng(0)
        counted = count <= _COUNTED
        probes = count if counted else _PROBES
        for start in range(0, probes, 64):
            width = min(64, probes - start)
            if counted:
                probe = np.zeros((count, width))
                probe[np.arange(start, start + width), np.arange(width)] = 1.0
            else:
                probe = rng.choice([-1.0, 1.0], size=(count, width))
            effects = weights @ probe
            effects -= effects.mean(axis=0)
            effects = own * effects + other * (self._pairs @ effects)
            square += float(((weights.T @ (effects - effects.mean(axis=0))) ** 2).sum())
        square /= 1 if counted else probes
        return float(min(mean**2 / square, count - 1)) if square > 0 else 0.0

    @property
    def reason(self) -> str | None:
        """Why the units give no interval and no test, or None where they do."""
        if self.effective >= FEWEST:
            return None
        return (
            f"the errors rest on about {self.effective:.1f} independent contents, and below {FEWEST} no interval and no "
            "test hold"
        )

    def covariance(self, influence: Floats) -> Floats:
        """Covariance ``[models, models]`` of scores whose units count ``influence [units, models]``.

        It is at least what independent units would give, so it is never negative.
        """
        assert self._coefficients is not None
        own, other = self._coefficients
        n = len(influence)
        residuals = influence - influence.mean(axis=0)
        products = residuals.T @ residuals
        plain = products / (n * (n - 1))
        values, vectors = np.linalg.eigh(own * products + other * (residuals.T @ (self._pairs @ residuals)) - plain)
        return np.asarray(plain + (vectors * np.maximum(values, 0.0)) @ vectors.T, dtype=np.float64)

    def variances(self, influence: Floats) -> Floats:
        """The variance of each of several scores by itself, ``influence [units, scores]``."""
        assert self._coefficients is not None
        own, other = self._coefficients
        n = len(influence)
        residuals = influence - influence.mean(axis=0)
        products = (residuals**2).sum(axis=0)
        together = own * products + other * (residuals * (self._pairs @ residuals)).sum(axis=0)
        return np.asarray(np.maximum(together, products / (n * (n - 1))), dtype=np.float64)

    def variance(self, influence: Floats) -> float:
        """:meth:`variances` of one score, ``influence [units]``."""
        return float(self.variances(influence[:, None])[0])

    def interval(self, estimate: float, influence: Floats, level: float, scale: Scale = LINEAR) -> Interval:
        """Student's t interval of a score or a difference, on a scale where its errors are more symmetric."""
        return t_interval(estimate, self.variance(influence), self.effective, level, scale)

    def p(self, difference: float, influence: Floats) -> float:
        """Two-sided p of Student's t for a difference of zero."""
        from scipy import stats

        error = np.sqrt(self.variance(influence))
        if error <= 1e-15:
            return 1.0 if abs(difference) <= 1e-15 else 0.0
        return float(2 * stats.t.sf(abs(difference) / error, self.effective))

    def equivalence_p(self, difference: float, influence: Floats, margin: float) -> float:
        """p of two one-sided t tests that a difference lies within ``margin`` (Schuirmann, 1987)."""
        from scipy import stats

        error = max(float(np.sqrt(self.variance(influence))), 1e-15)
        return float(stats.t.sf((margin - abs(difference)) / error, self.effective))

    def replicates(
        self, estimates: Floats, influence: Floats, samples: int, rng: np.random.Generator, scale: Scale = LINEAR
    ) -> Floats:
        """Joint draws ``[samples, models]`` around ``estimates [models]`` from the t distribution with their covariance.

        Each draw has its mirror image, so the draws lie symmetrically on ``scale``.
        """
        values, vectors = np.linalg.eigh(self.covariance(influence))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        half = (samples + 1) // 2
        drawn = rng.normal(size=(half, len(estimates))) @ root.T
        drawn /= np.sqrt(rng.chisquare(self.effective, size=(half, 1)) / self.effective)
        drawn = np.concatenate([drawn, -drawn])[:samples]
        return np.asarray(scale.back(scale.to(estimates) + scale.slope(estimates) * drawn), dtype=np.float64)

    def in_words(self, units: str, contents: str) -> str:
        """``1,000 queries that share 46 documents (about 45 of them independent)``."""
        of_all = f"{self.shared:,} of {self.total:,}" if self.shared < self.total else f"{self.shared:,}"
        return (
            f"{len(self.contents):,} {units} that share {of_all} {contents}; errors of all pairs of {units} that share "
            f"one, as of {self.effective:,.0f} independent {contents}"
        )


def numbered(contents: Sequence[Iterable[Any]]) -> tuple[tuple[int, ...], ...]:
    """Contents of units as numbers from 0 in the order in which they come."""
    numbers: dict[Any, int] = {}
    return tuple(tuple(sorted({numbers.setdefault(one, len(numbers)) for one in unit})) for unit in contents)
