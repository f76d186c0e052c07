"""Texts of a global batch -> length-sorted chunks of at most so many tokens, dealt to ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nearfield.batching.plan import SEVERAL_SOURCES, Batch
from nearfield.batching.planner import Rows
from nearfield.objectives.config import Reading

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pool:
    """The distinct (item, prompt) pairs of a batch: each is encoded once, however many roles it plays, but for second views."""

    items: Rows
    """(n,) item rows."""
    prompts: Rows
    """(n,) prompt numbers."""
    queries: Rows
    """(Q,) where in the pool each query is."""
    documents: Rows
    """(D,) where in the pool each document is."""
    owner: Rows
    """(D,) the query that brought each document."""
    is_positive: npt.NDArray[np.bool_]
    """(D,) whether the document is a positive of its owner, rather than an explicit negative."""
    labels: Rows | None = None
    """(Q,) label of each example, -1 for none; none where the plan has none."""
    source: int | None = None
    """The source of all examples; none where they have several."""
    sources: Rows | None = None
    """(Q,) the source of each example, where they have several."""
    weights: npt.NDArray[np.float64] | None = None
    """(Q,) what each example counts; none where all count alike."""
    scores: npt.NDArray[np.float64] | None = None
    """(Q,) of graded pairs; not a number where an example has none."""
    teacher_scores: npt.NDArray[np.float64] | None = None
    """(D,) a teacher's score of each document for its owner; not a number where there is none."""
    token_columns: int = 0
    """How many numbers behind each embedding are losses of tokens."""
    query_tokens: Rows | None = None
    """(Q, T) the tokens of each query's whole text, padded with -1, where the objective asks for them."""
    deleted: npt.NDArray[np.float64] | None = None
    """(n,) the share of each text's tokens that are left out when it is encoded; none where all are read whole."""


