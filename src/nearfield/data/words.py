"""Texts without case, punctuation, white space and forms of characters: normal forms, and words as sets of hashes.

:func:`hash64` is the one hash of texts and words here; the ids of items are in :mod:`nearfield.data.items`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Ragged, Rows, ranges

Hashes = npt.NDArray[np.uint64]

_APOSTROPHES = "'\u2018\u2019\u02bc"
# Scripts that put no spaces between words: each character is a word of its own.
_CONTINUOUS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_MAX_WORDS_KNOWN = 1 << 20
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)


class _Separators(dict[int, str]):
    """A table for ``str.translate``, filled as characters are met: what separates words becomes ``to``."""

    def __init__(self, joined: str) -> None:
        super().__init__()
        self._joined = joined

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in self._joined or category == "Cf":
            value = ""
        elif category[0] in "PSZ" or category == "Cc":
            value = " "
        else:
            value = character
        self[code] = value
        return value


_SPLITTING = _Separators(_APOSTROPHES)
_JOINING = _Separators(_APOSTROPHES + "".join(c for c in map(chr, range(33, 127)) if not c.isalnum()))


def fold(text: str) -> str:
    """NFKC with case folded; done twice, since folding may leave characters that NFKC would change."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded if folded.isascii() else _CONTINUOUS.sub(r" \g<0> ", folded)


def words(text: str, *, joined: bool = False) -> list[str]:
    """The words of a text: letters, digits and marks between white space and punctuation, case folded, in NFKC.

    With ``joined``, punctuation of ASCII inside a word is left out instead (``e.g.`` is ``eg``), as it is where somebody
    stripped the punctuation of a text.
    """
    return fold(text).translate(_JOINING if joined else _SPLITTING).split()


def normal_form(text: str) -> str:
    """The letters, digits and marks of a text end to end, case folded, in NFKC; empty for a text of signs alone."""
    return "".join(words(text))


class WordHashes:
    """A 64-bit hash of each word, the same in every process, remembered for words met before."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, tokens: list[str]) -> list[int]:
        """The hashes of words, in their order."""
        known = self._known
        try:
            return [known[token] for token in tokens]
        except KeyError:
            if len(known) > _MAX_WORDS_KNOWN:
                known.clear()
            return [known[token] if token in known else known.setdefault(token, hash64(token)) for token in tokens]


def hash64(text: str) -> int:
    """64 bits of BLAKE2b over a text, lone surrogates included."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hash_texts(texts: Sequence[str]) -> Hashes:
    """The hash of each text, [n]."""
    return np.fromiter(map(hash64, texts), dtype=np.uint64, count=len(texts))


def hash_normal_forms(texts: Sequence[str]) -> Hashes:
    """The hash of the normal form of each text, [n]; 0 where nothing stays of it."""
    forms = map(normal_form, texts)
    return np.fromiter((hash64(form) if form else 0 for form in forms), dtype=np.uint64, count=len(texts))


def hash_words(texts: Sequence[str], known: WordHashes, *, joined: bool = False) -> Ragged:
    """The words of each text as hashes, in their order (:func:`words`)."""
    lists = [known.of(words(text, joined=joined)) for text in texts]
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    flat = (value for part in lists for value in part)
    return Ragged.from_lengths(lengths, np.fromiter(flat, dtype=np.uint64, count=int(lengths.sum())))


def sequences(lists: Ragged, length: int) -> Ragged:
    """The hashes of all runs of ``length`` hashes that follow each other in a list; none where it is shorter."""
    counts = np.maximum(lists.lengths - length + 1, 0)
    places = ranges(lists.offsets[:-1], counts)
    runs = np.zeros(len(places), dtype=np.uint64)
    for step in range(length):
        runs = runs * _ODD + lists.values[places + step]
        runs = (runs ^ (runs >> _SHIFT)) * _MIX
    return Ragged.from_lengths(counts, runs)


def shared(first: Ragged, second: Ragged, pairs: Rows) -> Rows:
    """The number of values that two sorted sets share, for each pair of sets: ``pairs`` is [p, 2] of list numbers; result [p].

    A list must be distinct (:meth:`nearfield.arrays.Ragged.distinct`).
    """
    left = first.take(pairs[:, 0])
    right = second.take(pairs[:, 1])
    count = len(pairs)
    merged = np.concatenate([left.values, right.values])
    owners = np.concatenate([left.owners(), right.owners()])
    order = np.lexsort((merged, owners))
    merged, owners = merged[order], owners[order]
    same = (merged[1:] == merged[:-1]) & (owners[1:] == owners[:-1])
    return np.bincount(owners[1:][same], minlength=count).astype(np.int64)
