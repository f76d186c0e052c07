"""What is searched: vectors in memory, in a file that is mapped, or in blocks that come one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nearfield.errors import BadInputError

Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

_PAIRS = 512
_STREAMED = 4_096


class Documents(Protocol):
    """Document vectors that can be walked through as often as a search wants; rows are numbered from 0."""

    def blocks(self, rows: int) -> Iterator[tuple[int, Vectors]]:
        """(first row, vectors [at most ``rows``, d]) in the order of rows, together all documents."""
        ...

    def pairs(self, queries: Vectors, query_rows: Rows, document_rows: Rows) -> Vectors:
        """The score of each (query, document) pair, by :func:`pair_scores`."""
        ...


@dataclass(frozen=True)
class ArrayDocuments:
    """Vectors [m, d] in memory or mapped from a file."""

    vectors: Vectors

    def blocks(self, rows: int) -> Iterator[tuple[int, Vectors]]:
        """Views of the array."""
        for start in range(0, len(self.vectors), rows):
            yield start, self.vectors[start : start + rows]

    def pairs(self, queries: Vectors, query_rows: Rows, document_rows: Rows) -> Vectors:
        """By :func:`pair_scores`, in order of documents, so that a mapped file is read once."""
        order = np.argsort(document_rows, kind="stable")
        scores = np.empty(len(order), dtype=np.float32)
        scores[order] = pair_scores(queries, self.vectors, query_rows[order], document_rows[order])
        return scores


@dataclass(frozen=True)
class IndexedDocuments:
    """Some rows of a larger array of vectors, in the order of ``places``; copied a block at a time."""

    vectors: Vectors
    places: Rows

    def blocks(self, rows: int) -> Iterator[tuple[int, Vectors]]:
        """Copies of the rows."""
        for start in range(0, len(self.places), rows):
            yield start, np.asarray(self.vectors[self.places[start : start + rows]])

    def pairs(self, queries: Vectors, query_rows: Rows, document_rows: Rows) -> Vectors:
        """By :func:`pair_scores`."""
        return ArrayDocuments(self.vectors).pairs(queries, query_rows, self.places[document_rows])


@dataclass(frozen=True)
class StreamedDocuments:
    """Vectors that come as blocks [any, d], from a callable that begins anew each time it is called."""

    stream: Callable[[], Iterable[Vectors]]

    def blocks(self, rows: int) -> Iterator[tuple[int, Vectors]]:
        """The stream's blocks, cut where they are longer than ``rows``."""
        start = 0
        for block in self.stream():
            block = np.asarray(block, dtype=np.float32)
            if block.ndim != 2:
                raise BadInputError(f"a block of documents has shape {block.shape}; [rows, dimensions] is wanted")
            for first in range(0, len(block), rows):
                part = block[first : first + rows]
                yield start, part
                start += len(part)

    def pairs(self, queries: Vectors, query_rows: Rows, document_rows: Rows) -> Vectors:
        """By :func:`pair_scores`, in one more walk through the stream, up to the last document asked for."""
        order = np.argsort(document_rows, kind="stable")
        query_rows, document_rows = query_rows[order], document_rows[order]
        found = np.empty(len(order), dtype=np.float32)
        done = 0
        for start, block in self.blocks(_STREAMED):
            if done == len(order):
                break
            stop = int(np.searchsorted(document_rows, start + len(block)))
            found[done:stop] = pair_scores(queries, block, query_rows[done:stop], document_rows[done:stop] - start)
            done = stop
        scores = np.empty_like(found)
        scores[order] = found
        return scores


def as_documents(documents: Documents | Vectors) -> Documents:
    """An array as :class:`ArrayDocuments`; anything else as it is."""
    return ArrayDocuments(documents) if isinstance(documents, np.ndarray) else documents


def pair_scores(queries: Vectors, documents: Vectors, query_rows: Rows, document_rows: Rows) -> Vectors:
    """Inner products of pairs of float32 vectors, summed in float64 and rounded to float32, shape (pairs,).

    This is the one meaning of a score: it does not depend on how vectors were cut into blocks, on the number of threads
    or on the device that found the pair. (Sums in another order differ in float64's last digits, which the rounding drops
    but for about one pair in 10^8.)
    """
    scores = np.empty(len(query_rows), dtype=np.float32)
    for start in range(0, len(query_rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        left = np.take(queries, query_rows[part], axis=0).astype(np.float64)
        right = np.take(documents, document_rows[part], axis=0).astype(np.float64)
        scores[part] = np.vecdot(left, right)
    return scores


def check_vectors(vectors: Vectors, what: str, first: int = 0) -> None:
    """Raise :class:`BadInputError` unless these are finite float32 vectors [n, d]."""
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise BadInputError(f"{what} are {vectors.dtype} of shape {vectors.shape}; float32 [n, dimensions] is wanted")
    finite = np.isfinite(vectors.sum(axis=1, dtype=np.float64))
    if not finite.all():
        row = first + int(np.flatnonzero(~finite)[0])
        raise BadInputError(f"row {row} of {what} is not finite", hint="The teacher made NaN or infinity of it.")
