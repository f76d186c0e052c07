"""The cleaning steps: by single texts, by images and their captions (ALIGN, arXiv 2102.05918, section 3), by near-duplicates."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from nearfield.arrays import Mask, Rows
from nearfield.config import ConfigPath, Share
from nearfield.console import track
from nearfield.data.cleaning import NearDuplicateConfig, Sides, SidesStep, StepBase
from nearfield.data.images import pillow
from nearfield.data.items import ID_BYTES
from nearfield.data.near_duplicates import first_near_vector, representatives, unit, words
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from nearfield.data.cleaning.run import Encoders, ExampleTable, Taken


_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"]+", re.IGNORECASE)


def each_text(table: ExampleTable, items: Rows, what: str) -> Iterator[tuple[int, str]]:
    """Items with their texts; those that are an image alone are left out."""
    for rows, texts in track(table.texts(items), what):
        for row, text in zip(rows.tolist(), texts, strict=True):
            if text:
                yield row, text


class TextStep(SidesStep):
    """The base of steps that look at one text at a time."""

    def neutral(self) -> bool:
        """Whether every text stays."""
        return False

    def reason(self, text: str) -> str | None:
        """Why this text goes; None if it stays."""
        raise NotImplementedError

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the texts that have a reason to go."""
        if self.neutral():
            return
        examples = table.of_sources(sources)
        bad: dict[int, str] = {}
        for row, text in each_text(table, table.items(examples, self.sides), f"Cleaning: {taken.kind}"):
            why = self.reason(text)
            if why is not None:
                bad[row] = why
        taken.take_out(examples, self.sides, bad)


class LengthStep(TextStep):
    """Texts that are too short or too long. Without bounds nothing is."""

    kind: Literal["length"] = "length"
    unit: Literal["characters", "words"] = "words"
    """The unit of both bounds; words are separated by white space."""
    least: Annotated[int, Field(ge=0)] = 0
    """Shorter texts go; 0 lets all stay."""
    most: Annotated[int, Field(ge=1)] | None = None
    """Longer texts go; null lets all stay."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.most is not None and self.most < self.least:
            raise ValueError("'most' is below 'least': no text would stay")
        return self

    def neutral(self) -> bool:
        return self.least == 0 and self.most is None

    def reason(self, text: str) -> str | None:
        length = len(text) if self.unit == "characters" else len(text.split())
        if length < self.least:
            return f"fewer than {self.least:,} {self.unit}"
        if self.most is not None and length > self.most:
            return f"more than {self.most:,} {self.unit}"
        return None


class CharactersStep(TextStep):
    """Texts with too few letters or printable characters, or too much of URLs or control characters, as shares.

    The defaults take nothing out.
    """

    kind: Literal["characters"] = "characters"
    min_letters: Share = 0
    """Letters, marks and digits among the characters that are no white space."""
    min_printable: Share = 0
    """Of all characters; white space is printable here."""
    max_urls: Share = 1
    """Characters inside URLs, of all."""
    max_control: Share = 1
    """Control and format characters other than tab and line break, unassigned and private ones, and U+FFFD; of all."""

    def neutral(self) -> bool:
        return self.min_letters == self.min_printable == 0 and self.max_urls == self.max_control == 1

    def reason(self, text: str) -> str | None:
        if self.min_letters > 0 and letters(text) < self.min_letters:
            return f"under {self.min_letters:.0%} letters"
        if self.min_printable > 0 and printable(text) < self.min_printable:
            return f"under {self.min_printable:.0%} printable"
        if self.max_urls < 1 and urls(text) > self.max_urls:
            return f"over {self.max_urls:.0%} URLs"
        if self.max_control < 1 and control(text) > self.max_control:
            return f"over {self.max_control:.0%} control characters"
        return None


def letters(text: str) -> float:
    """Letters, marks and digits among the characters that are no white space, as a share; 0 without any."""
    solid = [c for c in text if not c.isspace()]
    return sum(c.isalnum() or unicodedata.category(c)[0] == "M" for c in solid) / max(len(solid), 1)


def printable(text: str) -> float:
    """Printable characters and white space, as a share."""
    return sum(c.isprintable() or c.isspace() for c in text) / max(len(text), 1)


def urls(text: str) -> float:
    """Characters inside URLs, as a share."""
    return sum(len(match.group()) for match in _URL.finditer(text)) / max(len(text), 1)


def control(text: str) -> float:
    """Control, format, private and unassigned characters and U+FFFD, as a share; tab and line breaks are none."""
    return sum(c == "\ufffd" or (c not in "\t\n\r" and unicodedata.category(c)[0] == "C") for c in text) / max(
        len(text), 1
    )


class LanguageStep(TextStep):
    """Texts in none of the languages, by py3langid: offline, 140 languages. Without languages nothing is taken out.

    Only what is surely in another language goes: short texts are hard to tell.
    """

    kind: Literal["language"] = "language"
    languages: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] = ()
    """ISO 639-1 codes, e.g. ``en``; ISO 639-2 where a language has none."""
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.9
    """A text goes if another language has at least this probability."""
    min_characters: Annotated[int, Field(ge=1)] = 20
    """Shorter texts stay."""

    def neutral(self) -> bool:
        return not self.languages

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the texts in other languages; refuse languages that the model does not know."""
        unknown = sorted(set(self.languages) - set(_identifier().labels)) if self.languages else []
        if unknown:
            raise BadInputError(
                f"the language filter does not know {', '.join(unknown)}",
                hint=f"Languages: {', '.join(sorted(_identifier().labels))}.",
            )
        super().apply(table, sources, taken, encoders)

    def reason(self, text: str) -> str | None:
        if len(text) < self.min_characters:
            return None
        # The beginning tells the language; a text of a megabyte would take seconds.
        language, confidence = _identifier().classify(text[:5000])
        if language in self.languages or confidence < self.confidence:
            return None
        return f"language {language}"


