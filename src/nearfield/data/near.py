"""Near-duplicates: texts of nearly the same words, and texts whose vectors nearly agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfield.data.finite import require_finite
from nearfield.data.minhash import BandIndex, sketch
from nearfield.data.normal import WordHashes, hash64, normal_form
from nearfield.data.shingles import Ragged, Rows, concatenate, hash_words, shared

Vectors = npt.NDArray[np.float32]
Encode = Callable[[Sequence[str]], Any]
"""texts -> vectors [n, d] of any length (they are normalised here)."""

SHORT_WORDS = 36
"""Texts of up to so many different words are compared by words, longer ones by pairs of words; around it, by both."""
_SLACK = 0.2
"""Six standard errors of a similarity that 200 minima estimate: words may also agree by the other way to split only."""
_LONG_LEAST = 0.45
_MULTIPLY = 64 << 20


@dataclass(frozen=True)
class NearRule:
    """When two texts are near-duplicates. Words are those of :func:`nearfield.data.normal.words`, each once.

    They are if the shared words are at least ``jaccard`` of all their words; or if one has all words of the other and
    that has at least ``contained`` of them, so that a text with a few words left out is found but not one in which words
    were exchanged. Texts with fewer words or letters than the least are told apart by their normal form alone.
    """

    jaccard: float = 0.85
    contained: float = 0.75
    min_words: int = 4
    min_characters: int = 12


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
        return cls(split.distinct(), joined, split.sequences(2).distinct(), letters)

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

    def __init__(self, sets: TextSets, usable: npt.NDArray[np.bool_], by_pairs: bool, bound: int) -> None:
        sizes = sets.split.sizes
        wanted = sizes >= bound if by_pairs else sizes <= bound
        self.texts = np.flatnonzero(usable & wanted).astype(np.int64)
        self.sketches = sketch((sets.pairs if by_pairs else sets.split).take(self.texts))


class NearIndex:
    """Finds the near-duplicates of texts among indexed ones. Approximate in what it finds, exact in what it gives.

    Whatever is found was checked by :class:`NearRule`. Of texts with up to 36 words those at the rule's edge are missed
    with probability 2e-5; longer ones are found by pairs of words, where up to about 15 % of the words may be left out.
    """

    def __init__(self, sets: TextSets, rule: NearRule) -> None:
        self.sets = sets
        self.rule = rule
        self._regimes = [(by_pairs, regime, BandIndex(regime.sketches)) for by_pairs, regime in self._split(sets)]

    def _split(self, sets: TextSets) -> list[tuple[bool, _Regime]]:
        usable = (sets.split.sizes >= self.rule.min_words) & (sets.letters >= self.rule.min_characters)
        bound = int(SHORT_WORDS * min(self.rule.jaccard, self.rule.contained))
        return [
            (False, _Regime(sets, usable, False, SHORT_WORDS)),
            # One word repeated has no pair of words that differ, but it has one.
            (True, _Regime(sets, usable & (sets.pairs.sizes > 0), True, max(bound, 2))),
        ]

    def matches(self, queries: TextSets) -> tuple[Rows, npt.NDArray[np.float64]]:
        """Pairs (indexed text, query text) that the rule calls near-duplicates, sorted, and their similarity.

        Shapes [p, 2] and [p].
        """
        parts: list[tuple[Rows, npt.NDArray[np.float64]]] = []
        least = min(self.rule.jaccard, self.rule.contained) - _SLACK
        for (by_pairs, mine, index), (_, theirs) in zip(self._regimes, self._split(queries), strict=True):
            for found in index.candidates(theirs.sketches, _LONG_LEAST if by_pairs else least):
                pairs = np.stack([mine.texts[found[:, 0]], theirs.texts[found[:, 1]]], axis=1)
                similarity = self._similarity(queries, pairs)
                kept = similarity > 0
                parts.append((pairs[kept], similarity[kept]))
        if not parts:
            return np.empty((0, 2), dtype=np.int64), np.empty(0)
        pairs = np.concatenate([part[0] for part in parts])
        similarity = np.concatenate([part[1] for part in parts])
        _, first = np.unique(pairs[:, 1] * max(len(self.sets), 1) + pairs[:, 0], return_index=True)
        return pairs[first], similarity[first]

    def _similarity(self, queries: TextSets, pairs: Rows) -> npt.NDArray[np.float64]:
        """The larger Jaccard similarity by both ways to split words, 0 where neither makes a near-duplicate."""
        best = np.zeros(len(pairs))
        for name in ("split", "joined"):
            mine, theirs = getattr(self.sets, name), getattr(queries, name)
            for start in range(0, len(pairs), 1 << 17):
                part = slice(start, start + (1 << 17))
                best[part] = np.maximum(best[part], near(mine, theirs, pairs[part], self.rule))
        return best


def near(first: Ragged, second: Ragged, pairs: Rows, rule: NearRule) -> npt.NDArray[np.float64]:
    """The Jaccard similarity of pairs of sets, 0 where the rule does not call them near-duplicates; shape [p]."""
    common = shared(first, second, pairs)
    left, right = first.sizes[pairs[:, 0]], second.sizes[pairs[:, 1]]
    similarity = common / np.maximum(left + right - common, 1)
    contained = (common == np.minimum(left, right)) & (similarity >= rule.contained)
    enough = np.minimum(left, right) >= rule.min_words
    return np.where(enough & (contained | (similarity >= rule.jaccard)), similarity, 0.0)


def first_of_each(index_of: Callable[[TextSets], NearIndex], sets: TextSets, block: int = 4096) -> Rows:
    """For each text the first kept text that it is a near-duplicate of, itself if there is none (it is kept then); [n].

    Texts are taken in their order and compared with those kept before, so the first of a kind stays. Kept texts are
    indexed in parts whose sizes grow like powers of two: n texts are indexed log n times.
    """
    found = np.arange(len(sets), dtype=np.int64)
    parts: list[tuple[Rows, NearIndex]] = []
    for start in range(0, len(sets), block):
        mine = np.arange(start, min(start + block, len(sets)), dtype=np.int64)
        queries = sets.take(mine)
        earliest = mine.copy()
        for texts, index in parts:
            pairs, _ = index.matches(queries)
            np.minimum.at(earliest, pairs[:, 1], texts[pairs[:, 0]])
        within, _ = index_of(queries).matches(queries)
        after: dict[int, list[int]] = {}
        for first, second in within.tolist():
            if first < second:
                after.setdefault(second, []).append(first)
        for place in range(len(mine)):
            if earliest[place] == mine[place]:
                for first in sorted(after.get(place, ())):
                    if earliest[first] == mine[first]:
                        earliest[place] = mine[first]
                        break
        found[mine] = earliest
        kept = mine[earliest == mine]
        while parts and len(parts[-1][0]) <= 2 * len(kept):
            kept = np.concatenate([parts.pop()[0], kept])
        parts.append((kept, index_of(sets.take(kept))))
    return found


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


def first_of_each_vector(vectors: Vectors, cosine: float, block: int = 2048) -> Rows:
    """As :func:`first_of_each`, by the cosine of unit vectors [n, d]; exact, n^2 d / 2 multiplications at most."""
    found = np.arange(len(vectors), dtype=np.int64)
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, len(vectors), block):
        mine = np.arange(start, min(start + block, len(vectors)), dtype=np.int64)
        earliest = mine.copy()
        for pairs, _ in near_vectors(vectors[kept], vectors[mine], cosine):
            np.minimum.at(earliest, pairs[:, 1], kept[pairs[:, 0]])
        alike = vectors[mine] @ vectors[mine].T >= cosine
        for place in range(len(mine)):
            if earliest[place] == mine[place]:
                firsts = np.flatnonzero(alike[place, :place] & (earliest[:place] == mine[:place]))
                if len(firsts):
                    earliest[place] = mine[firsts[0]]
        found[mine] = earliest
        kept = np.concatenate([kept, mine[earliest == mine]])
    return found


def representatives(texts: Iterator[Sequence[str]], rule: NearRule | None, *, normalised: bool = True) -> Rows:
    """For each text, given in batches, the first text it is a near-duplicate of or has the normal form of; [n].

    Without ``rule`` words are not compared, without ``normalised`` normal forms are not.
    """
    known = WordHashes()
    sets, parts = [], [np.empty(0, dtype=np.uint64)]
    for part in texts:
        if rule is not None:
            sets.append(TextSets.of(part, known))
        parts.append(normal_keys(part))
    keys = np.concatenate(parts)
    same = np.arange(len(keys), dtype=np.int64)
    if normalised:
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        same = np.where(keys == 0, same, first[inverse]).astype(np.int64)
    if rule is None:
        return same
    leaders = np.flatnonzero(same == np.arange(len(same))).astype(np.int64)
    near_of = first_of_each(lambda part: NearIndex(part, rule), TextSets.join(sets).take(leaders))
    of_leader = np.zeros(len(same), dtype=np.int64)
    of_leader[leaders] = leaders[near_of]
    found: Rows = of_leader[same]
    return found


def normal_keys(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """A hash of the normal form of each text; 0 where nothing stays of it."""
    forms = map(normal_form, texts)
    return np.fromiter((hash64(form) if form else 0 for form in forms), dtype=np.uint64, count=len(texts))
