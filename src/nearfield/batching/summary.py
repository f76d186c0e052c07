"""What there is to know of a planned epoch: who is in it, what was left out, and how hard its batches are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.batching.claims import count_clashes, make_claims
from nearfield.batching.planner import EpochBatches, VectorsOf
from nearfield.batching.rows import Lists, Rows
from nearfield.randomness import generator

if TYPE_CHECKING:
    from nearfield.data.store import KnownPositives

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


def count_exceptions(epoch: EpochBatches, known: KnownPositives | None, apart: bool = False) -> dict[str, int]:
    """How often, in the planned batches, what planners forbid by default is the case: an item that stands twice, an item
    that is a known positive of another query, a label that stands twice. Sources that are ``apart`` do not meet."""
    batch = epoch.batch_of_rows()
    if apart:
        batch = batch * (int(epoch.rows.source.max(initial=0)) + 1) + epoch.rows.source
    repeated, met = count_clashes(make_claims(epoch.rows, distinct=True, known=None), batch)[0], 0
    if known is not None:
        met = count_clashes(make_claims(epoch.rows, distinct=False, known=known), batch)[1]
    labelled = epoch.rows.label >= 0
    pairs = np.stack([batch[labelled], epoch.rows.label[labelled]])
    same = int(labelled.sum()) - np.unique(pairs, axis=1).shape[1]
    return {"repeated_items": repeated, "known_positives": met, "repeated_labels": same}


def positives_as_negatives(epoch: EpochBatches, known: KnownPositives) -> int:
    """Explicit negatives that are known positives of their own query."""
    negatives, query = epoch.rows.negatives, epoch.rows.query
    lists = Lists(known.offsets, known.rows)
    queries = np.unique(query[query < len(lists)])
    span = int(max(known.rows.max(initial=0), negatives.values.max(initial=0))) + 1
    positives = np.repeat(queries, lists.lengths[queries]) * span + lists.values[lists.positions(queries)]
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
    documents = np.full(len(epoch.rows), -1, dtype=np.int64)
    documents[usable] = epoch.rows.positives.values[epoch.rows.positives.offsets[:-1][usable]]
    by_source = {int(s): np.flatnonzero((epoch.rows.source == s) & usable) for s in np.unique(epoch.rows.source)}
    found: dict[str, list[tuple[float, float, int]]] = {"planned": [], "random": []}
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
            found[name].append(_pairs(epoch.rows.query[which], documents[which], vectors))
    if not found["planned"]:
        return {}
    result: dict[str, Any] = {
        "batches": len(found["planned"]),
        "pairs": sum(pairs for _, _, pairs in found["planned"]),
    }
    for name, values in found.items():
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
    own = np.diagonal(scores)
    other: npt.NDArray[np.bool_] = (documents[None, :] != documents[:, None]) & (documents[None, :] != queries[:, None])
    count = int(other.sum())
    if not count:
        return 0.0, 0.0, 0
    return float(scores[other].mean()), float((scores > own[:, None])[other].mean()), count


def _mean(values: list[float], weights: list[int]) -> tuple[float, float | None]:
    """The mean over pairs, and 1.96 standard errors over batches, which are taken as independent."""
    numbers, share = np.asarray(values), np.asarray(weights, dtype=np.float64)
    share /= max(share.sum(), 1.0)
    mean = float((numbers * share).sum())
    if len(numbers) < 2:
        return mean, None
    spread = float(np.sqrt(((share * (numbers - mean)) ** 2).sum() * len(numbers) / (len(numbers) - 1)))
    return mean, 1.96 * spread