@functools.cache
def _identifier() -> Any:
    """py3langid's model, with probabilities: its own default gives logarithms that cannot be bounded."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


class RareWordsStep(SidesStep):
    """Texts with a word, or two words side by side, that the data set hardly has. The defaults take nothing out."""

    kind: Literal["rare_words"] = "rare_words"
    vocabulary: Annotated[int, Field(ge=1)] | None = None
    """So many of the most frequent words and pairs are known, and those as frequent as the last; ALIGN's are 100 million."""
    least: Annotated[int, Field(ge=1)] = 1
    """A word or pair is known if it occurs so often in the examples."""
    sides: Sides = ("query", "positives")
    """The sides whose words are counted and judged."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Count over all examples of the sources, then take out; a text counts once for each example that has it."""
        if self.vocabulary is None and self.least <= 1:
            return
        examples = table.of_sources(sources)
        items = table.items(examples, self.sides)
        uses = self._uses(table, examples)
        counts: Counter[str] = Counter()
        for row, text in each_text(table, items, "Cleaning: counting words"):
            for gram in grams(text):
                counts[gram] += int(uses[row])
        bar = self.least
        if self.vocabulary is not None and len(counts) > self.vocabulary:
            # Those that tie with the last one stay.
            bar = max(bar, counts.most_common(self.vocabulary)[-1][1])
        bad: dict[int, str] = {}
        for row, text in each_text(table, items, "Cleaning: rare words"):
            if any(counts[gram] < bar for gram in grams(text)):
                bad[row] = "a rare word or pair of words"
        taken.take_out(examples, self.sides, bad)

    def _uses(self, table: ExampleTable, examples: Rows) -> Rows:
        """For each item, how many of the examples have it on one of the sides."""
        uses = np.zeros(table.store.items.num_rows, dtype=np.int64)
        mine = np.zeros(len(table), dtype=np.bool_)
        mine[examples] = True
        for side in self.sides:
            if side == "query":
                np.add.at(uses, table.query[examples], 1)
                continue
            members = table.members(side)
            np.add.at(uses, members.rows[members.alive & mine[members.owners]], 1)
        return uses


