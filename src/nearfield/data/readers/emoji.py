"""Emoji with their names and keywords, shipped in the package: a small set of pictures and texts to begin with.

``scripts/build_emoji.py`` makes the files: pictures of Noto Color Emoji, names of the Unicode CLDR, categories of Unicode.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from nearfield.data.pictures import ImageRef
from nearfield.data.readers.base import Row, hash_files
from nearfield.data.readers.delimited import check_header
from nearfield.data.readers.jsonl import read_jsonl
from nearfield.errors import BadInputError

FOLDER = Path(__file__).parent.parent / "embedded" / "emoji"
LANGUAGES = ("en", "de", "fr", "es", "pt", "ru", "ar", "hi", "ja", "zh")
SIDE = 64
COLUMNS = ("image", "name", "keywords", "caption", "language", "code", "first", "flag", "category", "subcategory")


class Emoji:
    """One row a picture and language.

    ``image``; ``name``; ``keywords`` (a list, perhaps empty); ``caption``: the name and, after a colon, the keywords;
    ``language``; ``code``: the code points in hex; ``first``: the first of them, by which the set is split, so that a
    man who does something and another man are on one side; ``flag``: a truth value; ``category``, ``subcategory``: Unicode's
    group ("Food & Drink", one of ten) and subgroup ("food-fruit").
    """

    def __init__(
        self,
        languages: Sequence[str] = ("en",),
        flags: Literal["all", "none", "only"] = "all",
        folder: Path = FOLDER,
    ) -> None:
        self._languages = languages
        self._flags = flags
        self._folder = folder

    def inputs(self) -> dict[str, str]:
        return hash_files([self._folder / "pictures.zip", self._folder / "names.jsonl.xz"])

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        check_header(COLUMNS, columns, "emoji")
        number = 0
        with zipfile.ZipFile(self._folder / "pictures.zip") as archive:
            for entry in read_jsonl(self._folder / "names.jsonl.xz"):
                values = entry.values
                if values is None:
                    where = f"{self._folder}/names.jsonl.xz:{entry.line}"
                    raise BadInputError(
                        f"a shipped file is broken ({entry.reason})", where=where, hint="Install again."
                    )
                if self._flags != "all" and values["flag"] != (self._flags == "only"):
                    continue
                code = str(values["code"])
                image = ImageRef(f"emoji {code}", archive.read(f"{code}.webp"))
                for language in self._languages:
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
