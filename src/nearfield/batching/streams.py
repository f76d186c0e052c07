"""Examples as columns, and what is drawn of them in an epoch: no Python object a row, so that a million are a few arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from nearfield.arrays import Floats, Mask, Ragged, Rows, beside, concatenate, occurrences, ranges, starts
from nearfield.errors import BadInputError
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.batching.config import PlannerSettings


Of = TypeVar("Of")


@dataclass(frozen=True)
class Examples(Generic[Of]):
    """Examples as columns. Item numbers are rows of the store's items."""

    source: Of
    """The source of all, or (n,) that of each."""
    name: str
    examples: Rows
    """Row numbers of the examples in the store, shape (n,)."""
    queries: Rows
    """The query item of each, shape (n,); of graded pairs the first item, of labelled examples the item."""
    positives: Ragged
    negatives: Ragged
    scores: Floats | None = None
    """The score of each graded pair, shape (n,)."""
    labels: Rows | None = None
    """The label of each labelled example, shape (n,): a number that no other source uses for another label."""
    positive_scores: Floats | None = None
    """A teacher's score of each value of ``positives``."""
    negative_scores: Floats | None = None
    """A teacher's score of each value of ``negatives``."""
    samples: Rows | None = None
    """The sample that each example belongs to, shape (n,): a number that sources share; where the planner asks for it."""

    def __len__(self) -> int:
        return len(self.examples)


class SourceExamples(Examples[int]):
    """The examples of one source that an epoch draws from."""


class Stream(Examples[Rows]):
    """The examples that batches are made of together: of one source, or of several that are pooled."""

    def representatives(self) -> Rows:
        """(n,) the item that stands for each example's documents, the same in every epoch: its first positive.

        A labelled example stands for itself.
        """
        return self.positives.first(self.queries)


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
    return [_pool(name, members) for name, members in grouped.items()]


def _pool(name: str, parts: Sequence[SourceExamples]) -> Stream:
    sizes = [len(part) for part in parts]
    labels = _column([part.labels for part in parts], sizes, -1)
    samples = _column([part.samples for part in parts], sizes, -1)
    positives, negatives = [part.positives for part in parts], [part.negatives for part in parts]
    return Stream(
        np.repeat([part.source for part in parts], sizes).astype(np.int64),
        name,
        np.concatenate([part.examples for part in parts]),
        np.concatenate([part.queries for part in parts]),
        concatenate(positives),
        concatenate(negatives),
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


@dataclass(frozen=True)
class PlannedRows:
    """n examples with the positives and negatives that were chosen for each: the columns of a plan."""

    source: Rows
    example: Rows
    query: Rows
    positives: Ragged
    negatives: Ragged
    stratum: Rows
    """The cluster or community that the row was drawn from, -1 for none."""
    score: Floats
    """Not a number where the example has none."""
    label: Rows
    """-1 where the example has none."""

    @classmethod
    def of(
        cls,
        source: Sequence[int] | Rows,
        example: Sequence[int] | Rows,
        query: Sequence[int] | Rows,
        positives: Ragged,
        negatives: Ragged,
        *,
        stratum: Rows | None = None,
        score: Floats | None = None,
        label: Rows | None = None,
    ) -> PlannedRows:
        """Rows with the columns that are left out filled in."""
        count = len(example)
        none = np.full(count, -1, dtype=np.int64)
        return cls(
            np.asarray(source, dtype=np.int64),
            np.asarray(example, dtype=np.int64),
            np.asarray(query, dtype=np.int64),
            positives,
            negatives,
            none if stratum is None else stratum,
            np.full(count, np.nan) if score is None else score,
            none if label is None else label,
        )

    def __len__(self) -> int:
        return len(self.example)

    def take(self, rows: Rows) -> PlannedRows:
        """These rows, in this order."""
        return PlannedRows(
            self.source[rows],
            self.example[rows],
            self.query[rows],
            self.positives.take(rows),
            self.negatives.take(rows),
            self.stratum[rows],
            self.score[rows],
            self.label[rows],
        )

    def documents(self) -> Ragged:
        """Each row's positives, then its negatives."""
        return beside(self.positives, self.negatives)

    def items(self) -> Ragged:
        """All items of each row: the query, the positives, the negatives."""
        return beside(Ragged.single(self.query), self.documents())


def join_rows(parts: Sequence[PlannedRows]) -> PlannedRows:
    """The rows of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return PlannedRows.of([], [], [], Ragged.empty(0), Ragged.empty(0))
    return PlannedRows(
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.example for part in parts]),
        np.concatenate([part.query for part in parts]),
        concatenate([part.positives for part in parts]),
        concatenate([part.negatives for part in parts]),
        np.concatenate([part.stratum for part in parts]),
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.label for part in parts]),
    )


def known_of(known: Ragged, queries: Rows, wanted: Mask | None = None) -> Ragged:
    """The known positives of each of these queries; none of a query that ``known`` ends before or that is not wanted."""
    inside = queries < len(known) if wanted is None else wanted & (queries < len(known))
    lengths = np.zeros(len(queries), dtype=np.int64)
    lengths[inside] = known.lengths[queries[inside]]
    return Ragged.from_lengths(lengths, known.values[known.places(queries[inside])])


def draw(
    stream: Stream, config: PlannerSettings, random: np.random.Generator
) -> tuple[PlannedRows, Mask, Counter[str]]:
    """Choose the positives and negatives of all examples of a stream, anew in each epoch.

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
        stream.source, stream.examples, stream.queries, positives, negatives, score=stream.scores, label=stream.labels
    )
    return rows, usable, dropped


