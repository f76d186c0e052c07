"""Drawings of the Open Clip Art Library (public domain) with title and tags, from two packages of Debian.

Built when first asked for and kept in the user's cache folder as a zip: pictures of at most 224 pixels, and a line each.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

from nearfield.console import track
from nearfield.data.picture_config import ImagesConfig
from nearfield.data.pictures import ImageRef, PictureError, decode, encode
from nearfield.data.readers.apt import unpacked
from nearfield.data.readers.base import Row, hash_files
from nearfield.data.readers.delimited import check_header
from nearfield.data.readers.on_demand import cache_folder
from nearfield.errors import BadInputError
from nearfield.files import atomic_path

PACKAGES = ("openclipart-png", "openclipart-svg")
COLUMNS = ("image", "title", "tags", "caption", "folder", "file")
NO_TAGS = frozenset({"unsorted", "clip art", "clipart", "image", "svg", "png", "media", "public domain"})
"""Tags that say nothing of what is drawn."""
RULES = ImagesConfig(max_side=224, quality=80)
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_INDEX = "rows.jsonl"

logger = logging.getLogger("nearfield.data")


class OpenClipart:
    """One row a drawing that has a title and at least one tag, in the order of paths."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache

    @cached_property
    def _file(self) -> Path:
        path = cache_folder(self._cache) / "openclipart.zip"
        if path.is_file():
            logger.info("Using %s; delete it to build it again", path)
            return path
        with unpacked(PACKAGES) as root, atomic_path(path) as aside:
            build(root / "usr/share/openclipart", aside)
        logger.info("Wrote %s", path)
        return path

    def inputs(self) -> dict[str, str]:
        return hash_files([self._file])

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        check_header(COLUMNS, columns, "openclipart")
        try:
            with zipfile.ZipFile(self._file) as archive:
                for number, line in enumerate(archive.read(_INDEX).decode().splitlines(), start=1):
                    values = json.loads(line)
                    image = ImageRef(values["file"], archive.read(f"{values['file']}.webp"))
                    caption = f"{values['title']}: {', '.join(values['tags'])}"
                    yield Row("openclipart", number, {**values, "image": image, "caption": caption})
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise BadInputError(
                f"this file is broken ({error})", where=str(self._file), hint="Delete it; it is then built again."
            ) from error


def build(root: Path, out: Path) -> None:
    """Write the zip from the folders ``png`` and ``svg`` of the packages."""
    lines = []
    failed = 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        # Links are the same drawing under another name.
        drawings = sorted(file for file in (root / "svg").rglob("*.svg") if not file.is_symlink())
        for file in track(drawings, "Reading Open Clipart"):
            found = title_and_tags(file)
            name = file.relative_to(root / "svg").with_suffix("").as_posix()
            picture = root / "png" / f"{name}.png"
            if found is None or picture.is_symlink() or not picture.is_file():
                continue
            try:
                data = encode(decode(picture.read_bytes(), RULES).image, RULES.quality)
            except PictureError:
                failed += 1
                continue
            archive.writestr(zipfile.ZipInfo(f"{name}.webp"), data)
            title, tags = found
            row = {"title": title, "tags": tags, "folder": name.partition("/")[0], "file": name}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        archive.writestr(zipfile.ZipInfo(_INDEX), "".join(lines))
    logger.info("%s drawings of %s; %s could not be read", f"{len(lines):,}", f"{len(drawings):,}", failed)


def title_and_tags(file: Path) -> tuple[str, list[str]] | None:
    """What a drawing says of itself; None where it lacks a title or tags that say something."""
    try:
        root = ElementTree.parse(io.BytesIO(file.read_bytes())).getroot()
    except (ElementTree.ParseError, LookupError, ValueError):
        return None
    work = next((node for node in root.iter() if node.find(f"{_DC}subject") is not None), None)
    if work is None:
        return None
    title = " ".join((work.findtext(f"{_DC}title") or "").split())
    words = [" ".join((node.text or "").split()) for node in work.iterfind(f"{_DC}subject//{_RDF}li")]
    tags = [word for word in dict.fromkeys(words) if word and word.lower() not in NO_TAGS and word != title]
    return (title, tags) if title and tags else None
