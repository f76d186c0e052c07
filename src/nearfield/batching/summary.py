"""Figures of planned epochs: who is in one, what was left out and how hard its batches are; and how two differ."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.arrays import Mask, Ragged, Rows
from nearfield.batching.assign import count_conflicts, find_conflicts
from nearfield.batching.planner import EpochBatches, VectorsOf
from nearfield.batching.streams import known_of
from nearfield.randomness import generator

if TYPE_CHECKING:
    from nearfield.batching.plan import Plan

SEVERAL = "several sources"


def summarise(epoch: EpochBatches, tokens: Rows, names: Mapping[int, str]) -> dict[str, Any]:
    """Batches, rows and tokens, in all and a source, what was dropped and why, and what the planner found.

    ``tokens`` are those of each row. A batch that has examples of several sources counts as such.
    """
    rows, offsets = epoch.rows, epoch.offsets

    def named(source: int) -> str:
        return names.get(source, str(source))

    by_source: dict[str, int] = {}
    if len(epoch):
        first = rows.source[offsets[:-1]]
        least, most = np.minimum.reduceat(rows.source, offsets[:-1]), np.maximum.reduceat(rows.source, offsets[:-1])
        one = least == most
        for source, count in zip(*np.unique(first[one], return_counts=True), strict=True):
            by_source[named(int(source))] = int(count)
        if not one.all():
            by_source[SEVERAL] = int((~one).sum())
    numbers, counts = np.unique(rows.source, return_counts=True)
    sums = [int(tokens[rows.source == number].sum()) for number in numbers]
    sizes = np.unique(epoch.sizes, return_counts=True)
    return {
        "batches": len(epoch),
        "rows": len(rows),
        "tokens": int(tokens.sum()),
        "batches_by_source": by_source,
        "rows_by_source": {named(int(n)): int(count) for n, count in zip(numbers, counts, strict=True)},
        "tokens_by_source": {named(int(n)): total for n, total in zip(numbers, sums, strict=True)},
        "batch_sizes": {str(int(size)): int(count) for size, count in zip(*sizes, strict=True)},
        "dropped": dict(sorted(epoch.dropped.items())),
        "planner": epoch.details,
    }


def count_exceptions(epoch: EpochBatches, known: Ragged | None, apart: bool = False) -> dict[str, int]:
    """How often, in the planned batches, what planners forbid by default is the case: an item that stands twice, an item
    that is a known positive of another query, a label that stands twice. Sources that are ``apart`` do not meet."""
    batch = epoch.batch_of_rows()
    if apart:
        batch = batch * (int(epoch.rows.source.max(initial=0)) + 1) + epoch.rows.source
    repeated, met = count_conflicts(find_conflicts(epoch.rows, distinct=True, known=None), batch)[0], 0
    if known is not None:
        met = count_conflicts(find_conflicts(epoch.rows, distinct=False, known=known), batch)[1]
    labelled = epoch.rows.label >= 0
    pairs = np.stack([batch[labelled], epoch.rows.label[labelled]])
    same = int(labelled.sum()) - np.unique(pairs, axis=1).shape[1]
    return {"repeated_items": repeated, "known_positives": met, "repeated_labels": same}


def positives_as_negatives(epoch: EpochBatches, known: Ragged) -> int:
    """Explicit negatives that are known positives of their own query."""
    negatives, query = epoch.rows.negatives, epoch.rows.query
    queries = np.unique(query)
    known_positives = known_of(known, queries)
    span = int(max(known.values.max(initial=0), negatives.values.max(initial=0))) + 1
    positives = queries[known_positives.owners()] * span + known_positives.values
    return int(np.isin(query[negatives.owners()] * span + negatives.values, positives).sum())


def measure_hardness(
    epoch: EpochBatches, vectors: VectorsOf, seed: int, *, batches: int = 64, rows: int = 256
) -> dict[str, Any]:
    """How hard batches are by a teacher, and how many of their negatives it takes for positives, beside random batches.

    Up to ``batches`` batches are drawn, and up to ``rows`` rows of each. In each the query of a row meets the first
    positive of every other row. ``similarity`` is the mean over these pairs of the teacher's similarity;
    ``false_negatives`` the share of them that score above the query's own positive. The random batches have as many rows
    of the same sources, drawn from the whole epoch. An interval is plus and minus 1.96 standard errors over batches.
    """
    random = generator(seed, "plan", "measure")
    usable = epoch.rows.positives.lengths > 0
    chosen = np.sort(random.permutation(len(epoch))[:batches])
    documents = epoch.rows.positives.first()
    by_source = {int(s): np.flatnonzero((epoch.rows.source == s) & usable) for s in np.unique(epoch.rows.source)}
    measured: dict[str, list[tuple[float, float, int]]] = {"planned": [], "random": []}
    for number in chosen.tolist():
        inside = np.arange(epoch.offsets[number], epoch.offsets[number + 1])
        inside = np.sort(random.permutation(inside[usable[inside]])[:rows])
        if len(inside) < 2:
            continue
        others = [
            random.choice(by_source[int(source)], size=int(count), replace=False)
            for source, count in zip(*np.unique(epoch.rows.source[inside], return_counts=True), strict=True)
        ]
        for name, which in (("planned", inside), ("random", np.concatenate(others))):
            measured[name].append(_pairs(epoch.rows.query[which], documents[which], vectors))
    if not measured["planned"]:
        return {}
    result: dict[str, Any] = {
        "batches": len(measured["planned"]),
        "pairs": sum(pairs for _, _, pairs in measured["planned"]),
    }
    for name, values in measured.items():
        for place, what in enumerate(("similarity", "false_negatives")):
            mean, margin = _mean([value[place] for value in values], [value[2] for value in values])
            result[f"{name}_{what}"] = round(mean, 6)
            result[f"{name}_{what}_margin"] = None if margin is None else round(margin, 6)
    return {"hardness": result}


def _pairs(queries: Rows, documents: Rows, vectors: VectorsOf) -> tuple[float, float, int]:
    """(similarity, share of false negatives, pairs) of queries with the documents of the other rows.

    Documents that are the query's own are no negatives of it.
    """
    left, right = vectors("query", queries).astype(np.float64), vectors("document", documents).astype(np.float64)
    scores = left @ right.T
    positive_scores = np.diagonal(scores)
    other: Mask = (documents[None, :] != documents[:, None]) & (documents[None, :] != queries[:, None])
    count = int(other.sum())
    if not count:
        return 0.0, 0.0, 0
    return float(scores[other].mean()), float((scores > positive_scores[:, None])[other].mean()), count


def _mean(values: list[float], weights: list[int]) -> tuple[float, float | None]:
    """The mean over pairs, and 1.96 standard errors over batches, which are taken as independent."""
    numbers, share = np.asarray(values), np.asarray(weights, dtype=np.float64)
    share /= max(share.sum(), 1.0)
    mean = float((numbers * share).sum())
    if len(numbers) < 2:
        return mean, None
    spread = float(np.sqrt(((share * (numbers - mean)) ** 2).sum() * len(numbers) / (len(numbers) - 1)))
    return mean, 1.96 * spread


FIGURES = ("batches", "rows", "tokens")
HARDNESS = ("planned_similarity", "random_similarity", "planned_false_negatives", "random_false_negatives")


@dataclass(frozen=True)
class PlanDifference:
    """The comparison of two plans."""

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


def compare_plans(first: Plan, second: Plan) -> PlanDifference:
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
    return PlanDifference(
        identical=identical,
        steps=(len(first), len(second)),
        same_step=sum(one == other for one, other in zip(*sets, strict=False)),
        shared_batches=sum(one in known for one in sets[0]),
        examples=(len(np.unique(example[0])), len(np.unique(example[1]))),
        in_both=len(both),
        moved=int((batch[0][left] != batch[1][right]).sum()),
        pairs=(_count_pairs(batch[0]), _count_pairs(batch[1])),
        shared_pairs=shared,
        figures=_figures(first.metadata["summary"], second.metadata["summary"]),
        settings=_settings(first.metadata, second.metadata),
    )


def _edges(steps: Rows, count: int) -> list[tuple[int, int]]:
    edges = np.searchsorted(steps, np.arange(count + 1)).tolist()
    return list(itertools.pairwise(edges))


def _count_pairs(batch: Rows) -> int:
    sizes = np.unique(batch, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def _shared_pairs(one: Rows, other: Rows) -> int:
    """Pairs of examples that are in one batch in both: those of each cell of the table of batches against batches."""
    cells = np.unique(np.stack([one, other]), axis=1, return_counts=True)[1]
    return int((cells * (cells - 1) // 2).sum())


def _figures(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    figures: list[tuple[str, float | None, float | None]] = [(name, one.get(name), other.get(name)) for name in FIGURES]
    for table in ("batches_by_source", "dropped", "exceptions"):
        names = sorted({*one.get(table, {}), *other.get(table, {})})
        title = table.replace("_", " ").replace("batches by source", "batches of")
        figures += [
            (f"{title}: {name.replace('_', ' ')}", one.get(table, {}).get(name, 0), other.get(table, {}).get(name, 0))
            for name in names
        ]
    hardness = one.get("hardness", {}), other.get("hardness", {})
    if any(hardness):
        figures += [(name.replace("_", " "), hardness[0].get(name), hardness[1].get(name)) for name in HARDNESS]
    return figures


def _settings(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The differences of the metadata, with nested keys joined by dots."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        parts = [flat(child, f"{name}.{key}" if name else str(key)) for key, child in value.items()]
        return {key: child for part in parts for key, child in part.items()}

    left, right = (flat({k: v for k, v in of.items() if k not in ("summary", "labels")}, "") for of in (one, other))
    return [
        (name, left.get(name), right.get(name)) for name in sorted({*left, *right}) if left.get(name) != right.get(name)
    ]
