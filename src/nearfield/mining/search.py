"""Exact top-k by inner product, in blocks, within a memory bound, the same whatever the blocks.

The documents are vectors in memory, in a file that is mapped, or in blocks that come one after another. A block of scores is made by one matrix product. Of each run of 64 scores only the largest is compared with what its query
must at least reach; runs that reach it are looked at score by score, and what passes goes into the query's buffer. A full
buffer is cut to its best, which raises the bar. So no top-k is made of a block, and nearly all time goes to the products.

A product in float32 errs by at most g = d u |q| |x| (u = 2^-24; Higham, Accuracy and Stability, 3.1). The bar lies so far
below the k-th best that nothing of the true top k is missed; at the end the few that are left are scored again by
:func:`~nearfield.mining.search.pair_scores` and ordered by (score falling, row rising). So the result is a function of
the vectors alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Ragged, Rows, Vectors
from nearfield.console import track
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    import torch


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
        scores_in_order = np.empty(len(order), dtype=np.float32)
        done = 0
        for start, block in self.blocks(_STREAMED):
            if done == len(order):
                break
            stop = int(np.searchsorted(document_rows, start + len(block)))
            scores_in_order[done:stop] = pair_scores(
                queries, block, query_rows[done:stop], document_rows[done:stop] - start
            )
            done = stop
        scores = np.empty_like(scores_in_order)
        scores[order] = scores_in_order
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


logger = logging.getLogger("nearfield.mining")

DEFAULT_MEMORY = 1 << 30
RUN = 64
_BLOCK = {"cpu": (1_024, 1_024), "cuda": (4_096, 16_384)}
_SLACK = 16
_LISTED = 2
"""Scores of a block are listed one by one where at most one run in so many has one; else the block is sorted whole."""
_PAIR_BYTES = 40
_UNIT = 2.0**-24


@dataclass(frozen=True)
class Neighbours:
    """The best documents of each query."""

    rows: Rows
    """[n, k] document rows, best first; -1 where a query has fewer documents than k."""
    scores: Vectors
    """[n, k], -inf where there is none."""

    def counts(self) -> Rows:
        """How many each query has."""
        counts: Rows = (self.rows >= 0).sum(axis=1)
        return counts


@dataclass(frozen=True)
class SearchPlan:
    """How a search is cut, and what it holds in memory beside the vectors that it was given."""

    queries: int
    """Queries held at a time: the documents are walked through once for each such part."""
    query_block: int
    document_block: int
    kept: int
    """Candidates that a buffer keeps when it is cut."""
    buffer: int
    """Candidates that a buffer holds."""
    passes: int
    bytes: int
    """At most held at a time, results included."""


def plan_search(
    count: int, dimension: int, depth: int, memory: int = DEFAULT_MEMORY, device: str = "cpu", streamed: bool = False
) -> SearchPlan:
    """How to search for ``count`` queries within ``memory`` bytes; raise :class:`BadInputError` where that is too little."""
    query_block, document_block = _BLOCK["cpu" if device == "cpu" else "cuda"]
    width = depth + _SLACK
    buffer = width + max(depth, RUN)
    results = count * depth * 12
    row = buffer * 12 + 48

    def fixed(block_rows: int, block_columns: int) -> int:
        cells = block_rows * block_columns
        scores = cells * 4 + cells // RUN * 24 + cells // _LISTED * (4 + 1 + 32)
        # Sorting a block whole: scores and rows beside the buffer's, and what topk returns.
        whole = block_rows * (block_columns + buffer) * 13 + block_rows * width * 12
        vectors = (block_columns + block_rows) * dimension * 8
        finish = 0 if streamed else block_rows * width * _PAIR_BYTES * 2
        return scores + whole + vectors + finish + 4_096 * dimension * 4 + 512 * dimension * 24

    while True:
        base = fixed(query_block, document_block) + results
        row_bytes = row + (buffer * _PAIR_BYTES if streamed else 0)
        held = min(count, max(0, memory - base) // row_bytes)
        if held >= min(count, query_block) or query_block <= 16:
            break
        query_block, document_block = query_block // 2, max(RUN, document_block // 2)
    if count and held < 1:
        least = base + row_bytes
        raise BadInputError(
            f"a search for the best {depth:,} of {count:,} queries needs at least {least / 2**20:,.0f} MiB beside the vectors "
            f"({results / 2**20:,.0f} of them for the result); {memory / 2**20:,.0f} MiB are allowed",
            hint="Allow more memory, or search less deep.",
        )
    query_block = max(1, min(query_block, held))
    passes = math.ceil(count / held) if held else 0
    return SearchPlan(held, query_block, document_block, width, buffer, passes, base + held * row_bytes)


def search(
    queries: Vectors,
    documents: Documents | Vectors,
    depth: int,
    *,
    excluded: Ragged | None = None,
    memory: int = DEFAULT_MEMORY,
    device: str = "cpu",
    plan: SearchPlan | None = None,
) -> Neighbours:
    """The ``depth`` documents with the largest inner product of each query [n, d], ties by the smaller row.

    ``excluded`` lists, for each query, document rows that are passed over (its known positives, itself). At most
    ``memory`` bytes are held beside what was given, which is logged first. The result does not depend on ``memory``, the
    blocks or the device.
    """
    import torch

    check_vectors(queries, "the queries")
    if depth < 1:
        raise BadInputError(f"a search for the best {depth} finds nothing", hint="Ask for at least 1.")
    if excluded is not None and len(excluded) != len(queries):
        raise BadInputError(f"{len(excluded)} lists of excluded documents for {len(queries)} queries")
    documents = as_documents(documents)
    count, dimension = queries.shape
    streamed = not isinstance(getattr(documents, "vectors", None), np.ndarray)
    plan = plan or plan_search(count, dimension, depth, memory, torch.device(device).type, streamed)
    logger.info(
        "Exact search for the best %d of %d queries: at most %.0f MiB beside the vectors (%d walks through the documents, "
        "blocks of %d x %d)",
        depth,
        count,
        plan.bytes / 2**20,
        plan.passes,
        plan.query_block,
        plan.document_block,
    )
    rows = np.full((count, depth), -1, dtype=np.int64)
    scores = np.full((count, depth), -np.inf, dtype=np.float32)
    with _full_precision(), torch.inference_mode():
        for start in range(0, count, max(plan.queries, 1)):
            stop = min(start + plan.queries, count)
            part = None if excluded is None else excluded.slice(start, stop)
            walk = _Walk(queries[start:stop], documents, depth, part, torch.device(device), plan)
            walk.run(f"Searching for queries {start:,} to {stop:,}" if plan.passes > 1 else "Searching")
            step = stop - start if streamed else plan.query_block
            for low in range(0, stop - start, step):
                high = min(low + step, stop - start)
                best, values = walk.finish(low, high)
                rows[start + low : start + high], scores[start + low : start + high] = best, values
    return Neighbours(rows, scores)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Products in whole float32: TF32 or bfloat16 would err by more than the bar allows for."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Walk:
    """One walk through the documents with some queries, their buffers and bars."""

    def __init__(
        self,
        queries: Vectors,
        documents: Documents,
        depth: int,
        excluded: Ragged | None,
        device: torch.device,
        plan: SearchPlan,
    ) -> None:
        import torch

        self.queries, self.documents, self.depth, self.plan, self.device = queries, documents, depth, plan, device
        count, dimension = queries.shape
        self.values = torch.full((count, plan.buffer), -torch.inf, device=device)
        self.rows = torch.full((count, plan.buffer), -1, dtype=torch.int64, device=device)
        self.filled = torch.zeros(count, dtype=torch.int64, device=device)
        # The k-th best score is at least this, in exact numbers.
        self.least = torch.full((count,), -torch.inf, device=device)
        norms = np.linalg.norm(queries, axis=1)
        # 1.05: float32 rounds the bar itself, and the norms.
        self.error = torch.from_numpy((1.05 * _UNIT * (dimension + 16) * norms).astype(np.float32)).to(device)
        self.longest = 0.0
        self.excluded = None if excluded is None or not len(excluded.values) else _by_block(excluded, plan)

    def run(self, description: str) -> None:
        """Walk through all documents."""
        import torch

        plan = self.plan
        for start, block in track(self.documents.blocks(plan.document_block), description):
            check_vectors(block, "the documents", start)
            if block.shape[1] != self.queries.shape[1]:
                raise BadInputError(
                    f"the documents have {block.shape[1]} dimensions and the queries {self.queries.shape[1]}"
                )
            norm = float(np.linalg.norm(block, axis=1).max(initial=0.0))
            self.longest = max(self.longest, norm)
            there = _tensor(block, self.device)
            for number, low in enumerate(range(0, len(self.queries), plan.query_block)):
                high = min(low + plan.query_block, len(self.queries))
                scores = torch.mm(_tensor(self.queries[low:high], self.device), there.T)
                if self.excluded is not None:
                    owners, hidden = _between(self.excluded[number], start, start + len(block))
                    if len(hidden):
                        scores[torch.from_numpy(owners), torch.from_numpy(hidden - start)] = -torch.inf
                self._take(low, high, scores, start, norm)

    def _take(self, low: int, high: int, scores: torch.Tensor, start: int, norm: float) -> None:
        """Put what may belong to the best of the queries ``low`` to ``high`` into their buffers."""
        import torch
        from torch.nn.functional import pad

        bar = self.least[low:high] - self.error[low:high] * norm
        if scores.shape[1] % RUN:
            scores = pad(scores, (0, -scores.shape[1] % RUN), value=-torch.inf)
        runs = scores.view(high - low, -1, RUN)
        reached = runs.amax(dim=2) >= bar[:, None]
        # A bar of -inf is reached by excluded and padded scores too; the whole block drops them.
        if int(reached.count_nonzero()) * _LISTED > reached.numel() or bool(torch.isneginf(bar).any()):
            self._take_block(low, high, scores, start)
            return
        owner, run = reached.nonzero(as_tuple=True)
        if not len(owner):
            return
        some = runs[owner, run]
        passed, place = (some >= bar[owner][:, None]).nonzero(as_tuple=True)
        self._insert(low, high, owner[passed], start + run[passed] * RUN + place, some[passed, place], norm)

    def _insert(
        self, low: int, high: int, owner: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, norm: float
    ) -> None:
        """Append candidates, grouped by query; whenever buffers are full, cut them and drop what no longer passes."""
        import torch

        while len(owner):
            counts = torch.bincount(owner, minlength=high - low)
            first = torch.cumsum(counts, 0) - counts
            filled = self.filled[low:high]
            place = filled[owner] + torch.arange(len(owner), device=self.device) - first[owner]
            fits = place < self.plan.buffer
            where = (owner[fits] + low, place[fits])
            self.values[where], self.rows[where] = values[fits], rows[fits]
            self.filled[low:high] = (filled + counts).clamp_(max=self.plan.buffer)
            if bool(fits.all()):
                return
            self._cut(low, high, self.values[low:high], self.rows[low:high])
            bar = self.least[low:high] - self.error[low:high] * norm
            left = ~fits & (values >= bar[owner])
            owner, rows, values = owner[left], rows[left], values[left]

    def _take_block(self, low: int, high: int, scores: torch.Tensor, start: int) -> None:
        """The same for a block in which much passes: buffers and block are cut together."""
        import torch

        numbers = torch.arange(start, start + scores.shape[1], device=self.device).expand(high - low, -1)
        used = int(self.filled[low:high].max())
        values = torch.cat([self.values[low:high, :used], scores], dim=1)
        rows = torch.cat([self.rows[low:high, :used], numbers], dim=1)
        self._cut(low, high, values, rows)

    def _cut(self, low: int, high: int, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Leave the best of these candidates [queries, any] in the buffers of the queries, and raise their bars."""
        import torch

        held = min(self.plan.kept, values.shape[1])
        best, place = torch.topk(values, held, dim=1)
        best_rows = rows.gather(1, place)
        error = self.error[low:high] * self.longest
        if held >= self.depth:
            self.least[low:high] = torch.maximum(self.least[low:high], best[:, self.depth - 1] - error)
        bar = self.least[low:high] - error
        # Candidates so near to each other that float32 cannot tell which are the best: exact scores decide.
        near = (values >= bar[:, None]) & ~torch.isneginf(values)
        unsure = (near.sum(dim=1) > held).nonzero()[:, 0].tolist()
        # Taken out now: these candidates may lie in the buffers themselves.
        candidates = [rows[number][near[number]].cpu().numpy() for number in unsure]
        keep = (best >= bar[:, None]) & ~torch.isneginf(best)
        self.values[low:high, :held] = best.masked_fill_(~keep, -torch.inf)
        self.values[low:high, held:] = -torch.inf
        self.rows[low:high, :held] = best_rows.masked_fill_(~keep, -1)
        self.rows[low:high, held:] = -1
        self.filled[low:high] = keep.sum(dim=1)
        for number, rows_of in zip(unsure, candidates, strict=True):
            exact = self.documents.pairs(self.queries, np.full(len(rows_of), low + number), rows_of)
            order = np.lexsort((rows_of, -exact))[: self.depth]
            size = len(order)
            self.values[low + number] = -torch.inf
            self.values[low + number, :size] = torch.from_numpy(exact[order])
            self.rows[low + number] = -1
            self.rows[low + number, :size] = torch.from_numpy(rows_of[order])
            self.filled[low + number] = size
            self.least[low + number] = float(exact[order[-1]])

    def finish(self, low: int, high: int) -> tuple[Rows, Vectors]:
        """The result of the queries ``low`` to ``high``, by exact scores."""
        self._cut(low, high, self.values[low:high].clone(), self.rows[low:high].clone())
        rows = self.rows[low:high].cpu().numpy()
        owner, place = np.nonzero(rows >= 0)
        exact = np.full(rows.shape, -np.inf, dtype=np.float32)
        exact[owner, place] = self.documents.pairs(self.queries, owner + low, rows[owner, place])
        return ordered(rows, exact, self.depth)


