"""Brute force, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def all_scores(queries: Any, documents: Any) -> Any:
    """[n, m] inner products, each summed in float64 and rounded to float32."""
    return np.vecdot(queries[:, None, :].astype(np.float64), documents[None].astype(np.float64)).astype(np.float32)


def best(queries: Any, documents: Any, depth: int, excluded: list[set[int]] | None = None) -> tuple[Any, Any]:
    """The best documents of each query by a full sort: (rows, scores), -1 and -inf where there are too few."""
    scores = all_scores(queries, documents)
    rows = np.full((len(queries), depth), -1)
    values = np.full((len(queries), depth), -np.inf, dtype=np.float32)
    for number, line in enumerate(scores):
        hidden = excluded[number] if excluded else set()
        order = sorted((row for row in range(len(line)) if row not in hidden), key=lambda row: (-line[row], row))[
            :depth
        ]
        rows[number, : len(order)], values[number, : len(order)] = order, line[order]
    return rows, values
