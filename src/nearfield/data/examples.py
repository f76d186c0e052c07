"""A row of a file becomes an example, or a reason why it cannot."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from nearfield.data.config import (
    ColumnSplit,
    ExamplesConfig,
    GradedExamples,
    HashSplit,
    RetrievalExamples,
    SourceConfig,
    TextExamples,
    as_tuple,
)
from nearfield.data.items import canonical_text, item_id
from nearfield.data.pictures import BothRef, ImageRef, PictureError
from nearfield.data.readers.base import excerpt

if TYPE_CHECKING:
    from nearfield.data.picture_files import Picture

MAX_KEY_CHARACTERS = 1000


class BadRowError(Exception):
    """A row that cannot be used: a reason to count by, and an excerpt of what is wrong."""

    def __init__(self, reason: str, value: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.excerpt = excerpt(value)


@dataclass(frozen=True, slots=True)
class PictureItem:
    """An item with a picture, ready for the store; equal where the ids are."""

    id: bytes
    text: str = field(compare=False)
    """In NFC; empty where there is none."""
    picture: Picture = field(compare=False)


Item = str | PictureItem
"""A text in NFC, or an item with a picture."""


def identity(item: Item) -> bytes:
    """The id of an item, 16 bytes."""
    return item.id if isinstance(item, PictureItem) else item_id("text", (("text", item.encode()),))


Prepare = Callable[[ImageRef, str], PictureItem]
"""(picture, text in NFC or nothing) -> the item; raises PictureError."""


@dataclass(frozen=True, slots=True)
class Example:
    """An example; the fields mean what the store's columns mean."""

    query: Item
    positives: tuple[Item, ...] = ()
    negatives: tuple[Item, ...] = ()
    score: float | None = None
    label: str | None = None
    group: str | None = None
    cluster: str | None = None
    split_key: str | None = None
    """The name of the split or the value to hash, where a column holds it."""
    weight: float | None = None


def read_example(
    source: SourceConfig, values: Mapping[str, object], max_characters: int, prepare: Prepare | None = None
) -> Example:
    """Map the columns of a row; raise :class:`BadRowError` where the row cannot be used.

    ``prepare`` makes items of pictures; without it a picture is a bad row.
    """
    example = _items(source.examples, values, _Limits(max_characters, prepare))
    group = _key(values, source.group) if isinstance(source.group, str) else None
    cluster = _key(values, source.cluster) if source.cluster is not None else None
    split_key = None
    if isinstance(source.split, HashSplit) and source.split.by is not None:
        split_key = _key(values, source.split.by)
    elif isinstance(source.split, ColumnSplit):
        split_key = _key(values, source.split.column)
    weight = None if source.weight is None else _weight(values, source.weight)
    query, positives, negatives, score, label = example
    return Example(query, positives, negatives, score, label, group, cluster, split_key, weight)


_Items = tuple[Item, tuple[Item, ...], tuple[Item, ...], float | None, str | None]


@dataclass(frozen=True, slots=True)
class _Limits:
    characters: int
    prepare: Prepare | None


def _items(examples: ExamplesConfig, values: Mapping[str, object], limit: _Limits) -> _Items:
    if isinstance(examples, RetrievalExamples):
        query = _item(_value(values, examples.query), examples.query, limit)
        positives = _members(values, as_tuple(examples.positives), limit)
        if not positives:
            raise BadRowError("no positive", dict(values))
        return query, positives, _members(values, as_tuple(examples.negatives), limit, optional=True), None, None
    if isinstance(examples, GradedExamples):
        first, second = (_item(_value(values, name), name, limit) for name in (examples.first, examples.second))
        return first, (second,), (), _score(values, examples), None
    if isinstance(examples, TextExamples):
        return _item(_value(values, examples.text), examples.text, limit), (), (), None, None
    item = _item(_value(values, examples.item), examples.item, limit)
    return item, (), (), None, _key(values, examples.label)


def _value(values: Mapping[str, object], column: str) -> object:
    if column not in values:
        raise BadRowError(f"no column {column!r}", f"columns: {', '.join(map(str, list(values)[:20]))}")
    return values[column]


def _item(value: object, column: str, limit: _Limits) -> Item:
    if not isinstance(value, ImageRef | BothRef):
        return _checked(value, column, limit.characters)
    if limit.prepare is None:
        raise BadRowError(f"{column!r} is a picture, and the source says nothing of pictures", value)
    if isinstance(value, BothRef):
        text, image = _checked(value.text, column, limit.characters), value.image
    else:
        text, image = "", value
    try:
        return limit.prepare(image, text)
    except PictureError as error:
        raise BadRowError(f"{column!r} has a picture that cannot be used: {error}", image) from error


def _checked(value: object, column: str, limit: int) -> str:
    if not isinstance(value, str):
        reason = f"{column!r} is null" if value is None else f"{column!r} is not a text ({type(value).__name__})"
        raise BadRowError(reason, value)
    if not value or value.isspace():
        raise BadRowError(f"{column!r} is empty", value)
    if "\0" in value:
        raise BadRowError(f"{column!r} has a NUL byte", value)
    text = canonical_text(value)
    if len(text) > limit:
        raise BadRowError(f"{column!r} is longer than {limit:,} characters", value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(f"{column!r} is not valid Unicode (a lone surrogate)", value) from error
    return text


def _members(
    values: Mapping[str, object], columns: Sequence[str], limit: _Limits, optional: bool = False
) -> tuple[Item, ...]:
    """The items of one or more columns, each one item or a list.

    Null is none; so is an empty cell where there may be none: among several columns, and of negatives.
    """
    found: dict[Item, None] = {}
    for column in columns:
        value = _value(values, column)
        if value is None or (value == "" and (optional or len(columns) > 1)):
            continue
        for member in value if isinstance(value, list | tuple) else (value,):
            found[_item(member, column, limit)] = None
    return tuple(found)


def _key(values: Mapping[str, object], column: str) -> str:
    """A label or key: a string, a whole number or a truth value."""
    value = _value(values, column)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return _checked(value, column, MAX_KEY_CHARACTERS)


def _number(values: Mapping[str, object], column: str) -> float:
    value = _value(values, column)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRowError(f"{column!r} is not a number", value)
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise BadRowError(f"{column!r} is not a number", value) from error
    if not math.isfinite(number):
        raise BadRowError(f"{column!r} is not finite", value)
    return number


def _weight(values: Mapping[str, object], column: str) -> float:
    weight = _number(values, column)
    if weight < 0:
        raise BadRowError(f"{column!r} is below 0", weight)
    return weight


def _score(values: Mapping[str, object], examples: GradedExamples) -> float:
    score = _number(values, examples.score)
    if examples.scale is None:
        return score
    low, high = examples.scale
    if not low <= score <= high:
        raise BadRowError(f"{examples.score!r} is outside its scale", score)
    return (score - low) / (high - low)


def example_digest(
    source: int, query: int, positives: Sequence[int], negatives: Sequence[int], score: float | None, label: str | None
) -> bytes:
    """16 bytes that are equal for equal examples of a source; the order of positives and of negatives does not count."""
    digest = blake2b(struct.pack("<qqqq", source, query, len(positives), len(negatives)), digest_size=16)
    digest.update(struct.pack(f"<{len(positives) + len(negatives)}q", *sorted(positives), *sorted(negatives)))
    digest.update(b"-" if score is None else struct.pack("<d", score + 0.0))
    digest.update(b"-" if label is None else b"+" + label.encode())
    return digest.digest()
