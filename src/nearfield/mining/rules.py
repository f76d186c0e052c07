"""Rules: which candidates become negatives, and which examples are kept.

Every comparison is strict and made in float64. ``positive`` is the smallest score of a query's positives (the strict choice
where there are several), ``best_positive`` the largest. All here are functions of their arguments, without files or global
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nearfield.arrays import Floats, Mask, Ragged, Rows, Vectors
from nearfield.errors import BadInputError
from nearfield.mining.search import DEFAULT_MEMORY, Documents, Neighbours, as_documents, search
from nearfield.provenance import generator


@dataclass(frozen=True)
class Candidates:
    """The candidates of a teacher for n queries, best first; known positives and the query itself are not among them."""

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

    def below(self, bars: Floats) -> Mask:
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

    def weights(self, candidates: Candidates, kept: Mask) -> Floats | None:
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

    def weights(self, candidates: Candidates, kept: Mask) -> Floats | None:
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

    def weights(self, candidates: Candidates, kept: Mask) -> Floats | None:
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


@dataclass(frozen=True)
class RuleCount:
    """The counts of one rule."""

    kind: str
    removed: int
    """Candidates that it took out."""
    dropped: int
    """Examples that it dropped."""
    left: int
    """Candidates left after it, of the examples that are kept."""
    short: int
    """Kept examples that have fewer candidates left than negatives are wanted."""


@dataclass(frozen=True)
class MinedNegatives:
    """The negatives of n queries."""

    lists: Ragged
    """The document rows of each query's, best first."""
    scores: Vectors
    """The teacher's score of each value of ``lists``."""
    ranks: Rows
    """The rank of each among the candidates of its query, from 0; known positives are not counted."""
    positive: Vectors
    """[n] the smallest score of the query's positives, which the rules compared with."""
    best_positive: Vectors
    """[n] the largest."""
    positive_scores: Vectors
    """Of every positive, in the order of the lists of positives that were given."""
    kept: Mask
    """[n] false where a rule dropped the example."""
    wanted: int
    """Negatives an example, where there are enough."""
    candidates: int
    """Candidates that the teacher found, of all queries."""
    counts: tuple[RuleCount, ...]

    @property
    def short(self) -> Rows:
        """The kept queries that have fewer negatives than wanted; they are not padded."""
        return np.flatnonzero(self.kept & (self.lists.lengths < self.wanted)).astype(np.int64)


def mine(
    queries: Vectors,
    documents: Documents | Vectors,
    positives: Ragged,
    *,
    rules: Sequence[Rule],
    negatives: int,
    depth: int,
    excluded: Ragged | None = None,
    memory: int = DEFAULT_MEMORY,
) -> MinedNegatives:
    """Search for the best ``depth`` documents of each query [n, d] exactly, and apply the rules.

    ``positives`` lists the document rows of each query's positives; they and those of ``excluded`` are never negatives.
    """
    documents = as_documents(documents)
    hidden = positives if excluded is None else positives.union(excluded)
    nearest = search(queries, documents, depth, excluded=hidden, memory=memory)
    scores = documents.pairs(queries, positives.owners(), positives.values)
    return select(nearest, positives, scores, rules=rules, negatives=negatives)


def select(
    found: Neighbours,
    positives: Ragged,
    positive_scores: Vectors,
    *,
    rules: Sequence[Rule],
    negatives: int,
    seed: int = 0,
    names: Sequence[str | int] = (),
) -> MinedNegatives:
    """Apply the rules, one after another, to what a teacher found; ``positive_scores`` are those of ``positives.values``."""
    smallest, largest = _extremes(positives, positive_scores)
    candidates = Candidates(found.rows, found.scores, smallest, largest)
    kept, examples = candidates.present, np.ones(len(found.rows), dtype=bool)
    counts: list[RuleCount] = []
    total = int(kept.sum())
    for rule in rules:
        before, had = int(kept[examples].sum()), int(examples.sum())
        kept = rule.keep(candidates, kept)
        removed = before - int(kept[examples].sum())
        if (stay := rule.keep_examples(candidates)) is not None:
            examples = examples & stay
        left = kept[examples].sum(axis=1)
        dropped = had - int(examples.sum())
        counts.append(RuleCount(_kind(rule), removed, dropped, int(left.sum()), int((left < negatives).sum())))
    kept = kept & examples[:, None]
    weights = rules[-1].weights(candidates, kept) if rules else None
    if weights is not None:
        kept = draw(kept, weights, negatives, seed, names)
    else:
        kept &= np.cumsum(kept, axis=1) <= negatives
    owner, rank = np.nonzero(kept)
    return MinedNegatives(
        lists=Ragged.from_lengths(kept.sum(axis=1), found.rows[owner, rank]),
        scores=found.scores[owner, rank],
        ranks=rank.astype(np.int64),
        positive=smallest,
        best_positive=largest,
        positive_scores=positive_scores,
        kept=examples,
        wanted=negatives,
        candidates=total,
        counts=tuple(counts),
    )


def draw(kept: Mask, weights: Floats, negatives: int, seed: int, names: Sequence[str | int]) -> Mask:
    """Draw up to ``negatives`` of the kept candidates of each query without putting back, with odds exp(weights).

    The largest of log-weight plus Gumbel noise are such a draw. The noise of a query depends on the seed, the names and the
    query's place, not on the other queries' candidates.
    """
    noise = generator(seed, "mine", *names).gumbel(size=kept.shape)
    keys = np.where(kept, weights + noise, -np.inf)
    order = np.argsort(-keys, axis=1, kind="stable")[:, :negatives]
    drawn = np.zeros_like(kept)
    np.put_along_axis(drawn, order, True, axis=1)
    return drawn & kept


def _extremes(lists: Ragged, scores: Vectors) -> tuple[Vectors, Vectors]:
    """The smallest and the largest score of each query's positives; every query must have one."""
    counts = np.diff(lists.offsets)
    if len(scores) != len(lists.values):
        raise ValueError(f"{len(scores)} scores for {len(lists.values)} positives")
    if not counts.all():
        raise BadInputError(
            f"query {int(np.flatnonzero(counts == 0)[0])} has no positive",
            hint="Rules compare candidates with the positive; give every query one.",
        )
    if not len(counts):
        return scores, scores
    return np.minimum.reduceat(scores, lists.offsets[:-1]), np.maximum.reduceat(scores, lists.offsets[:-1])


def _kind(rule: Rule) -> str:
    """``PercentOfPositive`` as ``percent_of_positive``."""
    name = type(rule).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