def pool_batch(batch: Batch, readings: Sequence[Reading] | None = None) -> Pool:
    """The pool of a planned batch; ``readings`` are those of its examples, plain ones where there are none.

    Documents are in the order of their owners, positives before negatives; those of an example with views are its last view.
    """
    size = len(batch.query)
    ways = [Reading()] * size if readings is None else readings
    documents = [
        batch.query[row : row + 1] if way.views else np.concatenate([positives, negatives])
        for row, (way, positives, negatives) in enumerate(zip(ways, batch.positives, batch.negatives, strict=True))
    ]
    counts = [len(part) for part in documents]
    owner = np.repeat(np.arange(size), counts)
    is_positive = np.concatenate([np.arange(n) < len(p) for n, p in zip(counts, batch.positives, strict=True)])
    views = np.asarray([way.views or 0 for way in ways])
    is_positive |= views[owner] > 0
    # A text is encoded apart for each view, and for each share of its tokens that is deleted.
    shares, share = np.unique([way.deleted for way in ways], return_inverse=True)
    key = np.stack(
        [
            np.concatenate([np.zeros(size, dtype=np.int64), np.maximum(views - 1, 0)[owner]]),
            np.concatenate([share, share[owner]]),
            np.concatenate([batch.query, *documents]),
            np.concatenate([batch.query_prompt, np.where(views > 0, batch.query_prompt, batch.document_prompt)[owner]]),
        ]
    )
    pairs, where = np.unique(key, axis=1, return_inverse=True)
    where = where.reshape(-1)
    return Pool(
        pairs[2],
        pairs[3],
        where[:size],
        where[size:],
        owner,
        is_positive,
        batch.label,
        None if batch.source == SEVERAL_SOURCES else batch.source,
        batch.sources,
        scores=batch.score,
        deleted=shares[pairs[1]] if shares.any() else None,
    )


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into ``parts`` smaller ones (fewer where it has fewer examples) of nearly equal size, in its order."""
    size = len(batch.query)
    parts = min(parts, size)
    if parts == 1:
        return [batch]
    edges = [size * part // parts for part in range(parts + 1)]
    return [cut_batch(batch, start, stop) for start, stop in itertools.pairwise(edges)]


def cut_batch(batch: Batch, start: int, stop: int) -> Batch:
    """The examples ``start`` to ``stop`` of a batch."""
    return Batch(
        example=batch.example[start:stop],
        query=batch.query[start:stop],
        positives=batch.positives[start:stop],
        negatives=batch.negatives[start:stop],
        query_prompt=batch.query_prompt[start:stop],
        document_prompt=batch.document_prompt[start:stop],
        source=batch.source,
        sources=None if batch.sources is None else batch.sources[start:stop],
        score=None if batch.score is None else batch.score[start:stop],
        label=None if batch.label is None else batch.label[start:stop],
    )


def cut_chunks(lengths: Rows, budget: int, groups: Rows | None = None, *, padded: bool = True) -> list[Rows]:
    """Cut texts into chunks of at most ``budget`` tokens, longest first.

    ``lengths`` are tokens, shape (n,). Where chunks are ``padded`` a chunk takes longest length x count, else the sum of
    its lengths. A text that is longer than the budget is a chunk of its own. Texts of different ``groups`` (shape (n,))
    do not share a chunk. The result is a partition of 0..n-1 that depends on the arguments alone, so that it is the
    same on every device and for any number of them.
    """
    groups = np.zeros_like(lengths) if groups is None else groups
    order = np.lexsort((np.arange(len(lengths)), -lengths, groups))
    chunks: list[list[int]] = []
    taken = 0
    for index in order.tolist():
        last = chunks[-1] if chunks else None
        if last and groups[last[0]] == groups[index]:
            more = int(lengths[last[0]]) * (len(last) + 1) if padded else taken + int(lengths[index])
            if more <= budget:
                last.append(index)
                taken = more
                continue
        chunks.append([index])
        taken = int(lengths[index])
    return [np.asarray(chunk, dtype=np.int64) for chunk in chunks]


def chunk_tokens(lengths: Rows, chunk: Rows, *, padded: bool = True) -> int:
    """Tokens that a chunk takes: with padding, or its real ones."""
    return int(lengths[chunk].max()) * len(chunk) if padded else int(lengths[chunk].sum())


def deal_chunks(tokens: Sequence[int], ranks: int, kinds: Sequence[int] | None = None) -> list[list[int]]:
    """Deal chunks (given by their tokens) to ranks: the largest first, each to the rank with the fewest tokens.

    Returns the numbers of each rank's chunks, ascending. A greedy deal is within 4/3 of the best (Graham 1969). Chunks of
    different ``kinds`` are dealt each kind by itself, so that ranks have about as many of each, and stand one kind after the other.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for mine in _by_kind(range(len(tokens)), kinds):
        load = [0] * ranks
        dealt: list[list[int]] = [[] for _ in range(ranks)]
        for number in sorted(mine, key=lambda n: (-tokens[n], n)):
            rank = min(range(ranks), key=lambda r: (load[r], r))
            dealt[rank].append(number)
            load[rank] += tokens[number]
        for share, more in zip(shares, dealt, strict=True):
            share += sorted(more)
    return shares


class Turn(NamedTuple):
    """One of the chunks that a rank goes through."""

    chunk: int
    own: bool
    """Whether what it gives counts, or it is gone through for the other ranks' sake alone."""


def level_turns(shares: Sequence[Sequence[int]], rank: int, kinds: Sequence[int] | None = None) -> list[Turn]:
    """A rank's chunks, filled up so that in each turn all ranks go through a chunk of the same of the ``kinds``."""
    turns: list[Turn] = []
    for mine in _by_kind((number for share in shares for number in share), kinds):
        of_kind = [[number for number in share if number in mine] for share in shares]
        turns += [Turn(number, True) for number in of_kind[rank]]
        turns += [Turn(min(mine), False)] * (max(map(len, of_kind)) - len(of_kind[rank]))
    return turns


def turns_of(shares: Sequence[Sequence[int]], rank: int, kinds: Sequence[int] | None, *, level: bool) -> list[Turn]:
    """A rank's chunks; ``level``, filled up by :func:`level_turns`."""
    return level_turns(shares, rank, kinds) if level else [Turn(number, True) for number in shares[rank]]


def _by_kind(numbers: Iterable[int], kinds: Sequence[int] | None) -> list[set[int]]:
    found: dict[int, set[int]] = {}
    for number in numbers:
        found.setdefault(0 if kinds is None else kinds[number], set()).add(number)
    return [found[kind] for kind in sorted(found)]


def split_rows(count: int, ranks: int, rank: int) -> Rows:
    """The rows 0..count-1 whose loss a rank computes: an even, contiguous share."""
    return np.arange(count * rank // ranks, count * (rank + 1) // ranks, dtype=np.int64)
