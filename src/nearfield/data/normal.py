"""What stays of a text when case, punctuation, white space and the forms of characters do not count."""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

_APOSTROPHES = "'\u2018\u2019\u02bc"
# Scripts that put no spaces between words: each character is a word of its own.
_CONTINUOUS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_MAX_WORDS_KNOWN = 1 << 20


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
