"""Steps that look at texts."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from nearfield.config import ConfigPath
from nearfield.console import track
from nearfield.data.cleaning import Fraction, Sides, SidesStep
from nearfield.data.items import ID_BYTES
from nearfield.data.words import words
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.arrays import Rows
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
    min_letters: Fraction = 0
    """Letters, marks and digits among the characters that are no white space."""
    min_printable: Fraction = 0
    """Of all characters; white space is printable here."""
    max_urls: Fraction = 1
    """Characters inside URLs, of all."""
    max_control: Fraction = 1
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
