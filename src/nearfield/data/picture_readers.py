"""Settings of the readers whose rows have pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from nearfield.config import Config

if TYPE_CHECKING:
    from nearfield.data.readers.base import Reader

EmojiLanguage = Literal["en", "de", "fr", "es", "pt", "ru", "ar", "hi", "ja", "zh"]


class PictureReader(Config):
    """A reader whose rows have pictures: its source needs no ``images``."""


class EmojiReader(PictureReader):
    """Emoji with names and keywords, shipped in the package; one row a picture and language.

    Columns: image, name, keywords, caption (both), language, code, first (code point), flag.
    """

    kind: Literal["emoji"] = "emoji"
    languages: Annotated[tuple[EmojiLanguage, ...], Field(min_length=1)] = ("en",)
    flags: Literal["all", "none", "only"] = "all"
    """The flags of countries are many, and alike."""

    @field_validator("languages")
    @classmethod
    def _once(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(languages)) < len(languages):
            raise ValueError("a language stands twice")
        return languages

    def build(self) -> Reader:
        from nearfield.data.readers.emoji import Emoji

        return Emoji(self.languages, self.flags)
