"""Texts as sets of hashed words and word sequences, many texts at a time in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.data.normal import WordHashes, words

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)


@dataclass(frozen=True)
class Ragged:
    """Lists of hashes of n texts end to end: those of text i are ``values[offsets[i] : offsets[i + 1]]``."""

    values: Hashes
    offsets: Rows
    """[n + 1]"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Rows:
        """The length of each list, [n]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> Rows:
        """The text of each value, shape of ``values``."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)

    def take(self, texts: Rows) -> Ragged:
        """The lists of some texts, in the order asked for."""
        sizes = self.sizes[texts]
        offsets = starts(sizes)
        places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.offsets[texts], sizes)
        return Ragged(self.values[places], offsets)

    def distinct(self) -> Ragged:
        """Each list sorted, without repetition."""
        owners = self.owners
        order = np.lexsort((self.values, owners))
        values, owners = self.values[order], owners[order]
        first = np.ones(len(values), dtype=np.bool_)
        first[1:] = (values[1:] != values[:-1]) | (owners[1:] != owners[:-1])
        return Ragged(values[first], starts(np.bincount(owners[first], minlength=len(self))))

    def sequences(self, length: int) -> Ragged:
        """The hashes of all runs of ``length`` values that follow each other in a list; none where it is shorter."""
        counts = np.maximum(self.sizes - length + 1, 0)
        offsets = starts(counts)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1] - offsets[:-1], counts)
        found = np.zeros(len(places), dtype=np.uint64)
        for step in range(length):
            found = found * _ODD + self.values[places + step]
            found = (found ^ (found >> _SHIFT)) * _MIX
        return Ragged(found, offsets)


def starts(sizes: npt.NDArray[np.integer]) -> Rows:
    """[n + 1]: where lists of these sizes begin when they lie end to end."""
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The lists of several, one after the other."""
    values = np.concatenate([np.empty(0, dtype=np.uint64), *(part.values for part in parts)])
    sizes = np.concatenate([np.empty(0, dtype=np.int64), *(part.sizes for part in parts)])
    return Ragged(values, starts(sizes))


def hash_words(texts: Sequence[str], known: WordHashes, *, joined: bool = False) -> Ragged:
    """The words of each text as hashes, in their order (:func:`nearfield.data.normal.words`)."""
    lists = [known.of(words(text, joined=joined)) for text in texts]
    sizes = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    flat = (value for part in lists for value in part)
    return Ragged(np.fromiter(flat, dtype=np.uint64, count=int(sizes.sum())), starts(sizes))


def shared(first: Ragged, second: Ragged, pairs: Rows) -> Rows:
    """How many values two sorted sets share, for each pair of them: ``pairs`` is [p, 2] of list numbers; result [p].

    A list must be distinct (:meth:`Ragged.distinct`).
    """
    left = first.take(pairs[:, 0])
    right = second.take(pairs[:, 1])
    count = len(pairs)
    merged = np.concatenate([left.values, right.values])
    owners = np.concatenate([left.owners, right.owners])
    order = np.lexsort((merged, owners))
    merged, owners = merged[order], owners[order]
    same = (merged[1:] == merged[:-1]) & (owners[1:] == owners[:-1])
    return np.bincount(owners[1:][same], minlength=count).astype(np.int64)
