"""Drawings of the Open Clip Art Library (public domain) with title and tags, from two packages of Debian.

Built when first asked for and kept in the user's cache folder as a zip: images of at most 224 pixels, and a line each.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from nearfield.console import track
from nearfield.data.config import ImagesConfig
from nearfield.data.images import ImageError, ImageRef, decode, encode
from nearfield.data.readers import Row, check_header
from nearfield.errors import BadInputError
from nearfield.files import atomic_path
from nearfield.methods.on_demand import OnDemandReader, cache_folder, unpacked

PACKAGES = ("openclipart-png", "openclipart-svg")
COLUMNS = ("image", "title", "tags", "caption", "folder", "file")
NO_TAGS = frozenset({"unsorted", "clip art", "clipart", "image", "svg", "png", "media", "public domain"})
"""Tags that say nothing of what is drawn."""
RULES = ImagesConfig(max_side=224, quality=80)
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_INDEX = "rows.jsonl"

logger = logging.getLogger("nearfield.data")


class OpenClipartReader(OnDemandReader):
    """Drawings of the Open Clip Art Library with title and tags, built on demand from Debian's packages (156 MB).

    One row a drawing that has a title and at least one tag, in the order of paths.

    Columns: image, title, tags, caption (both), folder, file.
    """

    kind: Literal["openclipart"] = "openclipart"
    gives_images = True

    def find(self) -> Path:
        path = cache_folder(self.cache) / "openclipart.zip"
        if path.is_file():
            logger.info("Using %s; delete it to build it again", path)
            return path
        with unpacked(PACKAGES) as root, atomic_path(path) as aside:
            build(root / "usr/share/openclipart", aside)
        logger.info("Wrote %s", path)
        return path

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        check_header(COLUMNS, columns, "openclipart")
        try:
            with zipfile.ZipFile(self.file) as archive:
                for number, line in enumerate(archive.read(_INDEX).decode().splitlines(), start=1):
                    values = json.loads(line)
                    image = ImageRef(values["file"], archive.read(f"{values['file']}.webp"))
                    caption = f"{values['title']}: {', '.join(values['tags'])}"
                    yield Row("openclipart", number, {**values, "image": image, "caption": caption})
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise BadInputError(
                f"this file is broken ({error})", where=str(self.file), hint="Delete it; it is then built again."
            ) from error


def build(root: Path, out: Path) -> None:
    """Write the zip from the folders ``png`` and ``svg`` of the packages."""
    lines = []
    failed = 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        # Links are the same drawing under another name.
        drawings = sorted(file for file in (root / "svg").rglob("*.svg") if not file.is_symlink())
        for file in track(drawings, "Reading Open Clipart"):
            described = title_and_tags(file)
            name = file.relative_to(root / "svg").with_suffix("").as_posix()
            image = root / "png" / f"{name}.png"
            if described is None or image.is_symlink() or not image.is_file():
                continue
            try:
                data = encode(decode(image.read_bytes(), RULES).image, RULES.quality)
            except ImageError:
                failed += 1
                continue
            archive.writestr(zipfile.ZipInfo(f"{name}.webp"), data)
            title, tags = described
            row = {"title": title, "tags": tags, "folder": name.partition("/")[0], "file": name}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        archive.writestr(zipfile.ZipInfo(_INDEX), "".join(lines))
    logger.info("%s drawings of %s; %s could not be read", f"{len(lines):,}", f"{len(drawings):,}", failed)


def title_and_tags(file: Path) -> tuple[str, list[str]] | None:
    """The title and tags of a drawing; None where it lacks a title or tags that say something."""
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
