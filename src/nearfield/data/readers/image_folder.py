"""Pictures in a folder with captions beside them, or in a table that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from nearfield.data.pictures import ImageRef, PictureError, hash_named, read_inside, reference
from nearfield.data.readers.base import Row, excerpt, hash_files
from nearfield.data.readers.delimited import check_header
from nearfield.data.readers.tables import read_table, table_files
from nearfield.errors import BadInputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
MAX_CAPTION_BYTES = 16 << 20
COLUMNS = ("image", "text", "texts", "file", "folder")


class ImageFolder:
    """One row a picture, in the order of paths."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _files(self) -> list[str]:
        if not self._folder.is_dir():
            raise BadInputError("this folder does not exist", where=str(self._folder), hint="'path' must be a folder.")
        found = sorted(
            file.relative_to(self._folder).as_posix()
            for file in self._folder.rglob("*")
            if file.suffix.lower() in SUFFIXES
        )
        if not found:
            shown = ", ".join(sorted(SUFFIXES))
            raise BadInputError("this folder holds no pictures", where=str(self._folder), hint=f"Wanted: {shown}.")
        return found

    def inputs(self) -> dict[str, str]:
        files = self._files()
        captions = [str(Path(file).with_suffix(".txt")) for file in files]
        return {"pictures": hash_named([*files, *captions], self._folder)}

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        check_header(COLUMNS, columns, str(self._folder))
        for number, file in enumerate(self._files(), start=1):
            caption = str(Path(file).with_suffix(".txt"))
            text: str | None = None
            try:
                text = read_inside(caption, self._folder, MAX_CAPTION_BYTES).decode("utf-8-sig").strip()
            except PictureError as error:
                # A picture without a caption may still have a class.
                if "text" in columns or "texts" in columns:
                    yield Row(caption, number, None, f"the caption is {error}", file)
                    continue
            except UnicodeDecodeError as error:
                yield Row(caption, number, None, "not UTF-8", f"byte {error.start}")
                continue
            parts = file.split("/")
            values = {
                "image": ImageRef(file, None, file, self._folder),
                "text": text,
                "texts": [line.strip() for line in (text or "").splitlines() if line.strip()],
                "file": file,
                "folder": parts[0] if len(parts) > 1 else None,
            }
            yield Row(file, number, values)


class CaptionTable:
    """The rows of a table, each with the picture that it names."""

    def __init__(self, folder: Path, table: Path, column: str) -> None:
        self._folder = folder
        self._table = table
        self._column = column

    def inputs(self) -> dict[str, str]:
        names: set[str] = set()
        for row in self._read(()):
            value = (row.values or {}).get(self._column)
            if isinstance(value, str):
                names.add(value)
        return {**hash_files(table_files(self._table)), "pictures": hash_named(sorted(names), self._folder)}

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for row in self._read(tuple(column for column in columns if column != "image")):
            if row.values is None:
                yield row
                continue
            if self._column not in row.values:
                yield dataclasses.replace(row, values=None, reason=f"no column {self._column!r}", excerpt="")
                continue
            try:
                picture = reference(row.values[self._column], self._folder)
            except PictureError as error:
                reason = f"{self._column!r} is {error}"
                yield dataclasses.replace(row, values=None, reason=reason, excerpt=excerpt(row.values))
                continue
            yield dataclasses.replace(row, values={**row.values, "image": picture})

    def _read(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in table_files(self._table):
            yield from read_table(file, (self._column, *columns))
