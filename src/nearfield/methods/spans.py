"""Spans of documents: anchors and, near each, positives (DeCLUTR, arXiv 2006.03659), counted in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from nearfield.data.readers import Column, ReaderBase, ReaderConfig, Row, excerpt
from nearfield.provenance import generator

Span = tuple[int, int]
"""The first word and the one behind the last."""


class SpansReader(ReaderBase):
    """Spans of long documents as examples: anchors, and positives near each (DeCLUTR, arXiv 2006.03659), counted in words.

    Columns are ``anchor``, ``positives`` and ``document``. A document that is too short for its anchors is a bad row.
    """

    kind: Literal["spans"] = "spans"
    of: ReaderConfig
    """The reader of the documents."""
    column: Column
    """The documents' text."""
    anchors: Annotated[int, Field(ge=1)] = 2
    """Of each document; none overlaps another."""
    positives: Annotated[int, Field(ge=1)] = 2
    """Of each anchor."""
    longest: Annotated[int, Field(ge=2)] = 384
    """Words of a span, at most: anchors are long ones as a rule, Beta(4, 2) between the two, positives short, Beta(2, 4)."""
    shortest: Annotated[int, Field(ge=1)] = 24
    """Words of a span, at least."""
    place: Literal["any", "inside", "beside"] = "any"
    """The place of positives: ``any`` from touching the anchor on its left to touching it on its right, ``inside`` or ``beside`` it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Another seed, other spans."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"the shortest span ({self.shortest}) is longer than the longest ({self.longest})")
        return self

    def inputs(self) -> dict[str, str]:
        return self.of.build().inputs()

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        documents = self.of.build()
        for number, row in enumerate(documents.rows([self.column])):
            text = None if row.values is None else row.values.get(self.column)
            if not isinstance(text, str):
                reason = row.reason or f"{self.column!r} is not a text"
                yield Row(row.file, row.line, None, reason, row.excerpt or excerpt(text))
                continue
            words = text.split()
            if len(words) < least_words(self):
                why = f"a document of fewer than {least_words(self)} words"
                yield Row(row.file, row.line, None, why, f"{len(words)} words: {excerpt(text)}")
                continue
            for anchor, positives in draw_spans(len(words), self, generator(self.seed, "spans", number)):
                values: dict[str, object] = {
                    "anchor": " ".join(words[slice(*anchor)]),
                    "positives": [" ".join(words[slice(*span)]) for span in positives],
                    "document": f"{row.file}:{row.line}",
                }
                yield Row(row.file, row.line, values)


def least_words(config: SpansReader) -> int:
    """The words that a document must have for its anchors to find a place, wherever the first ones fall."""
    return max(2 * config.anchors, 3 * config.anchors - 2) * config.longest


def draw_spans(words: int, config: SpansReader, random: np.random.Generator) -> list[tuple[Span, list[Span]]]:
    """The anchors of a document, no two of which overlap, each with its positives."""
    anchors = []
    cells = list(range(words // config.longest))
    for _ in range(config.anchors):
        cell = cells[int(random.integers(len(cells)))]
        cells = [other for other in cells if abs(other - cell) > 1]
        begin = cell * config.longest
        anchor = (begin, begin + _length(random, 4, 2, config.shortest, config.longest))
        anchors.append((anchor, [_positive(anchor, words, config, random) for _ in range(config.positives)]))
    return anchors


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
