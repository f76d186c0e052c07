"""Pictures that strangers made: found by path or bytes, checked before they are decoded, decoded safely, made smaller.

Every reason why a picture cannot be used is a :class:`PictureError`; nothing else comes out of here for bad input.
"""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.data.picture_config import ImagesConfig
from nearfield.errors import BadInputError
from nearfield.files import inside

if TYPE_CHECKING:
    from PIL.Image import Image


_HASHED = 1 << 30


class PictureError(Exception):
    """A picture that cannot be used; the message is the reason, in words that can be counted."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A picture that is not read yet: the bytes of its file, or where the file lies."""

    name: str
    data: bytes | None = None
    path: str = ""
    folder: Path | None = None

    def __repr__(self) -> str:
        # In excerpts of bad rows: never the bytes.
        return f"<image {self.name}>"

    def read(self, limit: int) -> bytes:
        """The bytes of the file, at most ``limit``; raise :class:`PictureError` where they cannot be had."""
        raw = self.data if self.data is not None else read_inside(self.path, self.folder or Path(), limit)
        if not raw:
            raise PictureError("an empty file")
        if len(raw) > limit:
            raise PictureError(f"over {limit:,} bytes")
        return raw


@dataclass(frozen=True, slots=True)
class BothRef:
    """A text and a picture that are one item; the picture is not read yet."""

    text: str
    image: ImageRef


def read_inside(path: str, folder: Path, limit: int) -> bytes:
    """The bytes of a file below a folder, at most one over ``limit``; raise :class:`PictureError` where they cannot be had."""
    try:
        # Links are followed before the check, so one that points out of the folder is refused, too.
        file = inside(folder, path)
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            raise PictureError("no file")
        if about.st_size > limit:
            raise PictureError(f"over {limit:,} bytes")
        with file.open("rb") as opened:
            return opened.read(limit + 1)
    except BadInputError as error:
        raise PictureError("a path that leaves its folder") from error
    except FileNotFoundError as error:
        raise PictureError("a missing file") from error
    except (OSError, ValueError, RuntimeError) as error:
        # A name with a NUL byte is a ValueError, a loop of links a RuntimeError or an OSError.
        raise PictureError("a file that cannot be read") from error


def hash_named(names: Sequence[str], folder: Path) -> str:
    """32 hex digits over the names and contents of files below a folder; a file that cannot be read counts as that."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        try:
            raw = read_inside(name, folder, _HASHED)
        except PictureError as error:
            # A file that appears or is mended later makes another store.
            raw = str(error).encode()
        digest.update(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        digest.update(hashlib.blake2b(raw, digest_size=16).digest())
    return digest.hexdigest()


def reference(value: object, folder: Path) -> ImageRef | None:
    """What a cell says of a picture: a path, bytes, or both under ``bytes`` and ``path``; None where it says nothing."""
    if isinstance(value, ImageRef) or value is None:
        return value
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        return reference(data if data is not None else path, folder)
    if isinstance(value, bytes | bytearray | memoryview):
        return ImageRef(f"of {len(value):,} bytes", bytes(value))
    if isinstance(value, str):
        return ImageRef(value[:200], None, value, folder) if value.strip() else None
    raise PictureError(f"neither a path nor bytes ({type(value).__name__})")


def pillow() -> Any:
    """The module ``PIL.Image``; raise :class:`BadInputError` where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInputError(
            "pictures need Pillow, which is not installed", hint="Install it with: pip install 'nearfield[image]'."
        ) from error
    return Image


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture as it will be kept."""

    image: Image
    """RGB."""
    original: tuple[int, int]
    """Width and height of the file's picture, upright."""


def decode(raw: bytes, rules: ImagesConfig) -> Decoded:
    """Decode the bytes of a file by the rules of its source; raise :class:`PictureError` where that cannot be done.

    Size and format are read from the header and checked before anything is unpacked.
    """
    image_module = pillow()
    from PIL import ImageFile

    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        # Other libraries turn this on for the whole process; a picture cut short would then come out grey.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(image_module, raw, rules)
    except PictureError:
        raise
    except image_module.DecompressionBombError as error:
        raise PictureError(f"over {rules.max_pixels:,} pixels") from error
    except Exception as error:
        # Decoders of hostile bytes raise nearly anything: OSError, SyntaxError, struct.error, KeyError, MemoryError.
        raise PictureError("broken or cut short") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _decode(image_module: Any, raw: bytes, rules: ImagesConfig) -> Decoded:
    from PIL import UnidentifiedImageError

    try:
        image = image_module.open(io.BytesIO(raw), formats=[name.upper() for name in rules.formats])
    except UnidentifiedImageError as error:
        raise PictureError(f"no {', '.join(rules.formats)} picture") from error
    with image:
        width, height = image.size
        if width < 1 or height < 1:
            raise PictureError("without pixels")
        if width * height > rules.max_pixels:
            raise PictureError(f"over {rules.max_pixels:,} pixels")
        if rules.animated == "refuse" and getattr(image, "is_animated", False):
            raise PictureError("animated")
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
        # Broken metadata says nothing about how the picture stands.
        return image


def on_white(image: Image) -> Image:
    """The picture as RGB: what is transparent lies on white; 16 bits become 8."""
    image_module = pillow()
    if image.mode.startswith("I"):
        import numpy as np

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
    """The picture with no side over ``max_side``, each at least one pixel; the same object where it fits."""
    longest = max(image.size)
    if longest <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize((width, height), resample=pillow().Resampling.LANCZOS)


def encode(image: Image, quality: int | None) -> bytes:
    """An RGB picture as WebP without metadata: lossless, or lossy of that quality."""
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
