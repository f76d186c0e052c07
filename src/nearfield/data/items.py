"""Turns a text or an image into an item, and a row of a file into an example or a reason why it is none.

The id of an item is the hash of its content, so the same content is the same item.
"""

from __future__ import annotations

import hashlib
import math
import struct
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.data.images import BothRef, ImageError, ImageRef, decode, encode, reference
from nearfield.data.readers import BadRowError

if TYPE_CHECKING:
    from nearfield.data.config import ImagesConfig, SourceConfig

ID_BYTES = 16
MAX_KEY_CHARACTERS = 1000


def canonical_text(text: str) -> str:
    """The text in Unicode normal form C: one form for what readers see as the same characters."""
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def item_id(modality: str, fields: Iterable[tuple[str, bytes]]) -> bytes:
    """16 bytes (BLAKE2b) over the modality and the named fields of an item.

    Each part is preceded by its length, so that no two lists of fields give the same bytes.
    """
    digest = hashlib.blake2b(digest_size=ID_BYTES)
    for part in (modality.encode(), *(part for name, value in fields for part in (name.encode(), value))):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def text_id(text: str) -> bytes:
    """The id of a text item. Raises ``UnicodeEncodeError`` for a text with lone surrogates."""
    return item_id("text", (("text", canonical_text(text).encode()),))


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image that may be written: its id (16 bytes over size and pixels), and what is kept of it."""

    raw_id: bytes
    """16 bytes over the bytes of the file."""
    id: bytes = b""
    data: bytes = b""
    size: tuple[int, int] = (0, 0)
    original: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An item with an image, ready for the store; equal where the ids are."""

    id: bytes
    text: str = field(compare=False)
    """In NFC; empty where there is none."""
    image: PreparedImage = field(compare=False)


Item = str | ImageItem
"""A text in NFC, or an item with an image."""


def identity(item: Item) -> bytes:
    """The id of an item, 16 bytes."""
    return item.id if isinstance(item, ImageItem) else text_id(item)


class ImagePreparer:
    """Makes items of the images of one source; a file that passed before is not decoded again."""

    def __init__(self, rules: ImagesConfig, written: Callable[[bytes], bool]) -> None:
        """``written`` says of the hash of a file whether its image is in the store already."""
        self._rules = rules
        self._written = written
        self._passed: set[bytes] = set()

    def __call__(self, image: ImageRef, text: str) -> ImageItem:
        """The item of an image and perhaps a text in NFC; raise :class:`nearfield.data.images.ImageError`."""
        raw = image.read(self._rules.max_bytes)
        fields = [("text", text.encode()), ("image", raw)] if text else [("image", raw)]
        return ImageItem(item_id("text+image" if text else "image", fields), text, self._prepare(raw))

    def _prepare(self, raw: bytes) -> PreparedImage:
        raw_id = hashlib.blake2b(raw, digest_size=16).digest()
        if raw_id in self._passed and self._written(raw_id):
            return PreparedImage(raw_id)
        decoded = decode(raw, self._rules)
        self._passed.add(raw_id)
        image = decoded.image
        digest = hashlib.blake2b(f"{image.width}x{image.height}".encode(), digest_size=16)
        digest.update(image.tobytes())
        data = encode(image, self._rules.quality)
        return PreparedImage(raw_id, digest.digest(), data, image.size, decoded.original)


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
    source: SourceConfig, values: Mapping[str, object], max_characters: int, prepare: ImagePreparer | None = None
) -> Example:
    """Map the columns of a row; raise :class:`BadRowError` where the row cannot be used.

    ``prepare`` makes items of images; without it an image is a bad row.
    """
    row = RowValues(values, max_characters, prepare)
    content = source.examples.read(row)
    group, cluster, split_key = (
        None if column is None else row.key(column)
        for column in (source.group_column, source.cluster, source.split.key_column)
    )
    weight = None if source.weight is None else row.weight(source.weight)
    return Example(**content, group=group, cluster=cluster, split_key=split_key, weight=weight)