def grams(text: str) -> list[str]:
    """The words of a text and its pairs of neighbouring words, in order, with repetition."""
    split = words(text)
    return [*split, *(f"{first} {second}" for first, second in pairwise(split))]


class RemovalListStep(SidesStep):
    """Texts named by a file: JSONL with an ``id`` a line, as ``nearfield data decontaminate --remove`` writes it.

    An example goes with its query or its last positive; a negative goes alone.
    """

    kind: Literal["removal_list"] = "removal_list"
    path: ConfigPath
    """The JSONL file."""

    def inputs(self) -> dict[str, Any]:
        from nearfield.data.readers import hash_files

        return {"path": list(hash_files([self.path]).values())}

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the items whose ids are in the list; ids that no item has are ignored."""
        reasons = read_removals(self.path)
        examples = table.of_sources(sources)
        rows = table.items(examples, self.sides)
        ids = table.store.items["id"].take(rows).to_pylist()
        bad = {row: reasons[identity] for row, identity in zip(rows.tolist(), ids, strict=True) if identity in reasons}
        taken.take_out(examples, self.sides, bad)


def read_removals(path: Path) -> dict[bytes, str]:
    """Item id -> reason, of a JSONL file with ``id`` and perhaps ``kind`` and ``task`` on each line."""
    reasons: dict[bytes, str] = {}
    hint = "Write it with: nearfield data decontaminate RECIPE --suite SUITE --remove FILE."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"this removal list cannot be read ({error})", where=str(path), hint=hint) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            identity = bytes.fromhex(entry["id"])
        except (ValueError, TypeError, KeyError) as error:
            raise BadInputError(
                "this line of the removal list has no item id", where=f"{path}:{number}", hint=hint
            ) from error
        if len(identity) != ID_BYTES:
            raise BadInputError(f"an item id has {2 * ID_BYTES} hex digits", where=f"{path}:{number}", hint=hint)
        kind, task = entry.get("kind"), entry.get("task")
        reasons[identity] = (
            f"{kind} match with {task}" if isinstance(kind, str) and isinstance(task, str) else "in the list"
        )
    return reasons


_BATCH = 256


class ImageSizeStep(SidesStep):
    """Images whose files are too small, or much longer than wide. The defaults take nothing out.

    ALIGN keeps a shorter side of more than 200 pixels and sides of less than 3 to 1.
    """

    kind: Literal["picture_size"] = "picture_size"
    min_side: Annotated[int, Field(ge=0)] = 0
    """Of the shorter side, in pixels of the file."""
    max_ratio: Annotated[float, Field(ge=1)] | None = None
    """Longer to shorter side; one that is exactly this stays."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the images that have a reason to go."""
        examples = table.of_sources(sources)
        items = table.items(examples, self.sides)
        sizes = table.store.original_sizes(items)
        bad: dict[int, str] = {}
        for row, short, long in zip(
            items.tolist(), sizes.min(axis=1).tolist(), sizes.max(axis=1).tolist(), strict=True
        ):
            if not short:
                continue
            if short < self.min_side:
                bad[row] = f"a side under {self.min_side:,} pixels"
            elif self.max_ratio is not None and long > self.max_ratio * short:
                bad[row] = f"sides over {self.max_ratio:g} to 1"
        taken.take_out(examples, self.sides, bad)


