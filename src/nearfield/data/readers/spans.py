"""Spans of documents: anchors and, near each, positives (DeCLUTR, arXiv 2006.03659), counted in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nearfield.data.readers.base import Reader, Row, excerpt
from nearfield.randomness import generator

if TYPE_CHECKING:
    from nearfield.data.text_readers import SpansReader

Span = tuple[int, int]
"""The first word and the one behind the last."""


class Spans:
    """A row for each anchor of each document of another reader: columns ``anchor``, ``positives`` and ``document``."""

    def __init__(self, config: SpansReader, documents: Reader) -> None:
        self._config = config
        self._documents = documents

    def inputs(self) -> dict[str, str]:
        return self._documents.inputs()

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        config = self._config
        for number, row in enumerate(self._documents.rows([config.column])):
            text = None if row.values is None else row.values.get(config.column)
            if not isinstance(text, str):
                reason = row.reason or f"{config.column!r} is not a text"
                yield Row(row.file, row.line, None, reason, row.excerpt or excerpt(text))
                continue
            words = text.split()
            if len(words) < least_words(config):
                why = f"a document of fewer than {least_words(config)} words"
                yield Row(row.file, row.line, None, why, f"{len(words)} words: {excerpt(text)}")
                continue
            for anchor, positives in draw_spans(len(words), config, generator(config.seed, "spans", number)):
                found: dict[str, object] = {
                    "anchor": " ".join(words[slice(*anchor)]),
                    "positives": [" ".join(words[slice(*span)]) for span in positives],
                    "document": f"{row.file}:{row.line}",
                }
                yield Row(row.file, row.line, found)


def least_words(config: SpansReader) -> int:
    """How long a document must be for its anchors to find a place, wherever the first ones fall."""
    return max(2 * config.anchors, 3 * config.anchors - 2) * config.longest


def draw_spans(words: int, config: SpansReader, random: np.random.Generator) -> list[tuple[Span, list[Span]]]:
    """The anchors of a document, no two of which overlap, each with its positives."""
    found = []
    cells = list(range(words // config.longest))
    for _ in range(config.anchors):
        cell = cells[int(random.integers(len(cells)))]
        cells = [other for other in cells if abs(other - cell) > 1]
        begin = cell * config.longest
        anchor = (begin, begin + _length(random, 4, 2, config.shortest, config.longest))
        found.append((anchor, [_positive(anchor, words, config, random) for _ in range(config.positives)]))
    return found


def _length(random: np.random.Generator, a: float, b: float, shortest: int, longest: int) -> int:
    return int(float(random.beta(a, b)) * (longest - shortest) + shortest)


def _positive(anchor: Span, words: int, config: SpansReader, random: np.random.Generator) -> Span:
    begin, end = anchor
    length = _length(random, 2, 4, config.shortest, end - begin if config.place == "inside" else config.longest)
    if config.place == "inside":
        start = int(random.integers(begin, end - length + 1))
    elif config.place == "beside":
        fitting = [place for place in (begin - length, end) if 0 <= place <= words - length]
        # A document has at least two cells, so that one side has room.
        start = fitting[int(random.integers(len(fitting)))]
    else:
        start = int(np.clip(random.integers(begin - length, end + 1), 0, words - length))
    return start, start + length