@dataclass(frozen=True, slots=True)
class RowValues:
    """The cells of a row, checked as they are asked for; what is wrong with one is a :class:`BadRowError`."""

    values: Mapping[str, object]
    max_characters: int
    prepare: ImagePreparer | None = None

    def value(self, column: str) -> object:
        """A cell as it is."""
        if column not in self.values:
            raise BadRowError(f"no column {column!r}", f"columns: {', '.join(map(str, list(self.values)[:20]))}")
        return self.values[column]

    def item(self, column: str) -> Item:
        """The item of a cell: a text, an image, or both."""
        return self._item(self.value(column), column)

    def items(self, columns: Sequence[str], optional: bool = False) -> tuple[Item, ...]:
        """The items of one or more columns, each one item or a list, without repetition.

        Null is none; so is an empty cell where there may be none: among several columns, and where they are ``optional``.
        Otherwise a row without an item is bad.
        """
        items: dict[Item, None] = {}
        for column in columns:
            value = self.value(column)
            if value is None or (value == "" and (optional or len(columns) > 1)):
                continue
            for member in value if isinstance(value, list | tuple) else (value,):
                items[self._item(member, column)] = None
        if not items and not optional:
            raise BadRowError("no positive", dict(self.values))
        return tuple(items)

    def key(self, column: str) -> str:
        """A label or key: a string, a whole number or a truth value."""
        value = self.value(column)
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        return _checked_text(value, column, MAX_KEY_CHARACTERS)

    def score(self, column: str, scale: tuple[float, float] | None) -> float:
        """A finite number; with ``scale`` (lowest, highest) as a share from 0 to 1 of it."""
        score = self._number(column)
        if scale is None:
            return score
        low, high = scale
        if not low <= score <= high:
            raise BadRowError(f"{column!r} is outside its scale", score)
        return (score - low) / (high - low)

    def weight(self, column: str) -> float:
        """A finite number of at least 0."""
        weight = self._number(column)
        if weight < 0:
            raise BadRowError(f"{column!r} is below 0", weight)
        return weight

    def _number(self, column: str) -> float:
        value = self.value(column)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise BadRowError(f"{column!r} is not a number", value)
        try:
            number = float(value)
        except (ValueError, OverflowError) as error:
            raise BadRowError(f"{column!r} is not a number", value) from error
        if not math.isfinite(number):
            raise BadRowError(f"{column!r} is not finite", value)
        return number

    def _item(self, value: object, column: str) -> Item:
        if not isinstance(value, ImageRef | BothRef):
            return _checked_text(value, column, self.max_characters)
        if self.prepare is None:
            raise BadRowError(f"{column!r} is an image, and the source has no settings for images", value)
        if isinstance(value, BothRef):
            text, image = _checked_text(value.text, column, self.max_characters), value.image
        else:
            text, image = "", value
        try:
            return self.prepare(image, text)
        except ImageError as error:
            raise BadRowError(f"{column!r} has an image that cannot be used: {error}", image) from error


def _checked_text(value: object, column: str, limit: int) -> str:
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


def with_images(images: ImagesConfig, values: Mapping[str, object], folder: Path) -> Mapping[str, object]:
    """The values of a row with its images in place of paths and bytes, and with the joined columns."""
    made = dict(values)
    for column in images.columns:
        if column in values:
            made[column] = _references(values[column], column, folder)
    for name, both in images.join.items():
        if both.text in values and both.image in values:
            made[name] = join(values[both.text], _references(values[both.image], both.image, folder), name)
    return made


def _references(value: object, column: str, folder: Path) -> object:
    try:
        if isinstance(value, list | tuple):
            return [reference(member, folder) for member in value]
        return reference(value, folder)
    except ImageError as error:
        raise BadRowError(f"{column!r} has an image that cannot be used: {error}", value) from error


def join(text: object, image: object, name: str) -> object:
    """An item of a text and an image, or a list of them of two lists; where one is missing, the other alone."""
    if isinstance(text, list | tuple) or isinstance(image, list | tuple):
        texts = text if isinstance(text, list | tuple) else None if text in (None, "") else [text]
        images = image if isinstance(image, list | tuple) else None if image is None else [image]
        texts = [None] * len(images or ()) if texts is None else texts
        images = [None] * len(texts) if images is None else images
        if len(texts) != len(images):
            raise BadRowError(f"{name!r} joins {len(texts)} texts and {len(images)} images")
        return [join(*pair, name) for pair in zip(texts, images, strict=True)]
    if not isinstance(image, ImageRef):
        return text
    if text is None or text == "":
        return image
    if not isinstance(text, str):
        raise BadRowError(f"{name!r} joins an image and something that is not a text ({type(text).__name__})", text)
    return BothRef(text, image)


def example_digest(
    source: int, query: int, positives: Sequence[int], negatives: Sequence[int], score: float | None, label: str | None
) -> bytes:
    """16 bytes that are equal for equal examples of a source; the order of positives and of negatives does not count."""
    digest = hashlib.blake2b(struct.pack("<qqqq", source, query, len(positives), len(negatives)), digest_size=16)
    digest.update(struct.pack(f"<{len(positives) + len(negatives)}q", *sorted(positives), *sorted(negatives)))
    digest.update(b"-" if score is None else struct.pack("<d", score + 0.0))
    digest.update(b"-" if label is None else b"+" + label.encode())
    return digest.digest()