class SharedStep(StepBase):
    """Images with too many different texts, and texts of too many different images. Null takes nothing out.

    A pair is a query and a positive of which one has an image and the other has none. Run it before anything is drawn from
    the data. ALIGN's bounds are 1,000 and 10.
    """

    kind: Literal["shared"] = "shared"
    texts_per_picture: Annotated[int, Field(ge=1)] | None = None
    """An image with more different texts goes; null lets all stay."""
    pictures_per_text: Annotated[int, Field(ge=1)] | None = None
    """A text of more different images goes; null lets all stay."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out what is shared by too many; both are counted before either goes."""
        if self.texts_per_picture is None and self.pictures_per_text is None:
            return
        examples = table.of_sources(sources)
        pairs = image_and_text(table, examples)
        bad: dict[int, str] = {}
        if self.texts_per_picture is not None:
            crowded = _over(pairs[:, 0], self.texts_per_picture)
            items = table.items(examples, ("query", "positives"))
            hit = np.isin(table.store.image_rows(items), crowded)
            bad |= dict.fromkeys(items[hit].tolist(), f"an image with over {self.texts_per_picture:,} texts")
        if self.pictures_per_text is not None:
            common = _over(pairs[:, 1], self.pictures_per_text)
            bad |= dict.fromkeys(common.tolist(), f"a text of over {self.pictures_per_text:,} images")
        taken.take_out(examples, ("query", "positives"), bad)


def image_and_text(table: ExampleTable, examples: Rows) -> Rows:
    """[pairs, 2]: the different pairs of an image (row of the images) and a text (row of the items) in examples.

    A pair is a query and a positive of which one has an image and the other has none.
    """
    members = table.positives
    mine = np.flatnonzero(members.alive & np.isin(members.owners, examples))
    sides = np.stack([table.query[members.owners[mine]], members.rows[mine]], axis=1)
    images = np.stack([table.store.image_rows(sides[:, side]) for side in (0, 1)], axis=1)
    parts = [
        np.stack([images[one, seen], sides[one, 1 - seen]], axis=1)
        for seen in (0, 1)
        for one in [(images[:, seen] >= 0) & (images[:, 1 - seen] < 0)]
    ]
    pairs: Rows = np.unique(np.concatenate(parts), axis=0)
    return pairs


def _over(members: Rows, most: int) -> Rows:
    values, counts = np.unique(members, return_counts=True)
    return values[counts > most]


_SIDES = {"example": ("query", "positives"), "query": ("query",), "positives": ("positives",)}


class DuplicateStep(StepBase):
    """The base of steps that keep the first of examples that say the same."""

    compare: Literal["example", "query", "positives"] = "example"
    """The texts that must be near-duplicates for two examples to be: all but the negatives, or those of one side."""
    keep: tuple[str, ...] = ()
    """Splits whose examples stay before those of others, e.g. ``[test, validation]``."""

    def in_order(self, table: ExampleTable, sources: Sequence[int]) -> Rows:
        """The examples of the sources in the order in which they stay: by split, those of ``keep`` first, then by row."""
        examples = table.of_sources(sources)
        if not self.keep:
            return examples
        rank = {split: number for number, split in enumerate(self.keep)}
        ranks = np.asarray(
            [rank.get(split, len(self.keep)) for split in table.split[examples].tolist()], dtype=np.int64
        )
        return examples[np.argsort(ranks, kind="stable")]

    def by_first_use(self, table: ExampleTable, examples: Rows) -> Rows:
        """The items that are compared, each once, in the order in which the examples first use them."""
        sides = _SIDES[self.compare]
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

    def take_out_repeats(self, taken: Taken, examples: Rows, items: Rows, leaders: Rows, reason: str) -> None:
        """Keep the first example of those that are equal when each item is replaced by its leader.

        Labels and scores count, too, unless only one side is compared.
        """
        table, compare = taken.table, self.compare
        leader = dict(zip(items.tolist(), leaders.tolist(), strict=True))
        lists = table.positives.kept(len(table)) if compare != "query" else None
        labels, scores = table.label.to_pylist(), table.score.to_pylist()
        seen: dict[tuple[object, ...], int] = {}
        gone, like = [], []
        for example in examples.tolist():
            key: list[object] = []
            if compare != "positives":
                key.append(leader[int(table.query[example])])
            if lists is not None:
                key.append(tuple(sorted({leader[row] for row in lists[example].tolist()})))
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
            texts, others = lists.take(rows).first(), lists.take(firsts).first()
        else:
            texts, others = table.query[rows], table.query[firsts]
        taken.write(rows, "example", [reason] * len(rows), texts, others)


