"""How the pictures of a source are found, checked and made smaller."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from nearfield.config import Config, ConfigPath

PictureFormat = Literal["png", "jpeg", "webp", "gif", "bmp"]
Name = Annotated[str, Field(min_length=1)]


class TextAndImage(Config):
    """The columns that make an item of both. Where one of them is null or empty, the item has only the other."""

    text: Name
    image: Name


class ImagesConfig(Config):
    """The pictures of a source. Readers of pictures need nothing of this stated; the others need ``columns`` or ``join``.

    A picture is a path below ``folder`` or the bytes of its file. It is decoded, turned as its EXIF says, laid on white
    where it is transparent, made smaller and kept without its metadata. One that cannot be is a bad row.
    """

    columns: tuple[Name, ...] = ()
    """Columns that hold pictures: a path, bytes, ``{bytes, path}`` as Hugging Face data sets have them, or a list of these."""
    join: dict[Name, TextAndImage] = {}
    """New columns whose items are text and picture together; lists are joined member by member."""
    folder: ConfigPath | None = None
    """Where paths start; null is the folder of the file that names them. A path that leads out of it is refused."""
    max_side: Annotated[int, Field(ge=8, le=8192)] = 512
    """Larger pictures are made smaller, so that their longer side has so many pixels."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Null keeps every pixel (lossless WebP); a number keeps lossy WebP, a tenth of the size for photographs."""
    max_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 32 << 20
    """A larger file is not read."""
    max_pixels: Annotated[int, Field(ge=1, le=89_478_485)] = 67_108_864
    """A picture whose header states more pixels is not decoded."""
    formats: Annotated[tuple[PictureFormat, ...], Field(min_length=1)] = ("png", "jpeg", "webp", "gif", "bmp")
    """By what the file holds, whatever its name says."""
    animated: Literal["first", "refuse"] = "first"
    """What becomes of a picture with several frames: the first frame, or a bad row."""

    @field_validator("columns")
    @classmethod
    def _once(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(columns)) < len(columns):
            raise ValueError("a column stands twice")
        return columns

    def replaced(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        """The columns that the files must have so that there are ``columns``, without repetition."""
        found: list[str] = []
        for column in columns:
            both = self.join.get(column)
            found += [column] if both is None else [both.text, both.image]
        return tuple(dict.fromkeys(found))
