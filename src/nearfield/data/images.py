"""Images that strangers made: found by path or bytes, checked before they are decoded, decoded safely, made smaller.

Every reason why an image cannot be used is an :class:`ImageError`; nothing else comes out of here for bad input. A perceptual
hash finds copies that were scaled, packed anew or brightened a little.
"""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Mask, Rows
from nearfield.errors import BadInputError
from nearfield.files import inside

if TYPE_CHECKING:
    from PIL.Image import Image

    from nearfield.data.config import ImagesConfig

_HASHED = 1 << 30
_SIDE = 8


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


@dataclass(frozen=True)
class PerceptualHashes:
    """The looks of n images in few bytes: enough to find copies."""

    bits: npt.NDArray[np.uint64]
    """[n]: where brightness rises from left to right, on a grid of 8 x 8 (a difference hash)."""
    small: npt.NDArray[np.uint8]
    """[n, 8, 8, 3]: the images at 8 x 8 pixels; the hash is blind to colour and to flat images."""

    @classmethod
    def of(cls, images: Sequence[Image]) -> PerceptualHashes:
        """Those of RGB images."""
        box = pillow().Resampling.BOX
        bits = np.zeros(len(images), dtype=np.uint64)
        small = np.zeros((len(images), _SIDE, _SIDE, 3), dtype=np.uint8)
        for number, image in enumerate(images):
            grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), box)).astype(np.int64)
            rises = (grey[:, 1:] > grey[:, :-1]).ravel()
            bits[number] = np.packbits(rises).view(">u8")[0]
            small[number] = np.asarray(image.resize((_SIDE, _SIDE), box))
        return cls(bits, small)

    @classmethod
    def join(cls, parts: Sequence[PerceptualHashes]) -> PerceptualHashes:
        """Those of several groups, one after the other."""
        return cls(np.concatenate([part.bits for part in parts]), np.concatenate([part.small for part in parts]))

    def alike(self, one: int, others: Rows, bits: int, tolerance: float) -> Mask:
        """Whether one image looks like each of others: at most ``bits`` differ, and colours by at most ``tolerance``."""
        near: Mask = np.bitwise_count(self.bits[others] ^ self.bits[one]) <= bits
        hits = np.flatnonzero(near)
        apart = self.small[others[hits]].astype(np.int16) - self.small[one].astype(np.int16)
        near[hits] = np.abs(apart).mean(axis=(1, 2, 3)) <= tolerance
        return near

    def first_alike(self, bits: int, tolerance: float) -> Rows:
        """For each image the first before it that it looks like and that looks like none before itself; else itself, [n].

        Hashes that differ in at most k bits agree in one of k + 1 bands, so that only those are compared.
        """
        count = len(self.bits)
        edges = np.linspace(0, 64, bits + 2).astype(np.int64)
        bands = [
            (self.bits >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1) for low, high in pairwise(edges.tolist())
        ]
        buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in bands]
        first = np.arange(count, dtype=np.int64)
        for one in range(count):
            keys = [int(band[one]) for band in bands]
            others = np.unique(
                np.asarray([o for b, k in zip(buckets, keys, strict=True) for o in b[k]], dtype=np.int64)
            )
            like = others[self.alike(one, others, bits, tolerance)]
            if len(like):
                first[one] = like[0]
                continue
            for bucket, key in zip(buckets, keys, strict=True):
                bucket[key].append(one)
        return first
