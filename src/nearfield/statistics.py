"""The error of a mean score and of a difference of two, from arrays of scores and what their units share.

    from nearfield.statistics import compare, interval

    print(compare(base, tuned, shared=documents).sentence)

``base`` and ``tuned`` are the scores of two models on the same queries (pairs, items), ``documents`` has the ids of
what each of them shares with others: one id, several, or None. Methods and their limits: ``docs/statistics.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nearfield.errors import BadInputError
from nearfield.evaluation.scores import Contrast, Key, TaskScores, dependent, joint_replicates
from nearfield.evaluation.sharing import Sharing, numbered
from nearfield.provenance import generator

Shared = Sequence[Any]
"""For each unit: the id of what it shares with others, several ids, or None."""
_KEY: Key = ("statistics", "default", "test")


@dataclass(frozen=True)
class MeanWithInterval:
    """A mean of scores; without ends where ``reason`` says why there are none."""

    mean: float
    low: float | None
    high: float | None
    level: float
    units: int
    resampled: str | None
    """The parts of the error."""
    reason: str | None

    @property
    def sentence(self) -> str:
        """The mean in one sentence."""
        if self.reason is not None:
            return f"{self.mean:.4f}, without an interval: {self.reason}."
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}] ({100 * self.level:g} %; {self.resampled})."


@dataclass(frozen=True)
class PairedDifference:
    """The mean of the second scores minus that of the first; without ends and p where ``reason`` says why."""

    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_equivalent: float | None
    level: float
    units: int
    resampled: str | None
    """The parts of the error."""
    reason: str | None

    @property
    def verdict(self) -> str:
        """Better, worse, not separable, or not tested: the test and the interval must agree."""
        if self.p is None or self.low is None or self.high is None:
            return "not tested"
        if self.p <= 1 - self.level and (self.low > 0 or self.high < 0):
            return "better" if self.difference > 0 else "worse"
        return "not separable"

    @property
    def sentence(self) -> str:
        """The difference in one sentence."""
        if self.p is None or self.low is None or self.high is None:
            return f"The difference is {self.difference:+.4f}, not tested: {self.reason}."
        words = {"better": "better than", "worse": "worse than", "not separable": "not separable from"}
        return (
            f"The second is {words[self.verdict]} the first: {self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], "
            f"p = {self.p:.4f} ({self.resampled})."
        )


def interval(
    scores: ArrayLike,
    shared: Shared | None = None,
    *,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
    unit: str = "unit",
) -> MeanWithInterval:
    """The mean of scores of single units with its interval."""
    of = _scores(scores, shared, unit)
    ends = None
    if of.reason is None:
        ((_, replicates),) = joint_replicates(_KEY, {"": of}, samples, seed)
        ends = of.interval(replicates, level)
    low, high = (None, None) if ends is None else (ends.low, ends.high)
    return MeanWithInterval(of.score, low, high, level, np.size(scores), of.resampled, of.reason)


def compare(
    first: ArrayLike,
    second: ArrayLike,
    shared: Shared | None = None,
    *,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
    margin: float | None = None,
    unit: str = "unit",
) -> PairedDifference:
    """The difference of two models' scores of the same units, with interval and test; ``margin`` tests for equivalence."""
    reference, of = _scores(first, shared, unit), _scores(second, shared, unit)
    if len(np.atleast_1d(first)) != len(np.atleast_1d(second)):
        raise BadInputError("the two have different numbers of scores", where="second")
    reason = reference.reason or of.reason
    if reason is not None:
        difference = of.score - reference.score
        return PairedDifference(difference, None, None, None, None, level, np.size(first), None, reason)
    drawn = dict(joint_replicates(_KEY, {"first": reference, "second": of}, samples, seed))
    contrast = Contrast(of, reference, drawn["second"] - drawn["first"])
    ends = contrast.interval(level)
    p = contrast.p(samples, generator(seed, "permutation", *_KEY))
    equivalent = None if margin is None else contrast.equivalence_p(margin)
    return PairedDifference(
        contrast.difference, ends.low, ends.high, p, equivalent, level, np.size(first), of.resampled, None
    )


def _scores(scores: ArrayLike, shared: Shared | None, unit: str) -> TaskScores:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise BadInputError("scores are a list of two numbers or more, one a unit", where="scores")
    if not np.isfinite(values).all():
        raise BadInputError(f"{int((~np.isfinite(values)).sum())} scores are not finite", where="scores")
    ids = tuple(map(str, range(len(values))))
    contents = [_ids(of) for of in shared] if shared is not None else [()] * len(values)
    if len(contents) != len(values):
        raise BadInputError(f"{len(values)} scores but {len(contents)} entries of what they share", where="shared")
    numbers = numbered(contents)
    of = TaskScores("score", float(values.mean()), "", None, ids=ids, values=values, unit=unit)
    return dependent(replace(of, clusters=tuple(map(str, Sharing.of(numbers).components))), numbers)


def _ids(of: Any) -> tuple[Any, ...]:
    if of is None:
        return ()
    return tuple(of) if isinstance(of, Iterable) and not isinstance(of, str | bytes) else (of,)
