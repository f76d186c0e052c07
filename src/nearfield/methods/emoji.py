"""Emoji with their names and keywords, shipped in the package: a small set of images and texts to begin with.

``scripts/build_emoji.py`` makes the files: images of Noto Color Emoji, names of the Unicode CLDR, categories of Unicode.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from nearfield.data.images import ImageRef
from nearfield.data.readers import ReaderBase, Row, check_header, hash_files, read_jsonl
from nearfield.errors import BadInputError

FOLDER = Path(__file__).parent / "embedded" / "emoji"
SIDE = 64
COLUMNS = ("image", "name", "keywords", "caption", "language", "code", "first", "flag", "category", "subcategory")
Language = Literal["en", "de", "fr", "es", "pt", "ru", "ar", "hi", "ja", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "de", "fr", "es", "pt", "ru", "ar", "hi", "ja", "zh")


class EmojiReader(ReaderBase):
    """Emoji with names and keywords, shipped in the package; one row an image and language.

    Columns: ``image``; ``name``; ``keywords`` (a list, perhaps empty); ``caption``: the name and, after a colon, the
    keywords; ``language``; ``code``: the code points in hex; ``first``: the first of them, by which the set is split, so
    that a man who does something and another man are on one side; ``flag``: a truth value; ``category``, ``subcategory``:
    Unicode's group ("Food & Drink", one of ten) and subgroup ("food-fruit").
    """

    kind: Literal["emoji"] = "emoji"
    gives_images = True
    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = ("en",)
    """The languages of names and keywords; a row for each."""
    flags: Literal["all", "none", "only"] = "all"
    """The flags of countries are many, and alike."""

    @field_validator("languages")
    @classmethod
    def _once(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(languages)) < len(languages):
            raise ValueError("a language is named twice")
        return languages

    def inputs(self) -> dict[str, str]:
        return hash_files([FOLDER / "images.zip", FOLDER / "names.jsonl.xz"])

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        check_header(COLUMNS, columns, "emoji")
        number = 0
        with zipfile.ZipFile(FOLDER / "images.zip") as archive:
            for entry in read_jsonl(FOLDER / "names.jsonl.xz"):
                values = entry.values
                if values is None:
                    where = f"{FOLDER}/names.jsonl.xz:{entry.line}"
                    raise BadInputError(
                        f"a shipped file is broken ({entry.reason})", where=where, hint="Install again."
                    )
                if self.flags != "all" and values["flag"] != (self.flags == "only"):
                    continue
                code = str(values["code"])
                image = ImageRef(f"emoji {code}", archive.read(f"{code}.webp"))
                for language in self.languages:
                    number += 1
                    yield Row("emoji", number, {"image": image, **_texts(values, language), **_keys(values, code)})


def _texts(values: object, language: str) -> dict[str, object]:
    assert isinstance(values, dict)
    name, keywords = values["names"][language], values["keywords"][language]
    caption = f"{name}: {', '.join(keywords)}" if keywords else name
    return {"name": name, "keywords": keywords, "caption": caption, "language": language}


def _keys(values: object, code: str) -> dict[str, object]:
    assert isinstance(values, dict)
    return {
        "code": code,
        "first": code.partition("-")[0],
        **{column: values[column] for column in ("flag", "category", "subcategory")},
    }
