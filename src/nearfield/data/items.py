"""The id of an item is the hash of its content, so the same content is the same item."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

ID_BYTES = 16


def canonical_text(text: str) -> str:
    """The text in Unicode normal form C: one form for what readers see as the same characters."""
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def item_id(modality: str, fields: Iterable[tuple[str, bytes]]) -> bytes:
    """16 bytes (BLAKE2b) over the modality and the named fields of an item.

    Each part is preceded by its length, so that no two lists of fields give the same bytes.
    """
    digest = hashlib.blake2b(digest_size=ID_BYTES)
    for part in (modality.encode(), *(part for name, value in fields for part in (name.encode(), value))):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def text_id(text: str) -> bytes:
    """The id of a text item. Raises ``UnicodeEncodeError`` for a text with lone surrogates."""
    return item_id("text", (("text", canonical_text(text).encode()),))
