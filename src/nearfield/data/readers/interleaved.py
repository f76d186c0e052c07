"""Rows whose items are text and picture together: MMEB's training format, and triplets as in MegaPairs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nearfield.data.examples import BadRowError
from nearfield.data.pictures import BothRef, ImageRef, PictureError, hash_named, reference
from nearfield.data.readers.base import Row, hash_files
from nearfield.data.readers.tables import read_table, table_files

MARK = "<image>"
"""What stands for the picture in a text; the encoder puts its own tokens there."""
_MARKS = re.compile(r"<\|image_\d+\|>|<image>")


class _Interleaved:
    """Reads a table, names its pictures, and turns each row into some."""

    named: tuple[str, ...]
    """Columns with paths of pictures."""
    needed: tuple[str, ...]

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder

    def inputs(self) -> dict[str, str]:
        names: set[str] = set()
        for row in self._read():
            for column in self.named:
                for value in _list((row.values or {}).get(column)):
                    if isinstance(value, str) and value:
                        names.add(value)
        return {**hash_files(table_files(self._path)), "pictures": hash_named(sorted(names), self._folder)}

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for row in self._read():
            if row.values is None:
                yield row
                continue
            try:
                for made in self.examples(row.values):
                    yield dataclasses.replace(row, values={**row.values, **made})
            except BadRowError as error:
                yield dataclasses.replace(row, values=None, reason=error.reason, excerpt=error.excerpt)

    def examples(self, values: Mapping[str, object]) -> Iterator[dict[str, object]]:
        """Query, positives and negatives of a row; raise BadRowError."""
        raise NotImplementedError

    def _read(self) -> Iterator[Row]:
        for file in table_files(self._path):
            yield from read_table(file, self.needed)

    def picture(self, value: object, column: str) -> ImageRef | None:
        """The picture of a cell."""
        try:
            return reference(value, self._folder)
        except PictureError as error:
            raise BadRowError(f"{column!r} has a picture that cannot be used: {error}", value) from error


class Mmeb(_Interleaved):
    """MMEB's training format. Where there are several positives or negatives, text and path are lists of one length."""

    named = ("qry_image_path", "pos_image_path", "neg_image_path")
    needed = ("qry", "pos_text")

    def examples(self, values: Mapping[str, object]) -> Iterator[dict[str, object]]:
        queries = self._items(values, "qry", "qry_image_path")
        if len(queries) != 1:
            raise BadRowError("an empty query" if not queries else "several queries", dict(values))
        positives = self._items(values, "pos_text", "pos_image_path")
        negatives = self._items(values, "neg_text", "neg_image_path")
        yield {"query": queries[0], "positives": positives, "negatives": negatives}

    def _items(self, values: Mapping[str, object], text: str, path: str) -> list[object]:
        texts, paths = _list(values.get(text)), _list(values.get(path))
        length = max(len(texts), len(paths))
        if {len(texts), len(paths)} - {0, length}:
            raise BadRowError(f"{text!r} has {len(texts)} members and {path!r} has {len(paths)}", dict(values))
        texts, paths = texts or [None] * length, paths or [None] * length
        items = [item_of(one, self.picture(other, path), text) for one, other in zip(texts, paths, strict=True)]
        return [item for item in items if item is not None]


class ImageTriplets(_Interleaved):
    """(picture, instruction) -> picture, perhaps with pictures that are not asked for."""

    def __init__(self, path: Path, folder: Path, image: str, text: str, target: str, negatives: str | None) -> None:
        super().__init__(path, folder)
        self._text, self._image, self._target, self._negatives = text, image, target, negatives
        self.named = (image, target, *(() if negatives is None else (negatives,)))
        self.needed = (image, text, target)

    def examples(self, values: Mapping[str, object]) -> Iterator[dict[str, object]]:
        image = self.picture(values.get(self._image), self._image)
        target = self.picture(values.get(self._target), self._target)
        if image is None or target is None:
            raise BadRowError(f"no picture in {(self._image if image is None else self._target)!r}", dict(values))
        column = self._negatives or ""
        found = [self.picture(value, column) for value in _list(values.get(column))]
        negatives = [picture for picture in found if picture is not None]
        instructions = _list(values.get(self._text))
        if not instructions:
            raise BadRowError(f"no instruction in {self._text!r}", dict(values))
        for instruction in instructions:
            query = item_of(instruction, image, self._text)
            yield {"query": query, "positives": [target], "negatives": negatives}


def _list(value: object) -> list[object]:
    """A cell as a list: none for null and for an empty string, one member for one value."""
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None or value == "" else [value]


def item_of(text: object, picture: ImageRef | None, column: str) -> object:
    """The item of a text with marks and a picture; None where there is neither.

    The mark is kept where the picture stands between words. A text that is nothing but the mark is the picture alone, and a
    text without a picture loses its mark.
    """
    if text is not None and not isinstance(text, str):
        raise BadRowError(f"{column!r} is not a text ({type(text).__name__})", text)
    text = text or ""
    if len(_MARKS.findall(text)) > 1:
        raise BadRowError(f"{column!r} has marks for several pictures", text)
    words = _MARKS.sub("", text)
    if picture is None:
        # Without the mark, what parted it from the words is of no account.
        kept = words.strip() if words != text else text
        return kept or None
    return BothRef(_MARKS.sub(MARK, text), picture) if words.strip() else picture
