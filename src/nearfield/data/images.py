"""Images that strangers made: read by path or bytes, checked before they are decoded, decoded safely, made smaller.

Every reason why an image cannot be used is an :class:`ImageError`; nothing else comes out of here for bad input. The readers whose
rows have images are of folders, of WebDataset shards, and of tables whose items are text and image together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import stat
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nearfield.config import ConfigPath
from nearfield.data.readers import (
    BadRowError,
    Column,
    ReaderBase,
    Row,
    TableReader,
    check_header,
    excerpt,
    files_at,
    hash_files,
    open_bytes,
)
from nearfield.errors import BadInputError
from nearfield.files import inside

if TYPE_CHECKING:
    from PIL.Image import Image

    from nearfield.data.config import ImagesConfig


_HASHED = 1 << 30


class ImageError(Exception):
    """An image that cannot be used; the message is the reason, in words that can be counted."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that is not read yet: the bytes of its file, or where the file lies."""

    name: str
    data: bytes | None = None
    path: str = ""
    folder: Path | None = None

    def __repr__(self) -> str:
        # In excerpts of bad rows: never the bytes.
        return f"<image {self.name}>"

    def read(self, limit: int) -> bytes:
        """The bytes of the file, at most ``limit``; raise :class:`ImageError` where they cannot be had."""
        raw = self.data if self.data is not None else read_inside(self.path, self.folder or Path(), limit)
        if not raw:
            raise ImageError("an empty file")
        if len(raw) > limit:
            raise ImageError(f"over {limit:,} bytes")
        return raw


@dataclass(frozen=True, slots=True)
class BothRef:
    """A text and an image that are one item; the image is not read yet."""

    text: str
    image: ImageRef


def read_inside(path: str, folder: Path, limit: int) -> bytes:
    """The bytes of a file below a folder, at most one over ``limit``; raise :class:`ImageError` where they cannot be had."""
    try:
        # Links are followed before the check, so one that points out of the folder is refused, too.
        file = inside(folder, path)
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            raise ImageError("no file")
        if about.st_size > limit:
            raise ImageError(f"over {limit:,} bytes")
        with file.open("rb") as opened:
            return opened.read(limit + 1)
    except BadInputError as error:
        raise ImageError("a path that leaves its folder") from error
    except FileNotFoundError as error:
        raise ImageError("a missing file") from error
    except (OSError, ValueError, RuntimeError) as error:
        # A name with a NUL byte is a ValueError, a loop of links a RuntimeError or an OSError.
        raise ImageError("a file that cannot be read") from error


def hash_named(names: Sequence[str], folder: Path) -> str:
    """32 hex digits over the names and contents of files below a folder; a file that cannot be read counts as that."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        try:
            raw = read_inside(name, folder, _HASHED)
        except ImageError as error:
            # A file that appears or is mended later makes another store.
            raw = str(error).encode()
        digest.update(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        digest.update(hashlib.blake2b(raw, digest_size=16).digest())
    return digest.hexdigest()


def reference(value: object, folder: Path) -> ImageRef | None:
    """The image that a cell names: a path, bytes, or both under ``bytes`` and ``path``; None where it names none."""
    if isinstance(value, ImageRef) or value is None:
        return value
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        return reference(data if data is not None else path, folder)
    if isinstance(value, bytes | bytearray | memoryview):
        return ImageRef(f"of {len(value):,} bytes", bytes(value))
    if isinstance(value, str):
        return ImageRef(value[:200], None, value, folder) if value.strip() else None
    raise ImageError(f"neither a path nor bytes ({type(value).__name__})")


def pillow() -> Any:
    """The module ``PIL.Image``; raise :class:`BadInputError` where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInputError(
            "images need Pillow, which is not installed", hint="Install it with: pip install 'nearfield[image]'."
        ) from error
    return Image


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as it will be kept."""

    image: Image
    """RGB."""
    original: tuple[int, int]
    """Width and height of the file's image, upright."""


