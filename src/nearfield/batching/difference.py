"""How two plans differ: batches in both, examples that moved, pairs that meet in both."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from nearfield.batching.plan import Plan
from nearfield.batching.rows import Rows

FIGURES = ("batches", "rows", "tokens")
HARDNESS = ("planned_similarity", "random_similarity", "planned_false_negatives", "random_false_negatives")


@dataclass(frozen=True)
class Difference:
    """What two plans have in common."""

    identical: bool
    """Whether every step has the same examples in the same order."""
    steps: tuple[int, int]
    same_step: int
    """Steps that have the same examples, in any order, in both."""
    shared_batches: int
    """Batches of the first whose examples are a batch of the second, in whatever step."""
    examples: tuple[int, int]
    in_both: int
    moved: int
    """Examples in both plans whose step is another one."""
    pairs: tuple[int, int]
    """Pairs of examples that meet in a batch."""
    shared_pairs: int
    figures: list[tuple[str, float | None, float | None]]
    """Numbers of both summaries side by side."""
    settings: list[tuple[str, Any, Any]]
    """Settings and inputs that differ."""

    @property
    def overlap(self) -> float:
        """Pairs that meet in both plans, as a share of those that meet in either (Jaccard)."""
        either = self.pairs[0] + self.pairs[1] - self.shared_pairs
        return self.shared_pairs / either if either else 1.0

    @property
    def smallest_share(self) -> float:
        """Pairs that meet in both, as a share of those of the plan that has fewer."""
        return self.shared_pairs / max(1, min(self.pairs))


def compare_plans(first: Plan, second: Plan) -> Difference:
    """Compare two plans over the same data; examples are told apart by their row in the store.

    Of an example that comes several times in an epoch, the first time counts.
    """
    plans = (first, second)
    batch, example = [plan.column("step") for plan in plans], [plan.column("example") for plan in plans]
    identical = all(
        np.array_equal(first.column(name), second.column(name)) for name in ("step", "example", "query")
    ) and all(
        np.array_equal(first.lists(name).values, second.lists(name).values) for name in ("positives", "negatives")
    )
    sets = [
        [frozenset(example[i][start:stop].tolist()) for start, stop in _edges(batch[i], len(plans[i]))] for i in (0, 1)
    ]
    known = set(sets[1])
    both, left, right = np.intersect1d(example[0], example[1], return_indices=True)
    shared = _shared_pairs(batch[0][left], batch[1][right])
    return Difference(
        identical=identical,
        steps=(len(first), len(second)),
        same_step=sum(one == other for one, other in zip(*sets, strict=False)),
        shared_batches=sum(one in known for one in sets[0]),
        examples=(len(np.unique(example[0])), len(np.unique(example[1]))),
        in_both=len(both),
        moved=int((batch[0][left] != batch[1][right]).sum()),
        pairs=(_pairs(batch[0]), _pairs(batch[1])),
        shared_pairs=shared,
        figures=_figures(first.metadata["summary"], second.metadata["summary"]),
        settings=_settings(first.metadata, second.metadata),
    )


def _edges(steps: Rows, count: int) -> list[tuple[int, int]]:
    edges = np.searchsorted(steps, np.arange(count + 1)).tolist()
    return list(itertools.pairwise(edges))


def _pairs(batch: Rows) -> int:
    sizes = np.unique(batch, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def _shared_pairs(one: Rows, other: Rows) -> int:
    """Pairs of examples that are in one batch in both: those of each cell of the table of batches against batches."""
    cells = np.unique(np.stack([one, other]), axis=1, return_counts=True)[1]
    return int((cells * (cells - 1) // 2).sum())


def _figures(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    found: list[tuple[str, float | None, float | None]] = [(name, one.get(name), other.get(name)) for name in FIGURES]
    for table in ("batches_by_source", "dropped", "exceptions"):
        names = sorted({*one.get(table, {}), *other.get(table, {})})
        title = table.replace("_", " ").replace("batches by source", "batches of")
        found += [
            (f"{title}: {name.replace('_', ' ')}", one.get(table, {}).get(name, 0), other.get(table, {}).get(name, 0))
            for name in names
        ]
    hardness = one.get("hardness", {}), other.get("hardness", {})
    if any(hardness):
        found += [(name.replace("_", " "), hardness[0].get(name), hardness[1].get(name)) for name in HARDNESS]
    return found


def _settings(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs of the metadata, with nested keys joined by dots."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        parts = [flat(child, f"{name}.{key}" if name else str(key)) for key, child in value.items()]
        return {key: child for part in parts for key, child in part.items()}

    left, right = (flat({k: v for k, v in of.items() if k not in ("summary", "labels")}, "") for of in (one, other))
    return [
        (name, left.get(name), right.get(name)) for name in sorted({*left, *right}) if left.get(name) != right.get(name)
    ]
