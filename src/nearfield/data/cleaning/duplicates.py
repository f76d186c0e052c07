"""Steps that keep the first of examples whose texts are near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nearfield.console import track
from nearfield.data.cleaning.step import Encoders, Taken
from nearfield.data.cleaning.table import ExampleTable
from nearfield.data.cleaning_config import NearDuplicatesStep, NearVectorsStep
from nearfield.data.near import first_of_each_vector, representatives, unit
from nearfield.data.store import Rows

SIDES = {"example": ("query", "positives"), "query": ("query",), "positives": ("positives",)}


class NearDuplicates:
    """By words."""

    def __init__(self, config: NearDuplicatesStep) -> None:
        self.config = config

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them."""
        config = self.config
        if not (config.words or config.normalised):
            return
        examples = in_order(table, sources, config.keep)
        items = by_first_use(table, examples, SIDES[config.compare])
        # An item with a picture is like no other by its words alone.
        compared = np.flatnonzero(table.store.picture_rows(items) < 0)
        texts = (part for _, part in track(table.texts(items[compared]), "Cleaning: near-duplicates by words"))
        rule = config.rule() if config.words else None
        leaders = items.copy()
        if len(compared):
            first = representatives(texts, rule, normalised=config.normalised)
            leaders[compared] = items[compared[first]]
        take_out_repeats(table, examples, config.compare, items, leaders, "near-duplicate by words", taken)


class NearVectors:
    """By embeddings."""

    def __init__(self, config: NearVectorsStep) -> None:
        self.config = config

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them."""
        config = self.config
        if config.cosine is None:
            return
        encode = encoders(config.model)
        examples = in_order(table, sources, config.keep)
        items = by_first_use(table, examples, SIDES[config.compare])
        places, vectors = [], []
        done = 0
        for rows, texts in track(table.texts(items), "Cleaning: near-duplicates by vectors"):
            seen = table.store.picture_rows(rows) >= 0
            long = [p for p, text in enumerate(texts) if len(text.split()) >= config.min_words and not seen[p]]
            if long:
                vectors.append(unit(encode([texts[place] for place in long])))
                places.append(np.asarray(long, dtype=np.int64) + done)
            done += len(rows)
        leaders = items.copy()
        if vectors:
            compared = np.concatenate(places)
            first = first_of_each_vector(np.concatenate(vectors), config.cosine)
            leaders[compared] = items[compared[first]]
        take_out_repeats(table, examples, config.compare, items, leaders, "near-duplicate by vectors", taken)


def in_order(table: ExampleTable, sources: Sequence[int], keep: Sequence[str]) -> Rows:
    """The examples of the sources in the order in which they stay: by split, those of ``keep`` first, then by row."""
    examples = table.of_sources(sources)
    if not keep:
        return examples
    rank = {split: number for number, split in enumerate(keep)}
    ranks = np.asarray([rank.get(split, len(keep)) for split in table.split[examples].tolist()], dtype=np.int64)
    return examples[np.argsort(ranks, kind="stable")]


def by_first_use(table: ExampleTable, examples: Rows, sides: Sequence[str]) -> Rows:
    """The items on these sides of the examples, each once, in the order in which the examples first use them."""
    place = np.full(len(table), -1, dtype=np.int64)
    place[examples] = np.arange(len(examples))
    rows, when = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    if "query" in sides:
        rows.append(table.query[examples])
        when.append(2 * place[examples])
    if "positives" in sides:
        members = table.positives
        mine = np.flatnonzero(members.alive & (place[members.owners] >= 0))
        rows.append(members.rows[mine])
        when.append(2 * place[members.owners[mine]] + 1)
    every = np.concatenate(rows)
    every = every[np.argsort(np.concatenate(when), kind="stable")]
    _, first = np.unique(every, return_index=True)
    return every[np.sort(first)]


def take_out_repeats(
    table: ExampleTable, examples: Rows, compare: str, items: Rows, leaders: Rows, reason: str, taken: Taken
) -> None:
    """Keep the first example of those that are equal when each item is replaced by its leader.

    Labels and scores count, too, unless only one side is compared.
    """
    leader = dict(zip(items.tolist(), leaders.tolist(), strict=True))
    lists = table.positives.lists(len(table)) if compare != "query" else None
    labels, scores = table.label.to_pylist(), table.score.to_pylist()
    seen: dict[tuple[object, ...], int] = {}
    gone, like = [], []
    for example in examples.tolist():
        key: list[object] = []
        if compare != "positives":
            key.append(leader[int(table.query[example])])
        if lists is not None:
            key.append(tuple(sorted({leader[row] for row in lists[example]})))
        if compare == "example":
            key += [labels[example], scores[example]]
        elif compare == "positives" and not key[0]:
            # A labelled item has no positives that could be repeated.
            continue
        first = seen.setdefault(tuple(key), example)
        if first != example:
            gone.append(example)
            like.append(first)
    rows, firsts = np.asarray(gone, dtype=np.int64), np.asarray(like, dtype=np.int64)
    table.alive[rows] = False
    taken.reasons[reason] += len(rows)
    if compare == "positives" and lists is not None:
        texts = np.asarray([lists[example][0] for example in gone], dtype=np.int64)
        others = np.asarray([lists[example][0] for example in like], dtype=np.int64)
    else:
        texts, others = table.query[rows], table.query[firsts]
    taken.write(rows, "example", [reason] * len(rows), texts, others)
