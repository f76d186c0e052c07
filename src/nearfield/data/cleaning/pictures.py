"""Steps for pictures and their captions: the filters of ALIGN (arXiv 2102.05918, section 3), and near-duplicate pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from nearfield.console import track
from nearfield.data.cleaning.duplicates import SIDES, by_first_use, in_order, take_out_repeats
from nearfield.data.cleaning.step import Encoders, Taken, take_out_texts
from nearfield.data.cleaning.table import ExampleTable
from nearfield.data.cleaning_config import NearPicturesStep, PictureSizeStep, RareWordsStep, SharedStep
from nearfield.data.looks import Looks, first_of_each_look, looks_of
from nearfield.data.normal import words
from nearfield.data.store import Rows

_BATCH = 256


class PictureSize:
    """Pictures whose files are too small or too long."""

    def __init__(self, config: PictureSizeStep) -> None:
        self.config = config

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the pictures that have a reason to go."""
        config = self.config
        examples = table.of_sources(sources)
        items = table.items(examples, config.sides)
        sizes = table.store.original_sizes(items)
        bad: dict[int, str] = {}
        for row, short, long in zip(
            items.tolist(), sizes.min(axis=1).tolist(), sizes.max(axis=1).tolist(), strict=True
        ):
            if not short:
                continue
            if short < config.min_side:
                bad[row] = f"a side under {config.min_side:,} pixels"
            elif config.max_ratio is not None and long > config.max_ratio * short:
                bad[row] = f"sides over {config.max_ratio:g} to 1"
        take_out_texts(table, examples, config.sides, bad, taken)


class Shared:
    """Pictures with too many texts, and texts of too many pictures."""

    def __init__(self, config: SharedStep) -> None:
        self.config = config

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out what is shared by too many; both are counted before either goes."""
        config = self.config
        if config.texts_per_picture is None and config.pictures_per_text is None:
            return
        examples = table.of_sources(sources)
        pairs = picture_and_text(table, examples)
        bad: dict[int, str] = {}
        if config.texts_per_picture is not None:
            crowded = _over(pairs[:, 0], config.texts_per_picture)
            items = table.items(examples, ("query", "positives"))
            hit = np.isin(table.store.picture_rows(items), crowded)
            bad |= dict.fromkeys(items[hit].tolist(), f"a picture with over {config.texts_per_picture:,} texts")
        if config.pictures_per_text is not None:
            common = _over(pairs[:, 1], config.pictures_per_text)
            bad |= dict.fromkeys(common.tolist(), f"a text of over {config.pictures_per_text:,} pictures")
        take_out_texts(table, examples, ("query", "positives"), bad, taken)


def picture_and_text(table: ExampleTable, examples: Rows) -> Rows:
    """[pairs, 2]: the different pairs of a picture (row of the pictures) and a text (row of the items) in examples.

    A pair is a query and a positive of which one has a picture and the other has none.
    """
    members = table.positives
    mine = np.flatnonzero(members.alive & np.isin(members.owners, examples))
    sides = np.stack([table.query[members.owners[mine]], members.rows[mine]], axis=1)
    pictures = np.stack([table.store.picture_rows(sides[:, side]) for side in (0, 1)], axis=1)
    parts = [
        np.stack([pictures[one, seen], sides[one, 1 - seen]], axis=1)
        for seen in (0, 1)
        for one in [(pictures[:, seen] >= 0) & (pictures[:, 1 - seen] < 0)]
    ]
    found: Rows = np.unique(np.concatenate(parts), axis=0)
    return found


def _over(members: Rows, most: int) -> Rows:
    values, counts = np.unique(members, return_counts=True)
    return values[counts > most]


class RareWords:
    """Texts with a word, or two words side by side, that the data set hardly has."""

    def __init__(self, config: RareWordsStep) -> None:
        self.config = config

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Count over all examples of the sources, then take out; a text counts once for each example that has it."""
        config = self.config
        if config.vocabulary is None and config.least <= 1:
            return
        examples = table.of_sources(sources)
        items = table.items(examples, config.sides)
        uses = self._uses(table, examples)
        counts: Counter[str] = Counter()
        for row, text in _texts(table, items, "Cleaning: counting words"):
            for gram in grams(text):
                counts[gram] += int(uses[row])
        bar = config.least
        if config.vocabulary is not None and len(counts) > config.vocabulary:
            # What is as frequent as the last one stays, whatever its place.
            bar = max(bar, counts.most_common(config.vocabulary)[-1][1])
        bad: dict[int, str] = {}
        for row, text in _texts(table, items, "Cleaning: rare words"):
            if any(counts[gram] < bar for gram in grams(text)):
                bad[row] = "a rare word or pair of words"
        take_out_texts(table, examples, config.sides, bad, taken)

    def _uses(self, table: ExampleTable, examples: Rows) -> Rows:
        """For each item, how many of the examples have it on one of the sides."""
        uses = np.zeros(table.store.items.num_rows, dtype=np.int64)
        mine = np.zeros(len(table), dtype=np.bool_)
        mine[examples] = True
        for side in self.config.sides:
            if side == "query":
                np.add.at(uses, table.query[examples], 1)
                continue
            members = table.positives if side == "positives" else table.negatives
            np.add.at(uses, members.rows[members.alive & mine[members.owners]], 1)
        return uses


def grams(text: str) -> list[str]:
    """The words of a text and its pairs of neighbouring words, in order, with repetition."""
    split = words(text)
    return [*split, *(f"{first} {second}" for first, second in pairwise(split))]


def _texts(table: ExampleTable, items: Rows, what: str) -> Iterator[tuple[int, str]]:
    for rows, texts in track(table.texts(items), what):
        for row, text in zip(rows.tolist(), texts, strict=True):
            if text:
                yield row, text


class NearPictures:
    """Examples whose pictures look like those of an earlier example."""

    def __init__(self, config: NearPicturesStep) -> None:
        self.config = config

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them; texts are equal only where they are the same item."""
        config = self.config
        if config.bits is None:
            return
        store = table.store
        examples = in_order(table, sources, config.keep)
        items = by_first_use(table, examples, SIDES[config.compare])
        kinds = np.asarray(store.modalities(items), dtype=object)
        seen: Rows = items[kinds == "image"]
        parts: list[Looks] = []
        for start in track(range(0, len(seen), _BATCH), "Cleaning: looking at pictures"):
            images = store.images(seen[start : start + _BATCH])
            parts.append(looks_of([image for image in images if image is not None]))
        leader = np.arange(store.items.num_rows, dtype=np.int64)
        if parts:
            first = first_of_each_look(Looks.join(parts), config.bits, config.tolerance)
            leader[seen] = seen[first]
        take_out_repeats(table, examples, config.compare, items, leader[items], "near-duplicate picture", taken)
