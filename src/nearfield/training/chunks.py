"""Texts of a global batch -> length-sorted chunks of at most so many padded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.batching.plan import Batch
from nearfield.batching.planner import Rows


@dataclass(frozen=True)
class Pool:
    """The distinct (item, prompt) pairs of a batch: each is encoded once, however many roles it plays."""

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


def pool_batch(batch: Batch) -> Pool:
    """The pool of a planned batch. Documents are in the order of their owners, positives before negatives."""
    documents = [np.concatenate([p, n]) for p, n in zip(batch.positives, batch.negatives, strict=True)]
    counts = [len(part) for part in documents]
    owner = np.repeat(np.arange(len(documents)), counts)
    is_positive = np.concatenate([np.arange(n) < len(p) for n, p in zip(counts, batch.positives, strict=True)])
    items = np.concatenate([batch.query, *documents])
    prompts = np.concatenate([batch.query_prompt, batch.document_prompt[owner]])
    pairs, where = np.unique(np.stack([items, prompts]), axis=1, return_inverse=True)
    where = where.reshape(-1)
    size = len(batch.query)
    return Pool(pairs[0], pairs[1], where[:size], where[size:], owner, is_positive)


def cut_chunks(lengths: Rows, budget: int, groups: Rows | None = None) -> list[Rows]:
    """Cut texts into chunks of at most ``budget`` padded tokens (longest length x count), longest first.

    ``lengths`` are tokens, shape (n,). A text that is longer than the budget is a chunk of its own. Texts of different
    ``groups`` (shape (n,)) do not share a chunk. The result is a partition of 0..n-1 that depends on the arguments
    alone, so that it is the same on every device.
    """
    groups = np.zeros_like(lengths) if groups is None else groups
    order = np.lexsort((np.arange(len(lengths)), -lengths, groups))
    chunks: list[list[int]] = []
    for index in order.tolist():
        last = chunks[-1] if chunks else None
        if last and groups[last[0]] == groups[index] and int(lengths[last[0]]) * (len(last) + 1) <= budget:
            last.append(index)
        else:
            chunks.append([index])
    return [np.asarray(chunk, dtype=np.int64) for chunk in chunks]


def padded_tokens(lengths: Rows, chunks: Sequence[Rows]) -> int:
    """Tokens that the chunks take with padding."""
    return sum(int(lengths[chunk].max()) * len(chunk) for chunk in chunks)