class NearDuplicatesStep(NearDuplicateConfig, DuplicateStep):
    """Examples whose texts are near-duplicates, by their words, of an earlier example's, which stays.

    Found by MinHash and checked by :class:`NearDuplicateConfig`; texts with one normal form are near-duplicates,
    too. With ``words: false`` and ``normalised: false`` nothing is.
    """

    kind: Literal["near_duplicates"] = "near_duplicates"
    words: bool = True
    """Whether texts that share most of their words are near-duplicates."""
    normalised: bool = True
    """Whether texts with one normal form (letters and digits, case folded) are."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them."""
        if not (self.words or self.normalised):
            return
        examples = self.in_order(table, sources)
        items = self.by_first_use(table, examples)
        # An item with an image is like no other by its words alone.
        compared = np.flatnonzero(table.store.image_rows(items) < 0)
        texts = (part for _, part in track(table.texts(items[compared]), "Cleaning: near-duplicates by words"))
        rule = self if self.words else None
        leaders = items.copy()
        if len(compared):
            first = representatives(texts, rule, normalised=self.normalised)
            leaders[compared] = items[compared[first]]
        self.take_out_repeats(taken, examples, items, leaders, "near-duplicate by words")


class NearVectorsStep(DuplicateStep):
    """The same by embeddings: texts whose vectors have at least this cosine. Null takes nothing out."""

    kind: Literal["near_vectors"] = "near_vectors"
    model: str
    """A sentence-transformers model: a hub id, or a folder."""
    cosine: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    """The least cosine of near-duplicates; raise it where different texts are found alike. Null takes nothing out."""
    min_words: Annotated[int, Field(ge=1)] = 4
    """Shorter texts are no near-duplicates."""

    def inputs(self) -> dict[str, Any]:
        """The content of files that the step reads."""
        from nearfield.files import hash_folder
        from nearfield.provenance import hub_commit

        if Path(self.model).is_dir():
            return {"model": hash_folder(Path(self.model))}
        commit = hub_commit(self.model, None)
        return {} if commit is None else {"model": commit}

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them."""
        if self.cosine is None:
            return
        encode = encoders(self.model)
        examples = self.in_order(table, sources)
        items = self.by_first_use(table, examples)
        places, vectors = [], []
        done = 0
        for rows, texts in track(table.texts(items), "Cleaning: near-duplicates by vectors"):
            seen = table.store.image_rows(rows) >= 0
            long = [p for p, text in enumerate(texts) if len(text.split()) >= self.min_words and not seen[p]]
            if long:
                vectors.append(unit(encode([texts[place] for place in long])))
                places.append(np.asarray(long, dtype=np.int64) + done)
            done += len(rows)
        leaders = items.copy()
        if vectors:
            compared = np.concatenate(places)
            first = first_near_vector(np.concatenate(vectors), self.cosine)
            leaders[compared] = items[compared[first]]
        self.take_out_repeats(taken, examples, items, leaders, "near-duplicate by vectors")


_SIDE = 8


@dataclass(frozen=True)
class PerceptualHashes:
    """Perceptual hashes of n images: a few bytes each, enough to find copies."""

    bits: npt.NDArray[np.uint64]
    """[n]: where brightness rises from left to right, on a grid of 8 x 8 (a difference hash)."""
    small: npt.NDArray[np.uint8]
    """[n, 8, 8, 3]: the images at 8 x 8 pixels; the hash is blind to colour and to flat images."""

    @classmethod
    def of(cls, images: Sequence[Image]) -> PerceptualHashes:
        """Those of RGB images."""
        box = pillow().Resampling.BOX
        bits = np.zeros(len(images), dtype=np.uint64)
        small = np.zeros((len(images), _SIDE, _SIDE, 3), dtype=np.uint8)
        for number, image in enumerate(images):
            grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), box)).astype(np.int64)
            rises = (grey[:, 1:] > grey[:, :-1]).ravel()
            bits[number] = np.packbits(rises).view(">u8")[0]
            small[number] = np.asarray(image.resize((_SIDE, _SIDE), box))
        return cls(bits, small)

    @classmethod
    def join(cls, parts: Sequence[PerceptualHashes]) -> PerceptualHashes:
        """Those of several groups, one after the other."""
        return cls(np.concatenate([part.bits for part in parts]), np.concatenate([part.small for part in parts]))

    def alike(self, one: int, others: Rows, bits: int, tolerance: float) -> Mask:
        """Whether one image looks like each of others: at most ``bits`` differ, and colours by at most ``tolerance``."""
        near: Mask = np.bitwise_count(self.bits[others] ^ self.bits[one]) <= bits
        hits = np.flatnonzero(near)
        apart = self.small[others[hits]].astype(np.int16) - self.small[one].astype(np.int16)
        near[hits] = np.abs(apart).mean(axis=(1, 2, 3)) <= tolerance
        return near

    def first_alike(self, bits: int, tolerance: float) -> Rows:
        """For each image the first before it that it looks like and that looks like none before itself; else itself, [n].

        Hashes that differ in at most k bits agree in one of k + 1 bands, so that only those are compared.
        """
        count = len(self.bits)
        edges = np.linspace(0, 64, bits + 2).astype(np.int64)
        bands = [
            (self.bits >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1) for low, high in pairwise(edges.tolist())
        ]
        buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in bands]
        first = np.arange(count, dtype=np.int64)
        for one in range(count):
            keys = [int(band[one]) for band in bands]
            others = np.unique(
                np.asarray([o for b, k in zip(buckets, keys, strict=True) for o in b[k]], dtype=np.int64)
            )
            like = others[self.alike(one, others, bits, tolerance)]
            if len(like):
                first[one] = like[0]
                continue
            for bucket, key in zip(buckets, keys, strict=True):
                bucket[key].append(one)
        return first


class NearImagesStep(DuplicateStep):
    """Examples whose images look like an earlier example's, by a difference hash of 64 bits and by colour.

    With ``compare: query`` or ``positives`` the images of that side alone count; ``keep: [test]`` takes copies of test
    images out of training. Images that are one item with a text are not compared.
    """

    kind: Literal["near_pictures"] = "near_pictures"
    bits: Annotated[int, Field(ge=0, le=16)] | None = 3
    """Bits of the hash that may differ; null takes nothing out."""
    tolerance: Annotated[float, Field(ge=0, le=255)] = 8
    """Mean difference of the images at 8 x 8 pixels, of 255."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them; texts are equal only where they are the same item."""
        if self.bits is None:
            return
        store = table.store
        examples = self.in_order(table, sources)
        items = self.by_first_use(table, examples)
        kinds = np.asarray(store.modalities(items), dtype=object)
        seen: Rows = items[kinds == "image"]
        parts: list[PerceptualHashes] = []
        for start in track(range(0, len(seen), _BATCH), "Cleaning: hashing images"):
            images = store.images(seen[start : start + _BATCH])
            parts.append(PerceptualHashes.of([image for image in images if image is not None]))
        leader = np.arange(store.items.num_rows, dtype=np.int64)
        if parts:
            first = PerceptualHashes.join(parts).first_alike(self.bits, self.tolerance)
            leader[seen] = seen[first]
        self.take_out_repeats(taken, examples, items, leader[items], "near-duplicate image")