def decode(raw: bytes, rules: ImagesConfig) -> Decoded:
    """Decode the bytes of a file by the rules of its source; raise :class:`ImageError` where that cannot be done.

    Size and format are read from the header and checked before anything is unpacked.
    """
    image_module = pillow()
    from PIL import ImageFile

    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        # Other libraries turn this on for the whole process; an image cut short would then come out grey.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(image_module, raw, rules)
    except ImageError:
        raise
    except image_module.DecompressionBombError as error:
        raise ImageError(f"over {rules.max_pixels:,} pixels") from error
    except Exception as error:
        # Decoders of hostile bytes raise nearly anything: OSError, SyntaxError, struct.error, KeyError, MemoryError.
        raise ImageError("broken or cut short") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _decode(image_module: Any, raw: bytes, rules: ImagesConfig) -> Decoded:
    from PIL import UnidentifiedImageError

    try:
        image = image_module.open(io.BytesIO(raw), formats=[name.upper() for name in rules.formats])
    except UnidentifiedImageError as error:
        raise ImageError(f"not a {', '.join(rules.formats)} image") from error
    with image:
        width, height = image.size
        if width < 1 or height < 1:
            raise ImageError("without pixels")
        if width * height > rules.max_pixels:
            raise ImageError(f"over {rules.max_pixels:,} pixels")
        if rules.animated == "refuse" and getattr(image, "is_animated", False):
            raise ImageError("animated")
        if image.format == "JPEG":
            # Photographs are unpacked at half, a quarter or an eighth where that is still twice what is wanted.
            image.draft(None, (2 * rules.max_side, 2 * rules.max_side))
        image.load()
        flat = on_white(image)
        turned = _upright(flat)
    if turned.size != flat.size:
        width, height = height, width
    return Decoded(smaller(turned, rules.max_side), (width, height))


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Broken metadata says nothing about how the image stands.
        return image


