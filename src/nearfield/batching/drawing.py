"""Which positives and negatives of an example are used in an epoch: drawn anew each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.batching.config import CommonConfig
from nearfield.batching.rows import Floats, Lists, PlannedRows, Rows, SourceExamples, join_lists
from nearfield.errors import BadInputError


@dataclass(frozen=True)
class Stream:
    """The examples that batches are made of together: one source, or several that are pooled."""

    name: str
    source: Rows
    """(n,) the source of each example."""
    examples: Rows
    queries: Rows
    positives: Lists
    negatives: Lists
    scores: Floats | None = None
    labels: Rows | None = None
    positive_scores: Floats | None = None
    negative_scores: Floats | None = None
    samples: Rows | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def representatives(self) -> Rows:
        """(n,) the item that stands for each example's documents, the same in every epoch: its first positive.

        A labelled example stands for itself.
        """
        found = self.queries.copy()
        has = self.positives.lengths > 0
        found[has] = self.positives.values[self.positives.offsets[:-1][has]]
        return found


def make_streams(sources: Sequence[SourceExamples], pools: dict[str, tuple[str, ...]]) -> list[Stream]:
    """One stream a source, but for sources that a pool joins; pools stand where their first source stood."""
    names = [source.name for source in sources]
    for pool, members in pools.items():
        for member in members:
            if member not in names:
                raise BadInputError(
                    f"the pool {pool!r} names the source {member!r}, which is not trained on",
                    where="batches.pools",
                    hint=f"Sources: {', '.join(names)}.",
                )
        if pool in names and pool not in members:
            raise BadInputError(f"the pool {pool!r} has the name of a source", where="batches.pools")
    pool_of = {member: pool for pool, members in pools.items() for member in members}
    grouped: dict[str, list[SourceExamples]] = {}
    for source in sources:
        grouped.setdefault(pool_of.get(source.name, source.name), []).append(source)
    return [_join(name, members) for name, members in grouped.items()]


def _join(name: str, parts: Sequence[SourceExamples]) -> Stream:
    sizes = [len(part) for part in parts]
    labels = _column([part.labels for part in parts], sizes, -1)
    samples = _column([part.samples for part in parts], sizes, -1)
    positives, negatives = [part.positives for part in parts], [part.negatives for part in parts]
    return Stream(
        name,
        np.concatenate([np.full(len(part), part.source, dtype=np.int64) for part in parts]),
        np.concatenate([part.examples for part in parts]),
        np.concatenate([part.queries for part in parts]),
        join_lists(positives),
        join_lists(negatives),
        _column([part.scores for part in parts], sizes, np.nan),
        None if labels is None else labels.astype(np.int64),
        _column([part.positive_scores for part in parts], [len(one.values) for one in positives], np.nan),
        _column([part.negative_scores for part in parts], [len(one.values) for one in negatives], np.nan),
        None if samples is None else samples.astype(np.int64),
    )


def _column(values: Sequence[Rows | Floats | None], lengths: Sequence[int], missing: float) -> Floats | None:
    """A column of all parts; ``missing`` stands for those of a part that has none."""
    if all(value is None for value in values):
        return None
    full = [np.full(length, missing) if value is None else value for value, length in zip(values, lengths, strict=True)]
    return np.concatenate(full).astype(np.float64)


def draw(
    stream: Stream, config: CommonConfig, random: np.random.Generator
) -> tuple[PlannedRows, npt.NDArray[np.bool_], Counter[str]]:
    """Choose the positives and negatives of all examples of a stream.

    Returns the rows in the stream's order, which of them can be used, and how many cannot and why.
    """
    dropped: Counter[str] = Counter()
    usable = np.ones(len(stream), dtype=np.bool_)
    chosen = choose(stream.positives, config.positives, random)
    positives = _pick(stream.positives, chosen)
    if stream.labels is not None:
        positives, usable = _same_label(stream, positives, config.positives, random)
        if not usable.all():
            dropped["no other example has its label"] = int((~usable).sum())
    weights = None
    if config.negative_choice == "balanced_margins" and config.negatives and len(stream.negatives.values):
        weights = _margin_weights(stream, chosen, config.margin_bins)
    negatives = _pick(stream.negatives, choose(stream.negatives, config.negatives, random, weights))
    rows = PlannedRows.of(
        stream.source,
        stream.examples,
        stream.queries,
        positives,
        negatives,
        score=stream.scores,
        label=stream.labels,
    )
    return rows, usable, dropped


def choose(lists: Lists, count: int, random: np.random.Generator, weights: Floats | None = None) -> Rows:
    """``count`` values of each list, drawn without replacement; all of a list that has no more.

    ``weights``, one a value, are what values are drawn in proportion to; none means alike. Returns places in
    ``lists.values``, rising.
    """
    lengths = lists.lengths
    if not len(lengths) or lengths.max() <= count:
        return np.arange(len(lists.values), dtype=np.int64)
    owners = lists.owners()
    # The smallest of exponential draws with these rates: a draw without replacement in proportion to the weights.
    keys = random.exponential(size=len(lists.values))
    if weights is not None:
        keys = keys / weights
    order = np.lexsort((keys, owners))
    rank = np.arange(len(order)) - lists.offsets[owners]
    return np.sort(order[rank < count])


def _pick(lists: Lists, places: Rows) -> Lists:
    if len(places) == len(lists.values):
        return lists
    mask = np.zeros(len(lists.values), dtype=np.bool_)
    mask[places] = True
    return lists.keep(mask)


def _same_label(
    stream: Stream, positives: Lists, count: int, random: np.random.Generator
) -> tuple[Lists, npt.NDArray[np.bool_]]:
    """Labelled examples get ``count`` other items of their label: the next ones in a circle that is drawn anew.

    So within an epoch each item is a positive as often as any other of its label.
    """
    assert stream.labels is not None
    labelled = np.flatnonzero(stream.labels >= 0)
    order = labelled[np.lexsort((random.random(len(labelled)), stream.labels[labelled]))]
    labels = stream.labels[order]
    start = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]])) if len(order) else order
    sizes = np.diff(np.append(start, len(order)))
    first, size = np.repeat(start, sizes), np.repeat(sizes, sizes)
    place = np.arange(len(order)) - first
    turns = np.arange(1, count + 1)
    others = first[:, None] + (place[:, None] + turns[None, :]) % np.maximum(size, 1)[:, None]
    allowed = turns[None, :] < size[:, None]
    counts = positives.lengths.copy()
    counts[order] = allowed.sum(axis=1)
    usable = np.ones(len(stream), dtype=np.bool_)
    usable[order[size < 2]] = False
    offsets = Lists.from_counts(counts, np.empty(0, dtype=np.int64)).offsets
    values = np.empty(int(offsets[-1]), dtype=np.int64)
    rest = np.flatnonzero(stream.labels < 0)
    if len(rest):
        kept = positives.take(rest)
        values[np.repeat(offsets[rest] - kept.offsets[:-1], kept.lengths) + np.arange(len(kept.values))] = kept.values
    rows, columns = np.nonzero(allowed)
    values[offsets[order[rows]] + columns] = stream.queries[order[others[rows, columns]]]
    return Lists(offsets, values), usable


def _margin_weights(stream: Stream, chosen: Rows, bins: int) -> Floats:
    if stream.positive_scores is None or stream.negative_scores is None:
        raise BadInputError(
            f"negatives of {stream.name} have no teacher's scores, which their margins are made of",
            where="batches.negative_choice",
            hint="Mine negatives with a teacher, or use negative_choice: uniform.",
        )
    anchors = np.full(len(stream), np.nan)
    owners = stream.positives.owners()[chosen][::-1]
    anchors[owners] = stream.positive_scores[chosen][::-1]
    margins = anchors[stream.negatives.owners()] - stream.negative_scores
    return margin_weights(stream.negatives, margins, bins)


def margin_weights(lists: Lists, margins: Floats, bins: int) -> Floats:
    """Weights by which a draw takes a bin of margins uniformly, then a value inside it (TAS-B, arXiv 2104.06967).

    A list's margins, from its least to its greatest, are cut into ``bins`` bins of equal width; empty bins are no choice.
    A margin that is not a number has a bin of its own.
    """
    owners = lists.owners()
    low, high = np.full(len(lists), np.inf), np.full(len(lists), -np.inf)
    known = np.isfinite(margins)
    np.minimum.at(low, owners[known], margins[known])
    np.maximum.at(high, owners[known], margins[known])
    width = np.where(high > low, high - low, 1.0)[owners]
    number = np.full(len(margins), bins, dtype=np.int64)
    share = (margins[known] - low[owners][known]) / width[known]
    number[known] = np.minimum((share * bins).astype(np.int64), bins - 1)
    _, which, counts = np.unique(owners * (bins + 1) + number, return_inverse=True, return_counts=True)
    weights: Floats = 1.0 / counts[which]
    return weights
