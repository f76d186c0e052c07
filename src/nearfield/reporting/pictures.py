"""Small pictures inside the page: shown without a network, and safe, since each is decoded and encoded anew."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from nearfield.data.pictures import pillow, smaller

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 56
"""Pixels of the longer side: ten queries with ten results on both sides stay below half a megabyte."""


def data_uri(image: Image) -> str:
    """An RGB picture as a data URI of a small WebP."""
    target = io.BytesIO()
    flat = pillow().new("RGB", image.size)
    # Onto a new picture: metadata does not travel.
    flat.paste(image)
    smaller(flat, SIDE).save(target, "WEBP", quality=70, method=4)
    return "data:image/webp;base64," + base64.b64encode(target.getvalue()).decode("ascii")
