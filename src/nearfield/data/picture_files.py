"""The pictures of a store on disk, each once, and the items that are made of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nearfield.data.examples import PictureItem
from nearfield.data.items import item_id
from nearfield.data.picture_config import ImagesConfig
from nearfield.data.pictures import ImageRef, decode, encode
from nearfield.data.writing import BatchWriter

_BATCH_BYTES = 16 << 20
_BATCH_ROWS = 4096

PICTURES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(16), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that may be written: its id (16 bytes over size and pixels), and what is kept of it."""

    raw_id: bytes
    """16 bytes over the bytes of the file."""
    id: bytes = b""
    data: bytes = b""
    size: tuple[int, int] = (0, 0)
    original: tuple[int, int] = (0, 0)


class PictureWriter(BatchWriter):
    """Gives each picture its row number and writes it once.

    Pictures with equal pixels are one, whatever their files hold. Held in memory: the ids and row numbers, about 170 bytes
    a file and a picture, and one batch of pictures.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, PICTURES_SCHEMA)
        self._by_file: dict[bytes, int] = {}
        self._by_pixels: dict[bytes, int] = {}
        self._open: list[Picture] = []
        self._bytes = 0

    def knows(self, raw_id: bytes) -> bool:
        """Whether the picture of this file is written."""
        return raw_id in self._by_file

    def add(self, picture: Picture) -> int:
        """The row of a picture; one that is new is written."""
        row = self._by_file.get(picture.raw_id)
        if row is not None:
            return row
        row = self._by_pixels.get(picture.id)
        if row is None:
            row = self._by_pixels[picture.id] = len(self._by_pixels)
            self._open.append(picture)
            self._bytes += len(picture.data)
            if self._bytes >= _BATCH_BYTES or len(self._open) >= _BATCH_ROWS:
                self._flush()
        self._by_file[picture.raw_id] = row
        return row

    def _take(self) -> list[list[Any]]:
        rows, self._open, self._bytes = self._open, [], 0
        return [
            [picture.id for picture in rows],
            [picture.data for picture in rows],
            *([picture.size[side] for picture in rows] for side in (0, 1)),
            *([picture.original[side] for picture in rows] for side in (0, 1)),
        ]


class Preparer:
    """Makes items of the pictures of one source; a file that passed before is not decoded again."""

    def __init__(self, rules: ImagesConfig, writer: PictureWriter) -> None:
        self._rules = rules
        self._writer = writer
        self._passed: set[bytes] = set()

    def __call__(self, image: ImageRef, text: str) -> PictureItem:
        """The item of a picture and perhaps a text; raise :class:`nearfield.data.pictures.PictureError`."""
        raw = image.read(self._rules.max_bytes)
        modality = "text+image" if text else "image"
        identity = item_id(modality, ((*((("text", text.encode()),) if text else ()), ("image", raw))))
        return PictureItem(identity, text, self._picture(raw))

    def _picture(self, raw: bytes) -> Picture:
        raw_id = hashlib.blake2b(raw, digest_size=16).digest()
        if raw_id in self._passed and self._writer.knows(raw_id):
            return Picture(raw_id)
        decoded = decode(raw, self._rules)
        self._passed.add(raw_id)
        image = decoded.image
        digest = hashlib.blake2b(f"{image.width}x{image.height}".encode(), digest_size=16)
        digest.update(image.tobytes())
        data = encode(image, self._rules.quality)
        return Picture(raw_id, digest.digest(), data, image.size, decoded.original)
