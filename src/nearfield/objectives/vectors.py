"""Embeddings as the softmax sees them: prefixes, norms, and products of a tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Side = Literal["query", "document", "queue"]

SMALLEST_NORM = 1e-12
"""Shorter vectors are divided by it, as ``torch.nn.functional.normalize`` does."""
PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class Lines:
    """Some vectors of one side, as rows or columns of a block of logits."""

    side: Side
    index: Tensor
    """(n,) int64."""
    start: int | None
    """Where they begin if they follow each other: then a part of them is a view."""

    @classmethod
    def of(cls, side: Side, index: Tensor) -> Lines:
        """The lines with these numbers."""
        if not len(index):
            return cls(side, index, None)
        first = int(index[0])
        follow = bool((index == torch.arange(first, first + len(index), device=index.device)).all())
        return cls(side, index, first if follow else None)

    def __len__(self) -> int:
        return len(self.index)

    def part(self, low: int, high: int) -> Tensor | slice:
        """What picks the lines ``low`` to ``high`` from their side."""
        return self.index[low:high] if self.start is None else slice(self.start + low, self.start + high)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: never half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles(count: int, size: int) -> Iterator[tuple[int, int]]:
    """The edges of tiles of ``size``, the last one ragged."""
    return ((low, min(low + size, count)) for low in range(0, count, size))


class Vectors:
    """The sides of a batch, cut from their graph, with the norms of their prefixes and no copy of themselves."""

    def __init__(
        self, queries: Tensor, documents: Tensor, prefixes: Sequence[int], cosine: bool, queue: Tensor | None = None
    ) -> None:
        self.raw: dict[Side, Tensor] = {"query": queries.detach(), "document": documents.detach()}
        if queue is not None:
            self.raw["queue"] = queue
        self.prefixes = tuple(prefixes)
        self.widest = max(prefixes)
        self.dtype = accumulation_dtype(queries.dtype)
        self.inverse: dict[Side, Tensor] | None = None
        """(M, n) a side: one over the norm of each prefix; none for dot products."""
        if cosine:
            self.inverse = {side: self._inverse(raw) for side, raw in self.raw.items()}

    def _inverse(self, raw: Tensor) -> Tensor:
        norms = [torch.linalg.vector_norm(raw[:, :width], dim=1, dtype=self.dtype) for width in self.prefixes]
        return torch.stack(norms).clamp_min_(SMALLEST_NORM).reciprocal_()

    def take(self, side: Side, which: Tensor | slice) -> Tensor:
        """(n, widest) vectors; of unit length where there is one prefix and similarity is the cosine."""
        found = self.raw[side][which][:, : self.widest].to(self.dtype)
        if self.inverse is not None and len(self.prefixes) == 1:
            return found * self.inverse[side][0][which][:, None]
        return found

    def factors(self, side: Side, which: Tensor | slice) -> Tensor | None:
        """(M, n) what products of taken vectors are still to be multiplied by, if by anything."""
        if self.inverse is None or len(self.prefixes) == 1:
            return None
        return self.inverse[side][:, which]

    def segments(self) -> list[tuple[int, int]]:
        """Each prefix without the one before it; prefixes ascend."""
        return list(pairwise((0, *self.prefixes)))

    def products(self, rows: Tensor, columns: Tensor, out: Sequence[Tensor]) -> None:
        """(r, w) and (c, w) taken vectors -> products of each prefix into (r, c) buffers, in one pass over the vectors."""
        before: Tensor | None = None
        for (low, high), target in zip(self.segments(), out, strict=True):
            left, right = rows[:, low:high], columns[:, low:high].T
            if before is None:
                torch.mm(left, right, out=target)
            else:
                torch.addmm(before, left, right, out=target)
            before = target

    def pair_scores(self, queries: Tensor, documents: Tensor) -> Tensor:
        """(N,) numbers of queries and of documents -> (M, N) similarities."""
        scores = torch.empty(len(self.prefixes), len(queries), dtype=self.dtype, device=self.raw["query"].device)
        for low, high in tiles(len(queries), PAIRS_AT_ONCE):
            left, right = self.take("query", queries[low:high]), self.take("document", documents[low:high])
            parts = [(left[:, a:b] * right[:, a:b]).sum(dim=1) for a, b in self.segments()]
            scores[:, low:high] = torch.stack(parts).cumsum(dim=0)
            for side, which in (("query", queries), ("document", documents)):
                factors = self.factors(side, which[low:high])  # type: ignore[arg-type]
                if factors is not None:
                    scores[:, low:high] *= factors
        return scores
