"""The training texts that benchmark texts are compared with, indexed.

Held in memory: for each training text its words as hashes (8 bytes a word), the word sequences (16 bytes each), 700 bytes of
MinHash and, with an encoder, its vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.data.contamination import TRAINING_ROLES
from nearfield.data.decontamination_config import DecontaminationConfig
from nearfield.data.items import canonical_text
from nearfield.data.near import Encode, NearIndex, TextSets, Vectors, near_vectors, normal_keys, unit
from nearfield.data.normal import WordHashes, hash64
from nearfield.data.shingles import Ragged, Rows, concatenate, hash_words, starts

if TYPE_CHECKING:
    from nearfield.data.store import Store

BLOCK = 8192
"""Texts that are looked at together."""
_PIECE = 8_000_000


class TrainingTexts:
    """The different texts of a store's training examples, and what they are there."""

    def __init__(self, store: Store, sources: Sequence[str], split: str) -> None:
        self.store = store
        roles = np.zeros((len(TRAINING_ROLES), store.items.num_rows), dtype=np.bool_)
        for name in sources:
            part = store.examples.take(store.select(name, split))
            roles[0, part["query"].to_numpy()] = True
            for number, column in ((1, "positives"), (2, "negatives")):
                roles[number, part[column].combine_chunks().flatten().to_numpy()] = True
        self.items: Rows = np.flatnonzero(roles.any(axis=0)).astype(np.int64)
        self.pictures = 0
        """Items that are a picture without a text: they are not compared."""
        if store.has_images:
            wordless = np.asarray([kind == "image" for kind in store.modalities(self.items)], dtype=np.bool_)
            self.pictures = int(wordless.sum())
            self.items = self.items[~wordless]
        self.roles = roles[:, self.items]

    def batches(self) -> Iterator[list[str]]:
        """The texts in the order of ``items``."""
        for start in range(0, len(self.items), BLOCK):
            yield self.store.texts(self.items[start : start + BLOCK])


@dataclass
class Found:
    """Matches of a block: pairs (training text, benchmark text) with their similarity, for one kind."""

    pairs: Rows
    similarity: npt.NDArray[np.float64]


class TrainingIndex:
    """Everything that benchmark texts are compared with."""

    def __init__(
        self, batches: Iterable[Sequence[str]], config: DecontaminationConfig, encode: Encode | None = None
    ) -> None:
        self.config = config
        self.encode = encode
        self.known = WordHashes()
        sets, grams, exact, normal = [], [], [], []
        vectors: list[Vectors] = []
        for texts in batches:
            split = hash_words(texts, self.known)
            sets.append(TextSets.of(texts, self.known, split))
            grams.append(split.sequences(config.ngram).distinct())
            exact.append(_exact_keys(texts))
            normal.append(normal_keys(texts))
            if encode is not None:
                vectors.append(unit(encode(texts)))
        self.near = NearIndex(TextSets.join(sets), config.rule())
        self.exact = _Keys(exact)
        forms = np.concatenate([np.empty(0, dtype=np.uint64), *normal])
        some = np.flatnonzero(forms)
        # A text of signs alone has no normal form; equal ones are exact matches.
        self.normal = _Keys([forms[some]], some)
        every = concatenate(grams)
        self.gram_sizes = every.sizes
        self.grams = _Keys([every.values], every.owners)
        self.vectors = np.concatenate(vectors) if vectors else None
        self.long = (self.near.sets.split.sizes >= config.min_words) & (self.near.sets.letters >= config.min_characters)

    def __len__(self) -> int:
        return len(self.gram_sizes)

    def matches(self, texts: Sequence[str]) -> tuple[dict[str, Found], Rows]:
        """Matches of benchmark texts by kind, and the training texts that share any word sequence with one."""
        split = hash_words(texts, self.known)
        sets = TextSets.of(texts, self.known, split)
        found = {
            "exact": _ones(self.exact.pairs(_exact_keys(texts))),
            "normalised": _ones(self.normal.pairs(normal_keys(texts))),
        }
        found["ngram"], some = self._sequences(split.sequences(self.config.ngram).distinct())
        found["minhash"] = Found(*self.near.matches(sets))
        if self.encode is not None and self.vectors is not None:
            found["embedding"] = self._vectors(texts, sets)
        return found, some

    def _sequences(self, grams: Ragged) -> tuple[Found, Rows]:
        """Pairs by the share of the word sequences of the text with fewer."""
        owners, sizes = grams.owners, grams.sizes
        width = len(grams)
        pieces = self.grams.pieces(grams.values, self.config.common)
        parts = [pairs[:, 0] * width + owners[pairs[:, 1]] for pairs in pieces]
        keys, times = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]), return_counts=True)
        pairs = np.stack([keys // max(width, 1), keys % max(width, 1)], axis=1)
        share = times / np.maximum(np.minimum(self.gram_sizes[pairs[:, 0]], sizes[pairs[:, 1]]), 1)
        kept = share >= self.config.ngram_share
        return Found(pairs[kept], share[kept]), np.unique(pairs[:, 0])

    def _vectors(self, texts: Sequence[str], sets: TextSets) -> Found:
        assert self.encode is not None and self.vectors is not None
        mine = np.flatnonzero(self.long)
        config = self.config
        theirs = np.flatnonzero((sets.split.sizes >= config.min_words) & (sets.letters >= config.min_characters))
        pairs, cosines = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.float64)]
        if len(theirs) and len(mine):
            vectors = unit(self.encode([texts[place] for place in theirs.tolist()]))
            for part, cosine in near_vectors(self.vectors[mine], vectors, config.cosine):
                pairs.append(np.stack([mine[part[:, 0]], theirs[part[:, 1]]], axis=1))
                cosines.append(cosine.astype(np.float64))
        return Found(np.concatenate(pairs), np.concatenate(cosines))


class _Keys:
    """Hashes of training texts, sorted, with the text of each."""

    def __init__(self, parts: Sequence[npt.NDArray[np.uint64]], owners: Rows | None = None) -> None:
        keys = np.concatenate([np.empty(0, dtype=np.uint64), *parts])
        order = np.argsort(keys, kind="stable")
        self._sorted = keys[order]
        self._owners = order.astype(np.int64) if owners is None else owners[order]

    def pairs(self, queries: npt.NDArray[np.uint64]) -> Rows:
        """Pairs (training text, query) of equal hashes, [p, 2]."""
        return np.concatenate([np.empty((0, 2), dtype=np.int64), *self.pieces(queries)])

    def pieces(self, queries: npt.NDArray[np.uint64], most: int | None = None) -> Iterator[Rows]:
        """The same in pieces of bounded size; a hash of more than ``most`` training texts is passed over."""
        low = np.searchsorted(self._sorted, queries, "left")
        counts = np.searchsorted(self._sorted, queries, "right") - low
        if most is not None:
            counts[counts > most] = 0
        total = starts(counts)
        begin = 0
        while begin < len(queries):
            end = max(int(np.searchsorted(total, total[begin] + _PIECE, "right")) - 1, begin + 1)
            part = counts[begin:end]
            offsets = starts(part)
            places = np.arange(offsets[-1]) + np.repeat(low[begin:end] - offsets[:-1], part)
            yield np.stack([self._owners[places], np.repeat(np.arange(begin, end), part)], axis=1)
            begin = end


def _exact_keys(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    return np.fromiter((hash64(canonical_text(text)) for text in texts), dtype=np.uint64, count=len(texts))


def _ones(pairs: Rows) -> Found:
    return Found(pairs, np.ones(len(pairs)))
