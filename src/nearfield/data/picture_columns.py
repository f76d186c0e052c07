"""The columns of a row that hold pictures, for readers that know only texts and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nearfield.data.config import SourceConfig
from nearfield.data.examples import BadRowError
from nearfield.data.picture_config import ImagesConfig
from nearfield.data.pictures import BothRef, ImageRef, PictureError, hash_named, reference
from nearfield.data.readers.base import Reader


def folder_of(source: SourceConfig) -> Path:
    """Where the paths of a source's pictures start: the stated folder, else the one of the file that the reader reads."""
    if source.images is not None and source.images.folder is not None:
        return source.images.folder
    path: Path | None = getattr(source.reader, "path", None)
    return Path() if path is None else path if path.is_dir() else path.parent


def joined(images: ImagesConfig, values: Mapping[str, object], folder: Path) -> Mapping[str, object]:
    """The values of a row with its pictures in place of paths and bytes, and with the joined columns."""
    found = dict(values)
    for column in images.columns:
        if column in values:
            found[column] = _pictures(values[column], column, folder)
    for name, both in images.join.items():
        if both.text in values and both.image in values:
            found[name] = join(values[both.text], _pictures(values[both.image], both.image, folder), name)
    return found


def picture_inputs(source: SourceConfig, reader: Reader) -> dict[str, str]:
    """A hash over the paths and contents of the files that the rows of a source name; nothing where they name none."""
    images = source.images
    if images is None or not (images.columns or images.join):
        return {}
    folder = folder_of(source)
    columns = tuple(dict.fromkeys([*images.columns, *(both.image for both in images.join.values())]))
    columns = tuple(column for column in columns if column in source.read_columns())
    paths: set[str] = set()
    for row in reader.rows(columns):
        for column in columns if row.values is not None else ():
            value = (row.values or {}).get(column)
            for member in value if isinstance(value, list | tuple) else (value,):
                path = member.get("path") if isinstance(member, Mapping) and not member.get("bytes") else member
                if isinstance(path, str):
                    paths.add(path)
    return {"pictures": hash_named(sorted(paths), folder)} if paths else {}


def _pictures(value: object, column: str, folder: Path) -> object:
    try:
        if isinstance(value, list | tuple):
            return [reference(member, folder) for member in value]
        return reference(value, folder)
    except PictureError as error:
        raise BadRowError(f"{column!r} has a picture that cannot be used: {error}", value) from error


def join(text: object, picture: object, name: str) -> object:
    """An item of a text and a picture, or a list of them of two lists; where one is missing, the other alone."""
    lists = [isinstance(part, list | tuple) for part in (text, picture)]
    if any(lists):
        texts = text if isinstance(text, list | tuple) else None if text in (None, "") else [text]
        pictures = picture if isinstance(picture, list | tuple) else None if picture is None else [picture]
        texts = [None] * len(pictures or ()) if texts is None else texts
        pictures = [None] * len(texts) if pictures is None else pictures
        if len(texts) != len(pictures):
            raise BadRowError(f"{name!r} joins {len(texts)} texts and {len(pictures)} pictures")
        return [join(*pair, name) for pair in zip(texts, pictures, strict=True)]
    if not isinstance(picture, ImageRef):
        return text
    if text is None or text == "":
        return picture
    if not isinstance(text, str):
        raise BadRowError(f"{name!r} joins a picture and what is no text ({type(text).__name__})", text)
    return BothRef(text, picture)
