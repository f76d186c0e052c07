"""What was mined, for the eye and in figures: score gaps, a second teacher's opinion, what each rule removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfield.data.store import Store
from nearfield.mining.documents import Rows, Vectors
from nearfield.mining.negatives import Negatives
from nearfield.randomness import generator

Floats = npt.NDArray[np.float64]
Judge = Callable[[int, Rows, Rows], Vectors]
"""(source number, query items, document items) -> a second teacher's scores of these pairs."""


@dataclass(frozen=True)
class Proportion:
    """Of ``n`` trials ``hits`` hit; with Wilson's interval at 95 %."""

    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share; not a number where nothing was tried."""
        return self.hits / self.n if self.n else math.nan


def wilson(hits: int, n: int, z: float = 1.959964) -> Proportion:
    """Wilson's score interval of a share (Wilson 1927): it stays within 0 and 1 and holds for few hits too."""
    if n == 0:
        return Proportion(0, 0, 0.0, 1.0)
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Proportion(
        hits, n, 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half)
    )


@dataclass(frozen=True)
class ShownNegative:
    """A negative in words."""

    text: str
    score: float
    rank: int
    judged: float
    """The second teacher's score."""


@dataclass(frozen=True)
class ShownExample:
    """An example in words."""

    source: str
    example: int
    query: str
    positives: tuple[tuple[str, float], ...]
    negatives: tuple[ShownNegative, ...]


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found."""

    summary: dict[str, Any]
    """As :func:`nearfield.mining.negatives.write_negatives` left it."""
    sample: tuple[ShownExample, ...]
    gaps: Floats
    """The smallest score of an example's positives less that of its negative, one a negative."""
    positive_scores: Floats
    """The smallest score of the positives of each kept example."""
    negative_scores: Floats
    judge: str
    false_negatives: dict[str, Proportion]
    """Source -> of the judged negatives, those that the second teacher scores higher than the positive."""
    shared: Proportion
    """The same over all sources."""


def audit(
    store: Store,
    negatives: Negatives,
    judge: Judge,
    judge_name: str,
    *,
    shown: int = 10,
    judged: int = 500,
    seed: int = 0,
) -> Audit:
    """Look at mined negatives: ``shown`` examples in words, and ``judged`` negatives of each source before a second teacher.

    At most one negative an example is judged, so that the trials are independent. A negative counts as false where the
    judge scores it higher than the example's lowest positive: an estimate by that judge, not the truth.
    """
    counts = np.diff(negatives.offsets)
    owners = np.repeat(np.arange(len(counts)), counts)
    table = negatives.table
    positives = table["positive_scores"].combine_chunks()
    starts = positives.offsets.to_numpy().astype(np.int64)
    scores = negatives.positive_scores.astype(np.float64)
    lowest = np.minimum.reduceat(scores, starts[:-1]) if len(counts) else np.empty(0)
    gaps = lowest[owners] - negatives.scores.astype(np.float64)
    random = generator(seed, "mine", "audit")
    sources = table["source"].to_numpy()
    shares: dict[str, Proportion] = {}
    for number, source in enumerate(store.sources):
        some = np.flatnonzero((sources == number) & (counts > 0))
        if not len(some):
            continue
        some = np.sort(random.choice(some, min(judged, len(some)), replace=False))
        picks = negatives.offsets[some] + random.integers(0, counts[some])
        shares[source.name] = _judge(store, negatives, judge, number, some, picks)
    kept = table["kept"].to_numpy(zero_copy_only=False).astype(bool)
    chosen = np.flatnonzero(counts > 0)
    chosen = np.sort(random.choice(chosen, min(shown, len(chosen)), replace=False))
    return Audit(
        summary=negatives.summary,
        sample=tuple(_show(store, negatives, judge, chosen)),
        gaps=gaps,
        positive_scores=lowest[kept],
        negative_scores=negatives.scores.astype(np.float64),
        judge=judge_name,
        false_negatives=shares,
        shared=wilson(sum(one.hits for one in shares.values()), sum(one.n for one in shares.values())),
    )


def _judge(store: Store, negatives: Negatives, judge: Judge, source: int, places: Rows, picks: Rows) -> Proportion:
    queries = negatives.table["query"].to_numpy()[places]
    examples = store.examples.take(negatives.examples[places])["positives"].to_pylist()
    lengths = [len(rows) for rows in examples]
    items = np.concatenate([negatives.rows[picks], np.concatenate([np.asarray(rows) for rows in examples])])
    asked = np.concatenate([queries, np.repeat(queries, lengths)])
    scores = judge(source, asked, items.astype(np.int64))
    mine, theirs = scores[: len(places)], scores[len(places) :]
    lowest = np.minimum.reduceat(theirs, np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64))
    # Strictly: two scores of 0, as of BM25 without a common word, say nothing.
    return wilson(int((mine > lowest).sum()), len(places))


def _show(store: Store, negatives: Negatives, judge: Judge, places: Rows) -> Iterator[ShownExample]:
    rows = [negatives.table.slice(place, 1).to_pylist()[0] for place in places.tolist()]
    # A judge may have to read the whole corpus: it is asked once a source.
    for source in sorted({row["source"] for row in rows}):
        mine = [row for row in rows if row["source"] == source]
        items = [np.asarray(row["negatives"], dtype=np.int64) for row in mine]
        queries = np.repeat([row["query"] for row in mine], [len(part) for part in items]).astype(np.int64)
        scores = iter(judge(source, queries, np.concatenate(items)).tolist())
        for row, part in zip(mine, items, strict=True):
            positives = store.examples.take([row["example"]])["positives"].to_pylist()[0]
            texts, own = store.shown(part), store.shown(positives)
            yield ShownExample(
                store.sources[source].name,
                row["example"],
                store.shown([row["query"]])[0],
                tuple(zip(own, row["positive_scores"], strict=True)),
                tuple(
                    ShownNegative(text, score, rank, next(scores))
                    for text, score, rank in zip(texts, row["scores"], row["ranks"], strict=True)
                ),
            )