def on_white(image: Image) -> Image:
    """The image as RGB: what is transparent lies on white; 16 bits become 8."""
    image_module = pillow()
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65_535)
        image = _with_exif(image_module.fromarray((deep >> 8).astype(np.uint8)), image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        white = image_module.new("RGBA", above.size, (255, 255, 255, 255))
        white.alpha_composite(above)
        return _with_exif(white.convert("RGB"), image)
    return image if image.mode == "RGB" else _with_exif(image.convert("RGB"), image)


def _with_exif(image: Image, source: Image) -> Image:
    """The same pixels with the orientation of the file, which composing and converting may lose."""
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        if key in source.info:
            image.info[key] = source.info[key]
    return image


def smaller(image: Image, max_side: int) -> Image:
    """The image with no side over ``max_side``, each at least one pixel; the same object where it fits."""
    longest = max(image.size)
    if longest <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize((width, height), resample=pillow().Resampling.LANCZOS)


def encode(image: Image, quality: int | None) -> bytes:
    """An RGB image as WebP without metadata: lossless, or lossy of that quality."""
    target = io.BytesIO()
    if quality is None:
        image.save(target, "WEBP", lossless=True, method=1, quality=50, exif=b"", xmp=b"", icc_profile=b"")
    else:
        image.save(target, "WEBP", quality=quality, method=4, exif=b"", xmp=b"", icc_profile=b"")
    return target.getvalue()


def open_kept(data: bytes) -> Image:
    """Decode what :func:`encode` made."""
    image: Image = pillow().open(io.BytesIO(data), formats=["WEBP"]).convert("RGB")
    return image


IMAGES = frozenset({"png", "jpg", "jpeg", "webp", "gif", "bmp"})
"""Suffixes of images, without the dot."""
FOLDER_COLUMNS = ("image", "text", "texts", "file", "folder")
TAR_SUFFIXES = tuple(f".tar{packed}" for packed in ("", ".gz", ".xz", ".zst"))
MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 16 << 20
MARK = "<image>"
"""Stands for the image in a text; the encoder puts its own tokens there."""
_MARKS = re.compile(r"<\|image_\d+\|>|<image>")
Sample = dict[str, bytes | str]
"""The content of the members of one key, by suffix; a string is the reason why a member was not read."""


class ImageFolderReader(ReaderBase):
    """Images in a folder and below, with captions: a .txt beside each, or a table that names the files.

    Columns: image, text (of the .txt), texts (its lines), file, folder (the first one below ``path``: often a class).
    With a table: image, and its columns.
    """

    kind: Literal["image_folder"] = "image_folder"
    gives_images = True
    path: ConfigPath
    """The folder of the images."""
    captions: ConfigPath | None = None
    """A CSV, JSONL or Parquet file (or a folder of them); null for .txt files."""
    file_column: Column = "file_name"
    """The column of the table that holds paths below ``path``."""

    def build(self) -> ReaderBase:
        if self.captions is None:
            return self
        return CaptionTable(path=self.captions, image_folder=self.path, file_column=self.file_column)

    def _files(self) -> list[str]:
        if not self.path.is_dir():
            raise BadInputError("this folder does not exist", where=str(self.path), hint="'path' must be a folder.")
        files = sorted(
            file.relative_to(self.path).as_posix()
            for file in self.path.rglob("*")
            if file.suffix.lower().removeprefix(".") in IMAGES
        )
        if not files:
            shown = ", ".join(f".{suffix}" for suffix in sorted(IMAGES))
            raise BadInputError("this folder holds no images", where=str(self.path), hint=f"Wanted: {shown}.")
        return files

    def inputs(self) -> dict[str, str]:
        files = self._files()
        captions = [str(Path(file).with_suffix(".txt")) for file in files]
        return {"images": hash_named([*files, *captions], self.path)}

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        check_header(FOLDER_COLUMNS, columns, str(self.path))
        for number, file in enumerate(self._files(), start=1):
            caption = str(Path(file).with_suffix(".txt"))
            text: str | None = None
            try:
                text = read_inside(caption, self.path, MAX_TEXT_BYTES).decode("utf-8-sig").strip()
            except ImageError as error:
                # An image without a caption may still have a class.
                if "text" in columns or "texts" in columns:
                    yield Row(caption, number, None, f"the caption is {error}", file)
                    continue
            except UnicodeDecodeError as error:
                yield Row(caption, number, None, "not UTF-8", f"byte {error.start}")
                continue
            parts = file.split("/")
            values = {
                "image": ImageRef(file, None, file, self.path),
                "text": text,
                "texts": [line.strip() for line in (text or "").splitlines() if line.strip()],
                "file": file,
                "folder": parts[0] if len(parts) > 1 else None,
            }
            yield Row(file, number, values)


class ImageTable(TableReader):
    """The base of tables some columns of which name images below a folder; a row becomes one or several."""

    gives_images = True
    image_folder: ConfigPath
    """The folder where the paths of images start."""

    def inputs(self) -> dict[str, str]:
        names: set[str] = set()
        for row in super().rows(self.needed(())):
            for column in self.named():
                names |= {value for value in _list((row.values or {}).get(column)) if isinstance(value, str)}
        return {**super().inputs(), "images": hash_named(sorted(names), self.image_folder)}

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for row in super().rows(self.needed(columns)):
            if row.values is None:
                yield row
                continue
            try:
                for made in self.examples(row.values):
                    yield dataclasses.replace(row, values={**row.values, **made})
            except BadRowError as error:
                yield dataclasses.replace(row, values=None, reason=error.reason, excerpt=error.excerpt)

    def named(self) -> tuple[str, ...]:
        """The columns with paths of images."""
        raise NotImplementedError

    def needed(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The columns that the table must have."""
        raise NotImplementedError

    def examples(self, values: Mapping[str, object]) -> Iterator[dict[str, object]]:
        """The columns that are made of a row, once for each row that it becomes; raise BadRowError."""
        raise NotImplementedError

    def image(self, value: object, column: str) -> ImageRef | None:
        """The image that a cell names."""
        try:
            return reference(value, self.image_folder)
        except ImageError as error:
            raise BadRowError(f"{column!r} has an image that cannot be used: {error}", value) from error


class CaptionTable(ImageTable):
    """The rows of a table, each with the image that it names in a new column ``image``."""

    file_column: Column
    """The column that holds the paths."""

    def named(self) -> tuple[str, ...]:
        return (self.file_column,)

    def needed(self, columns: Sequence[str]) -> tuple[str, ...]:
        return (self.file_column, *(column for column in columns if column != "image"))

    def examples(self, values: Mapping[str, object]) -> Iterator[dict[str, object]]:
        if self.file_column not in values:
            raise BadRowError(f"no column {self.file_column!r}")
        yield {"image": self.image(values[self.file_column], self.file_column)}


class MmebReader(ImageTable):
    """MMEB's training format: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path.

    Columns: query, positives, negatives (items of text, image or both), and those of the file. The mark ``<|image_1|>``
    becomes ``<image>``; an item without an image has none. Where there are several positives or negatives, text and path
    are lists of one length.
    """

    kind: Literal["mmeb"] = "mmeb"

    def named(self) -> tuple[str, ...]:
        return ("qry_image_path", "pos_image_path", "neg_image_path")

    def needed(self, columns: Sequence[str]) -> tuple[str, ...]:
        return ("qry", "pos_text")

    def examples(self, values: Mapping[str, object]) -> Iterator[dict[str, object]]:
        queries = self._items(values, "qry", "qry_image_path")
        if len(queries) != 1:
            raise BadRowError("an empty query" if not queries else "several queries", dict(values))
        positives = self._items(values, "pos_text", "pos_image_path")
        negatives = self._items(values, "neg_text", "neg_image_path")
        yield {"query": queries[0], "positives": positives, "negatives": negatives}

    def _items(self, values: Mapping[str, object], text: str, path: str) -> list[object]:
        texts, paths = _list(values.get(text)), _list(values.get(path))
        length = max(len(texts), len(paths))
        if {len(texts), len(paths)} - {0, length}:
            raise BadRowError(f"{text!r} has {len(texts)} members and {path!r} has {len(paths)}", dict(values))
        texts, paths = texts or [None] * length, paths or [None] * length
        items = [item_of(one, self.image(other, path), text) for one, other in zip(texts, paths, strict=True)]
        return [item for item in items if item is not None]


class ImageTripletsReader(ImageTable):
    """An image and an instruction ask for another image, as in MegaPairs; one row an instruction.

    Columns: query (image and text), positives, negatives, and those of the file.
    """

    kind: Literal["image_triplets"] = "image_triplets"
    query_image: Column = "q_img"
    """The column of the query's image."""
    query_text: Column = "q_text"
    """The column of the instruction: a string or a list of them."""
    target_image: Column = "t_img"
    """The column of the image that is asked for."""
    negative_images: Column | None = "hns"
    """The column of images that are not asked for: a path or a list of them; null for none."""

    def named(self) -> tuple[str, ...]:
        columns = (self.query_image, self.target_image, self.negative_images)
        return tuple(column for column in columns if column is not None)

    def needed(self, columns: Sequence[str]) -> tuple[str, ...]:
        return (self.query_image, self.query_text, self.target_image)

    def examples(self, values: Mapping[str, object]) -> Iterator[dict[str, object]]:
        image = self.image(values.get(self.query_image), self.query_image)
        target = self.image(values.get(self.target_image), self.target_image)
        if image is None or target is None:
            raise BadRowError(
                f"no image in {(self.query_image if image is None else self.target_image)!r}", dict(values)
            )
        column = self.negative_images or ""
        others = [self.image(value, column) for value in _list(values.get(column))]
        negatives = [other for other in others if other is not None]
        instructions = _list(values.get(self.query_text))
        if not instructions:
            raise BadRowError(f"no instruction in {self.query_text!r}", dict(values))
        for instruction in instructions:
            query = item_of(instruction, image, self.query_text)
            yield {"query": query, "positives": [target], "negatives": negatives}


def _list(value: object) -> list[object]:
    """A cell as a list: none for null and for an empty string, one member for one value."""
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None or value == "" else [value]


def item_of(text: object, image: ImageRef | None, column: str) -> object:
    """The item of a text with marks and an image; None where there is neither.

    The mark is kept where the image stands between words. A text that is nothing but the mark is the image alone, and a
    text without an image loses its mark.
    """
    if text is not None and not isinstance(text, str):
        raise BadRowError(f"{column!r} is not a text ({type(text).__name__})", text)
    text = text or ""
    if len(_MARKS.findall(text)) > 1:
        raise BadRowError(f"{column!r} has marks for several images", text)
    words = _MARKS.sub("", text)
    if image is None:
        # The white space that separated the mark from the words goes with it.
        shown = words.strip() if words != text else text
        return shown or None
    return BothRef(_MARKS.sub(MARK, text), image) if words.strip() else image


class WebDatasetReader(ReaderBase):
    """WebDataset shards: tar files (.gz, .xz, .zst unpacked on the way) whose members of one key are a sample.

    Columns: image, text (.txt), cls (.cls), key, and the keys of the sample's .json. Nothing is unpacked to disk.
    """

    kind: Literal["webdataset"] = "webdataset"
    gives_images = True
    path: ConfigPath
    """A shard, or a folder of them."""

    def inputs(self) -> dict[str, str]:
        return hash_files(files_at(self.path, TAR_SUFFIXES, "tar"))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in files_at(self.path, TAR_SUFFIXES, "tar"):
            for number, (key, sample) in enumerate(_samples(file), start=1):
                yield _sample_row(file.name, number, key, sample)


def _samples(path: Path) -> Iterator[tuple[str, Sample]]:
    """(key, members by suffix) of a shard; members of one key stand side by side.

    Links, devices and folders are passed over: only plain files have content. Names are never used as paths.
    """
    with open_bytes(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                open_key, sample = "", Sample()
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if not member.isreg() or not dot or not stem:
                        continue
                    key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                    if key != open_key:
                        if sample:
                            yield open_key, sample
                        open_key, sample = key, {}
                    if suffix in IMAGES or suffix in ("txt", "json", "cls"):
                        sample[suffix] = "appears twice" if suffix in sample else _content(archive, member, suffix)
                if sample:
                    yield open_key, sample
        except (tarfile.TarError, EOFError) as error:
            raise BadInputError(
                f"this tar file is broken or cut short ({error})", where=str(path), hint="Fetch or write it again."
            ) from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> bytes | str:
    limit = MAX_IMAGE_BYTES if suffix in IMAGES else MAX_TEXT_BYTES
    if member.size > limit:
        return f"is over {limit:,} bytes"
    opened = archive.extractfile(member)
    data = b"" if opened is None else opened.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _sample_row(file: str, number: int, key: str, sample: Sample) -> Row:
    """A sample as a row, or the reason why it is none."""
    for suffix, data in sample.items():
        if isinstance(data, str):
            return Row(file, number, None, f"the member .{suffix} {data}", excerpt(key))
    images = [suffix for suffix in sample if suffix in IMAGES]
    if len(images) > 1:
        return Row(file, number, None, "several images", excerpt(key))
    values: dict[str, object] = {}
    texts: dict[str, str] = {}
    for suffix, data in sample.items():
        if isinstance(data, bytes) and suffix not in IMAGES:
            try:
                texts[suffix] = data.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                return Row(file, number, None, f"the member .{suffix} is not UTF-8", excerpt(key))
    if "json" in texts:
        try:
            loaded = json.loads(texts["json"])
        except (ValueError, RecursionError):
            return Row(file, number, None, "the member .json is not valid JSON", excerpt(texts["json"]))
        if not isinstance(loaded, dict):
            return Row(file, number, None, "the member .json is not a JSON object", excerpt(texts["json"]))
        values |= loaded
    values["key"] = key
    if "txt" in texts:
        values["text"] = texts["txt"]
    if "cls" in texts:
        values["cls"] = texts["cls"]
    image = sample[images[0]] if images else None
    values["image"] = ImageRef(f"{key}.{images[0]}", image) if isinstance(image, bytes) else None
    return Row(file, number, values)
