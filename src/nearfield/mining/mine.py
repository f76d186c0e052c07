"""Mining itself: candidates and rules -> negatives. Functions of their arguments, without files or global state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Ragged, Rows, Vectors
from nearfield.errors import BadInputError
from nearfield.mining.documents import Documents, as_documents
from nearfield.mining.rules import Candidates, Mask, Rule
from nearfield.mining.search import DEFAULT_MEMORY, Neighbours, search
from nearfield.randomness import generator


@dataclass(frozen=True)
class RuleCount:
    """What one rule did."""

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
    """The negatives of n queries, end to end; those of query i are at ``offsets[i]`` to ``offsets[i + 1]``, best first."""

    offsets: Rows
    rows: Rows
    """Document rows."""
    scores: Vectors
    """The teacher's score of each."""
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

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, query: int) -> Rows:
        """The negatives of one query."""
        return self.rows[self.offsets[query] : self.offsets[query + 1]]

    @property
    def short(self) -> Rows:
        """The kept queries that have fewer negatives than wanted; they are not padded."""
        return np.flatnonzero(self.kept & (np.diff(self.offsets) < self.wanted)).astype(np.int64)


def mine(
    queries: Vectors,
    documents: Documents | Vectors,
    positives: Ragged,
    *,
    rules: Sequence[Rule],
    negatives: int,
    depth: int,
    excluded: Ragged | None = None,
    seed: int = 0,
    names: Sequence[str | int] = (),
    memory: int = DEFAULT_MEMORY,
    device: str = "cpu",
) -> MinedNegatives:
    """Search for the best ``depth`` documents of each query [n, d] exactly, and apply the rules.

    ``positives`` lists the document rows of each query's positives; they and those of ``excluded`` are never negatives.
    ``seed`` and ``names`` (a source, a generation) decide what rules draw.
    """
    documents = as_documents(documents)
    hidden = positives if excluded is None else positives.union(excluded)
    found = search(queries, documents, depth, excluded=hidden, memory=memory, device=device)
    scores = documents.pairs(queries, positives.owners(), positives.values)
    return select(found, positives, scores, rules=rules, negatives=negatives, seed=seed, names=names)


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
        offsets=np.searchsorted(owner, np.arange(len(kept) + 1)).astype(np.int64),
        rows=found.rows[owner, rank],
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


def draw(kept: Mask, weights: npt.NDArray[np.float64], negatives: int, seed: int, names: Sequence[str | int]) -> Mask:
    """Draw up to ``negatives`` of the kept candidates of each query without putting back, with odds exp(weights).

    The largest of log-weight plus Gumbel noise are such a draw. Which numbers a query gets depends on the seed, the names
    and the query's place, not on the other queries' candidates.
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
