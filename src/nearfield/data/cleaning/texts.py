"""Steps that look at one text at a time."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearfield.console import track
from nearfield.data.cleaning.step import Encoders, Taken, take_out_texts
from nearfield.data.cleaning.table import ExampleTable
from nearfield.data.cleaning_config import CharactersStep, LanguageStep, LengthStep, RemovalListStep
from nearfield.data.items import ID_BYTES
from nearfield.errors import BadInputError

_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"]+", re.IGNORECASE)


class TextFilter:
    """A step that knows why a text should go, or that it may stay."""

    sides: Sequence[str]

    def reason(self, text: str) -> str | None:
        """Why this text goes; None if it stays."""
        raise NotImplementedError

    def neutral(self) -> bool:
        """Whether every text stays."""
        raise NotImplementedError

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the texts that have a reason to go."""
        if self.neutral():
            return
        examples = table.of_sources(sources)
        bad: dict[int, str] = {}
        for rows, texts in track(table.texts(table.items(examples, self.sides)), f"Cleaning: {taken.kind}"):
            for row, text in zip(rows.tolist(), texts, strict=True):
                # What has no text is a picture: nothing is known of it here.
                why = self.reason(text) if text else None
                if why is not None:
                    bad[row] = why
        take_out_texts(table, examples, self.sides, bad, taken)


class LengthFilter(TextFilter):
    """Bounds on characters or words."""

    def __init__(self, config: LengthStep) -> None:
        self.config = config
        self.sides = config.sides

    def neutral(self) -> bool:
        return self.config.least == 0 and self.config.most is None

    def reason(self, text: str) -> str | None:
        config = self.config
        length = len(text) if config.unit == "characters" else len(text.split())
        if length < config.least:
            return f"fewer than {config.least:,} {config.unit}"
        if config.most is not None and length > config.most:
            return f"more than {config.most:,} {config.unit}"
        return None


class CharactersFilter(TextFilter):
    """Shares of kinds of characters."""

    def __init__(self, config: CharactersStep) -> None:
        self.config = config
        self.sides = config.sides

    def neutral(self) -> bool:
        config = self.config
        return config.min_letters == config.min_printable == 0 and config.max_urls == config.max_control == 1

    def reason(self, text: str) -> str | None:
        config = self.config
        if config.min_letters > 0 and letters(text) < config.min_letters:
            return f"under {config.min_letters:.0%} letters"
        if config.min_printable > 0 and printable(text) < config.min_printable:
            return f"under {config.min_printable:.0%} printable"
        if config.max_urls < 1 and urls(text) > config.max_urls:
            return f"over {config.max_urls:.0%} URLs"
        if config.max_control < 1 and control(text) > config.max_control:
            return f"over {config.max_control:.0%} control characters"
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


@functools.cache
def _identifier() -> Any:
    """py3langid's model, with probabilities: its own default gives logarithms that cannot be bounded."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


class LanguageFilter(TextFilter):
    """The language that py3langid sees, 0.2 ms a text."""

    def __init__(self, config: LanguageStep) -> None:
        self.config = config
        self.sides = config.sides
        if self.neutral():
            return
        self._identifier = _identifier()
        unknown = sorted(set(config.languages) - set(self._identifier.labels))
        if unknown:
            raise BadInputError(
                f"the language filter does not know {', '.join(unknown)}",
                hint=f"Languages: {', '.join(sorted(self._identifier.labels))}.",
            )

    def neutral(self) -> bool:
        return not self.config.languages

    def reason(self, text: str) -> str | None:
        if len(text) < self.config.min_characters:
            return None
        # The beginning tells the language; a text of a megabyte would take seconds.
        language, confidence = self._identifier.classify(text[:5000])
        if language in self.config.languages or confidence < self.config.confidence:
            return None
        return f"language {language}"


class RemovalList(TextFilter):
    """Items named in a file."""

    def __init__(self, config: RemovalListStep) -> None:
        self.sides = config.sides
        self._reasons = read_removals(config.path)

    def neutral(self) -> bool:
        return not self._reasons

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the items whose ids are in the list; ids that no item has are of no account."""
        if self.neutral():
            return
        examples = table.of_sources(sources)
        rows = table.items(examples, self.sides)
        ids = table.store.items["id"].take(rows).to_pylist()
        bad = {
            row: self._reasons[identity]
            for row, identity in zip(rows.tolist(), ids, strict=True)
            if identity in self._reasons
        }
        take_out_texts(table, examples, self.sides, bad, taken)


def read_removals(path: Path) -> dict[bytes, str]:
    """Item id -> reason, of a JSONL file with ``id`` and perhaps ``kind`` and ``task`` on each line."""
    found: dict[bytes, str] = {}
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
        found[identity] = (
            f"{kind} match with {task}" if isinstance(kind, str) and isinstance(task, str) else "in the list"
        )
    return found
