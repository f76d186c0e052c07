"""Near-duplicates: texts of nearly the same words, and texts whose vectors nearly agree.

Texts are compared without case, punctuation, white space and forms of characters: by their normal form, or by their words as sets
of hashes. :func:`hash64` is the one hash of texts and words here; the ids of items are in :mod:`nearfield.data.items`.

Candidates by words come from MinHash signatures and locality-sensitive bands of them, and each is checked. Signatures are
those of rensa (Rust): 0.23 CPU seconds for 20,000 glosses and 128 permutations, where datasketch took 1.61
(``scripts/decontamination_figures.py --libraries``). Bands are joined here with NumPy, since rensa's index hands back one
text's neighbours at a time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Floats, Index, Mask, Ragged, Rows, Vectors, concatenate, ranges
from nearfield.data.vectors import require_finite

if TYPE_CHECKING:
    from nearfield.data.cleaning import NearDuplicateConfig


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


BANDS = 40
ROWS = 5
"""Two sets with a Jaccard similarity of 0.75 share a band with probability 1 - 2e-5, of 0.6 with 0.96, of 0.1 with 4e-4."""
SEED = 0x5EED
SHORT_WORDS = 36
"""Texts of up to so many different words are compared by words, longer ones by pairs of words; around it, by both."""
_SLACK = 0.2
"""Six standard errors of a similarity that 200 minima estimate: words may also agree by the other way to split only."""
_LONG_LEAST = 0.45
_MULTIPLY = 64 << 20
_PIECE = 8_000_000
_BLOCK = 50_000

EmbedTexts = Callable[[Sequence[str]], Any]
"""texts -> vectors [n, d] of any length (they are normalised here)."""


def pieces(counts: Rows, most: int | None = None) -> Iterator[slice]:
    """Slices of queries with at most ``most`` (eight million) candidates (``counts`` a query) together, or of one query."""
    most = _PIECE if most is None else most
    total = np.cumsum(counts)
    begin = 0
    while begin < len(counts):
        reached = total[begin - 1] if begin else 0
        end = max(int(np.searchsorted(total, reached + most, "right")), begin + 1)
        yield slice(begin, end)
        begin = end


@dataclass(frozen=True)
class Sketches:
    """MinHash of n sets: the keys of the bands [BANDS, n] and one byte of each of the BANDS * ROWS minima [n, 200]."""

    keys: npt.NDArray[np.uint64]
    bytes: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return int(self.keys.shape[1])


def sketch(sets: Ragged) -> Sketches:
    """The MinHash of each set, whatever the order of its values. The sets must not be empty."""
    from rensa import RMinHash

    keys = np.empty((BANDS, len(sets)), dtype=np.uint64)
    small = np.empty((len(sets), BANDS * ROWS), dtype=np.uint8)
    factors = np.random.default_rng(SEED).integers(1, 2**63, size=ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for start in range(0, len(sets), _BLOCK):
        stop = min(start + _BLOCK, len(sets))
        offsets = sets.offsets[start : stop + 1]
        values = np.ascontiguousarray(sets.values[offsets[0] : offsets[-1]])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            values, (offsets - offsets[0]).tolist(), BANDS * ROWS, SEED
        )
        minima = np.asarray(matrix.to_rows(), dtype=np.uint64).reshape(stop - start, BANDS, ROWS)
        mixed = (minima * factors).sum(axis=2, dtype=np.uint64)
        keys[:, start:stop] = (mixed ^ (mixed >> np.uint64(29))).T
        small[start:stop] = (minima.reshape(stop - start, -1) & np.uint64(255)).astype(np.uint8)
    return Sketches(keys, small)


class BandIndex:
    """Finds the sets that share a band with others."""

    def __init__(self, sketches: Sketches) -> None:
        self.sketches = sketches
        self._bands = [Index(keys) for keys in sketches.keys]

    def __len__(self) -> int:
        return len(self.sketches)

    def candidates(self, queries: Sketches, least: float) -> Iterator[Rows]:
        """Pairs (indexed set, query set) that share a band and whose estimated similarity is at least ``least``.

        Yields [p, 2], each pair once, in pieces that keep the memory bounded: a piece is all candidates of some queries.
        """
        if not len(self) or not len(queries):
            return
        counts = np.sum([band.counts(keys) for band, keys in zip(self._bands, queries.keys, strict=True)], axis=0)
        for piece in pieces(counts):
            wide = piece.stop - piece.start
            candidates = [band.all(keys[piece]) for band, keys in zip(self._bands, queries.keys, strict=True)]
            both = np.unique(np.concatenate([some.values * wide + some.owners() for some in candidates]))
            pairs = np.stack([both // wide, both % wide + piece.start], axis=1)
            if len(pairs):
                yield pairs[self._estimates(queries, pairs) >= least]

    def _estimates(self, queries: Sketches, pairs: Rows) -> Floats:
        """The similarity by the share of equal bytes, of which 1 in 256 is equal by chance."""
        result = np.empty(len(pairs))
        for start in range(0, len(pairs), _BLOCK):
            part = pairs[start : start + _BLOCK]
            equal = (self.sketches.bytes[part[:, 0]] == queries.bytes[part[:, 1]]).mean(axis=1)
            result[start : start + _BLOCK] = (equal - 1 / 256) / (1 - 1 / 256)
        return result


class TextSets:
    """The sets of words of n texts: by both ways to split words, and of neighbouring pairs of words."""

    def __init__(self, split: Ragged, joined: Ragged, pairs: Ragged, letters: Rows) -> None:
        self.split = split
        self.joined = joined
        self.pairs = pairs
        self.letters = letters

    def __len__(self) -> int:
        return len(self.split)

    @classmethod
    def of(cls, texts: Sequence[str], known: WordHashes, split: Ragged | None = None) -> TextSets:
        """The sets of texts; ``split`` are the words of :func:`hash_words` where they are at hand."""
        split = hash_words(texts, known) if split is None else split
        letters = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        joined = hash_words(texts, known, joined=True).distinct()
        return cls(split.distinct(), joined, sequences(split, 2).distinct(), letters)

    @classmethod
    def join(cls, parts: Sequence[TextSets]) -> TextSets:
        """The sets of several groups of texts, one after the other."""
        letters = np.concatenate([np.empty(0, dtype=np.int64), *(part.letters for part in parts)])
        return cls(
            concatenate([part.split for part in parts]),
            concatenate([part.joined for part in parts]),
            concatenate([part.pairs for part in parts]),
            letters,
        )

    def take(self, texts: Rows) -> TextSets:
        """The sets of some of the texts."""
        return TextSets(self.split.take(texts), self.joined.take(texts), self.pairs.take(texts), self.letters[texts])


class _Regime:
    """The texts of one range of lengths, sketched by one kind of their sets."""

    def __init__(self, sets: TextSets, usable: Mask, by_pairs: bool, bound: int) -> None:
        sizes = sets.split.lengths
        wanted = sizes >= bound if by_pairs else sizes <= bound
        self.texts = np.flatnonzero(usable & wanted).astype(np.int64)
        self.sketches = sketch((sets.pairs if by_pairs else sets.split).take(self.texts))


class NearIndex:
    """Finds the near-duplicates of texts among indexed ones. Approximate in what it finds, exact in what it gives.

    Whatever is found fulfils the rule. Of texts with up to 36 words those at the rule's edge are missed
    with probability 2e-5; longer ones are found by pairs of words, where up to about 15 % of the words may be left out.
    """

    def __init__(self, sets: TextSets, rule: NearDuplicateConfig) -> None:
        self.sets = sets
        self.rule = rule
        self._regimes = [(by_pairs, regime, BandIndex(regime.sketches)) for by_pairs, regime in self._split(sets)]

    def _split(self, sets: TextSets) -> list[tuple[bool, _Regime]]:
        usable = (sets.split.lengths >= self.rule.min_words) & (sets.letters >= self.rule.min_characters)
        bound = int(SHORT_WORDS * min(self.rule.jaccard, self.rule.contained))
        return [
            (False, _Regime(sets, usable, False, SHORT_WORDS)),
            # One word repeated has no pair of words that differ, but it has one.
            (True, _Regime(sets, usable & (sets.pairs.lengths > 0), True, max(bound, 2))),
        ]

    def matches(self, queries: TextSets) -> tuple[Rows, Floats]:
        """Pairs (indexed text, query text) that the rule calls near-duplicates, sorted, and their similarity.

        Shapes [p, 2] and [p].
        """
        parts: list[tuple[Rows, Floats]] = []
        least = min(self.rule.jaccard, self.rule.contained) - _SLACK
        for (by_pairs, mine, index), (_, theirs) in zip(self._regimes, self._split(queries), strict=True):
            for candidates in index.candidates(theirs.sketches, _LONG_LEAST if by_pairs else least):
                pairs = np.stack([mine.texts[candidates[:, 0]], theirs.texts[candidates[:, 1]]], axis=1)
                similarity = self._similarity(queries, pairs)
                similar = similarity > 0
                parts.append((pairs[similar], similarity[similar]))
        if not parts:
            return np.empty((0, 2), dtype=np.int64), np.empty(0)
        pairs = np.concatenate([part[0] for part in parts])
        similarity = np.concatenate([part[1] for part in parts])
        _, first = np.unique(pairs[:, 1] * max(len(self.sets), 1) + pairs[:, 0], return_index=True)
        return pairs[first], similarity[first]

    def _similarity(self, queries: TextSets, pairs: Rows) -> Floats:
        """The larger Jaccard similarity by both ways to split words, 0 where neither makes a near-duplicate."""
        best = np.zeros(len(pairs))
        for name in ("split", "joined"):
            mine, theirs = getattr(self.sets, name), getattr(queries, name)
            for start in range(0, len(pairs), 1 << 17):
                part = slice(start, start + (1 << 17))
                best[part] = np.maximum(best[part], near(mine, theirs, pairs[part], self.rule))
        return best


def near(first: Ragged, second: Ragged, pairs: Rows, rule: NearDuplicateConfig) -> Floats:
    """The Jaccard similarity of pairs of sets, 0 where the rule does not call them near-duplicates; shape [p]."""
    common = shared(first, second, pairs)
    left, right = first.lengths[pairs[:, 0]], second.lengths[pairs[:, 1]]
    similarity = common / np.maximum(left + right - common, 1)
    contained = (common == np.minimum(left, right)) & (similarity >= rule.contained)
    enough = np.minimum(left, right) >= rule.min_words
    return np.where(enough & (contained | (similarity >= rule.jaccard)), similarity, 0.0)


Find = Callable[[Rows], Iterable[Rows]]
"""rows -> pairs [p, 2] (place among what is indexed, place among the rows) that are near-duplicates, in pieces."""


def first_of_each(count: int, index: Callable[[Rows], Find], block: int = 4096) -> Rows:
    """For each of ``count`` rows the first kept row that it is a near-duplicate of, itself if none (it is kept then); [n].

    Rows are taken in their order and compared with those kept before, so the first of a kind stays. ``index`` prepares
    rows to be searched. Kept rows are indexed in parts whose sizes grow like powers of two: each row log n times.
    """
    first = np.arange(count, dtype=np.int64)
    parts: list[tuple[Rows, Find]] = []
    for start in range(0, count, block):
        mine = np.arange(start, min(start + block, count), dtype=np.int64)
        earliest = mine.copy()
        for rows, find in parts:
            for pairs in find(mine):
                np.minimum.at(earliest, pairs[:, 1], rows[pairs[:, 0]])
        within = np.concatenate([np.empty((0, 2), dtype=np.int64), *index(mine)(mine)])
        within = within[within[:, 0] < within[:, 1]]
        before = Ragged.from_pairs(within[:, 1], within[:, 0], len(mine))
        for place in np.flatnonzero((earliest == mine) & (before.lengths > 0)).tolist():
            firsts = before[place]
            firsts = firsts[earliest[firsts] == mine[firsts]]
            if len(firsts):
                earliest[place] = mine[firsts[0]]
        first[mine] = earliest
        new = mine[earliest == mine]
        while parts and len(parts[-1][0]) <= 2 * len(new):
            new = np.concatenate([parts.pop()[0], new])
        parts.append((new, index(new)))
    return first


def first_near_text(sets: TextSets, rule: NearDuplicateConfig, block: int = 4096) -> Rows:
    """:func:`first_of_each` by the words of texts."""

    def index(rows: Rows) -> Find:
        indexed = NearIndex(sets.take(rows), rule)
        return lambda queries: [indexed.matches(sets.take(queries))[0]]

    return first_of_each(len(sets), index, block)


def first_near_vector(vectors: Vectors, cosine: float, block: int = 2048) -> Rows:
    """:func:`first_of_each` by the cosine of unit vectors [n, d]; exact, n^2 d / 2 multiplications at most."""

    def index(rows: Rows) -> Find:
        indexed = vectors[rows]
        return lambda queries: (pairs for pairs, _ in near_vectors(indexed, vectors[queries], cosine))

    return first_of_each(len(vectors), index, block)


def unit(vectors: Any) -> Vectors:
    """Vectors [n, d] of length 1 in float32; a zero vector stays zero. Raises BadInputError where one is not finite."""
    array = np.asarray(vectors, dtype=np.float32)
    require_finite(array, lambda row: f"number {row + 1}", "near-duplicates by vectors")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    return (array / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def near_vectors(first: Vectors, second: Vectors, cosine: float) -> Iterator[tuple[Rows, Vectors]]:
    """Pairs (row of ``first``, row of ``second``) with at least this cosine, and it; both are of unit length.

    A block of the product is at most 256 MB.
    """
    step = max(_MULTIPLY // max(len(first), 1), 1)
    for start in range(0, len(second), step):
        product = first @ second[start : start + step].T
        rows, columns = np.nonzero(product >= cosine)
        yield np.stack([rows, columns + start], axis=1).astype(np.int64), product[rows, columns]


def representatives(
    texts: Iterator[Sequence[str]], rule: NearDuplicateConfig | None, *, normalised: bool = True
) -> Rows:
    """For each text, given in batches, the first text it is a near-duplicate of or has the normal form of; [n].

    Without ``rule`` words are not compared, without ``normalised`` normal forms are not.
    """
    known = WordHashes()
    sets, parts = [], [np.empty(0, dtype=np.uint64)]
    for part in texts:
        if rule is not None:
            sets.append(TextSets.of(part, known))
        parts.append(hash_normal_forms(part))
    keys = np.concatenate(parts)
    same = np.arange(len(keys), dtype=np.int64)
    if normalised:
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        same = np.where(keys == 0, same, first[inverse]).astype(np.int64)
    if rule is None:
        return same
    leaders = np.flatnonzero(same == np.arange(len(same))).astype(np.int64)
    near_of = first_near_text(TextSets.join(sets).take(leaders), rule)
    of_leader = np.zeros(len(same), dtype=np.int64)
    of_leader[leaders] = leaders[near_of]
    representative: Rows = of_leader[same]
    return representative