def ordered(rows: Rows, scores: Vectors, depth: int) -> tuple[Rows, Vectors]:
    """Candidates [n, any] in any order (row -1 and score -inf: none) -> the best [n, depth], ties by the smaller row."""
    by_row = np.argsort(rows, axis=1)
    rows, scores = np.take_along_axis(rows, by_row, 1), np.take_along_axis(scores, by_row, 1)
    # Stable: of equal scores the smaller row stays before. Rows of -1 have -inf and go last.
    by_score = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    best, values = np.take_along_axis(rows, by_score, 1), np.take_along_axis(scores, by_score, 1)
    missing = ((0, 0), (0, depth - best.shape[1]))
    return np.pad(best, missing, constant_values=-1), np.pad(values, missing, constant_values=-np.inf)


_Hidden = tuple[Rows, Rows]


def _by_block(excluded: Ragged, plan: SearchPlan) -> list[_Hidden]:
    """(query within its block, document row), sorted by document row, for each block of queries."""
    blocks = []
    for start in range(0, len(excluded), plan.query_block):
        part = excluded.slice(start, min(start + plan.query_block, len(excluded)))
        order = np.argsort(part.values, kind="stable")
        blocks.append((part.owners()[order], part.values[order]))
    return blocks


def _between(hidden: _Hidden, start: int, stop: int) -> _Hidden:
    owners, rows = hidden
    low, high = np.searchsorted(rows, [start, stop])
    return owners[low:high], rows[low:high]


def _tensor(block: npt.NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """The block on the device; without a copy on a CPU, where read-only memory is fine as nothing is written to it."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(block)).to(device)