def choose(lists: Ragged, count: int, random: np.random.Generator, weights: Floats | None = None) -> Rows:
    """``count`` values of each list, drawn without replacement; all of a list that has no more.

    ``weights``, one a value, are what values are drawn in proportion to; none means alike. Returns places in
    ``lists.values``, rising.
    """
    lengths = lists.lengths
    if not len(lengths) or lengths.max() <= count:
        return np.arange(len(lists.values), dtype=np.int64)
    # The smallest of exponential draws with these rates: a draw without replacement in proportion to the weights.
    keys = random.exponential(size=len(lists.values))
    if weights is not None:
        keys = keys / weights
    order = np.lexsort((keys, lists.owners()))
    return np.sort(order[lists.ranks() < count])


def _pick(lists: Ragged, places: Rows) -> Ragged:
    if len(places) == len(lists.values):
        return lists
    mask = np.zeros(len(lists.values), dtype=np.bool_)
    mask[places] = True
    return lists.keep(mask)


def _same_label(stream: Stream, positives: Ragged, count: int, random: np.random.Generator) -> tuple[Ragged, Mask]:
    """Labelled examples get ``count`` other items of their label: the next ones in a circle that is drawn anew.

    So within an epoch each item is a positive as often as any other of its label.
    """
    assert stream.labels is not None
    labelled = np.flatnonzero(stream.labels >= 0)
    order = labelled[np.lexsort((random.random(len(labelled)), stream.labels[labelled]))]
    labels = stream.labels[order]
    _, group, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    first, size, place = starts(sizes)[group], sizes[group], occurrences(labels)
    turns = np.arange(1, count + 1)
    others = first[:, None] + (place[:, None] + turns[None, :]) % np.maximum(size, 1)[:, None]
    allowed = turns[None, :] < size[:, None]
    counts = positives.lengths.copy()
    counts[order] = allowed.sum(axis=1)
    usable = np.ones(len(stream), dtype=np.bool_)
    usable[order[size < 2]] = False
    offsets = starts(counts)
    values = np.empty(int(offsets[-1]), dtype=np.int64)
    rest = np.flatnonzero(stream.labels < 0)
    values[ranges(offsets[rest], positives.lengths[rest])] = positives.take(rest).values
    rows, columns = np.nonzero(allowed)
    values[offsets[order[rows]] + columns] = stream.queries[order[others[rows, columns]]]
    return Ragged(offsets, values), usable


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


def margin_weights(lists: Ragged, margins: Floats, bins: int) -> Floats:
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


def draw_numbers(count: int, examples: Rows, seed: int, *names: str | int) -> Rows:
    """A number from 0 to ``count`` - 1 for each example: of the seed, the names and the example's row alone."""
    if count == 1 or not len(examples):
        return np.zeros(len(examples), dtype=np.int64)
    # One number for each row up to the last, so that the order and choice of the examples do not matter.
    return generator(seed, *names).integers(0, count, int(examples.max()) + 1)[examples]


@dataclass(frozen=True)
class PromptDraw:
    """The prompt numbers that the rows of a source may have, and how one is drawn for a row."""

    source: str
    query: Sequence[Sequence[int]]
    """[phrasings][1 + sets]: the number of each phrasing without examples, then with each set before it."""
    document: Sequence[int]
    """The number of each phrasing."""
    forbidden: Sequence[Rows] = ()
    """For each set the query items that must not get it."""
    none: float = 0.0
    """Share of the rows without examples."""

    def draw(self, examples: Rows, queries: Rows, seed: int, epoch: int) -> tuple[Rows, Rows]:
        """The (query, document) prompt numbers of rows, each [n]: a function of these arguments, row by row."""
        names = ("prompts", self.source, epoch)
        phrasing = draw_numbers(len(self.query), examples, seed, *names, "query")
        chosen = np.zeros(len(examples), dtype=np.int64)
        if self.forbidden and len(examples):
            chosen = self._sets(examples, queries, seed, *names)
        query = np.asarray(self.query, dtype=np.int64)[phrasing, chosen]
        document = np.asarray(self.document, dtype=np.int64)
        return query, document[draw_numbers(len(self.document), examples, seed, *names, "document")]

    def _sets(self, examples: Rows, queries: Rows, seed: int, *names: str | int) -> Rows:
        """0 for no examples, otherwise 1 + the set: drawn evenly from those that are allowed."""
        allowed = np.stack([~np.isin(queries, items) for items in self.forbidden], axis=1)
        order = np.cumsum(allowed, axis=1)
        count = order[:, -1]
        draws = generator(seed, *names, "sets").random((int(examples.max()) + 1, 2))[examples]
        wanted = np.minimum((draws[:, 0] * count).astype(np.int64), np.maximum(count - 1, 0)) + 1
        picked = 1 + np.argmax(order == wanted[:, None], axis=1)
        without = (draws[:, 1] < self.none) | (count == 0)
        return np.where(without, 0, picked)
