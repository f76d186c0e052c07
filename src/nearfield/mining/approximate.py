"""Approximate search by FAISS, with its recall measured on a sample against the exact one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.errors import BadInputError
from nearfield.mining.documents import ArrayDocuments, RowLists, Rows, Vectors, check_vectors
from nearfield.mining.rules import Mask
from nearfield.mining.search import DEFAULT_MEMORY, Neighbours, ordered, search
from nearfield.randomness import derive_seed, generator

if TYPE_CHECKING:
    from nearfield.mining.config import HNSWSearch, IVFSearch

logger = logging.getLogger("nearfield.mining")

_QUERIES = 4_096
_TRAIN_A_LIST = 64


@dataclass(frozen=True)
class Recall:
    """Of the true best documents of a sample of queries, the share that an approximate search found."""

    value: float
    queries: int
    depth: int


def approximate_search(
    queries: Vectors,
    documents: Vectors,
    depth: int,
    config: IVFSearch | HNSWSearch,
    *,
    excluded: RowLists | None = None,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
) -> tuple[Neighbours, Recall]:
    """As :func:`~nearfield.mining.search.search`, but not all of the best are found; which share is measured and logged.

    What is found is scored by :func:`~nearfield.mining.documents.pair_scores` and ordered as the exact search orders.
    The index holds a copy of the documents, and HNSW its links beside. On several threads the index may come out
    differently; on one it is a function of the vectors and the seed.
    """
    check_vectors(queries, "the queries")
    check_vectors(documents, "the documents")
    if queries.shape[1] != documents.shape[1]:
        raise BadInputError(f"the documents have {documents.shape[1]} dimensions and the queries {queries.shape[1]}")
    index = _build(documents, config, seed)
    rows = np.full((len(queries), depth), -1, dtype=np.int64)
    scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)
    source = ArrayDocuments(documents)
    for start in range(0, len(queries), _QUERIES):
        stop = min(start + _QUERIES, len(queries))
        hidden = None if excluded is None else excluded.slice(start, stop)
        # FAISS knows no list of exclusions a query: as many more are asked for as are hidden from any of these.
        more = 0 if hidden is None else int(np.diff(hidden.offsets).max(initial=0))
        _, found = index.search(np.ascontiguousarray(queries[start:stop]), min(depth + more, len(documents)))
        found = np.where(_listed(found, hidden), -1, found)
        owner, place = np.nonzero(found >= 0)
        exact = np.full(found.shape, -np.inf, dtype=np.float32)
        exact[owner, place] = source.pairs(queries, owner + start, found[owner, place])
        rows[start:stop], scores[start:stop] = ordered(found, exact, depth)
    neighbours = Neighbours(rows, scores)
    recall = measure_recall(neighbours, queries, documents, config.sample, excluded, seed, memory)
    logger.info(
        "%s: %.1f%% of the true best %d found (measured on %d queries)",
        config.kind,
        100 * recall.value,
        depth,
        recall.queries,
    )
    return neighbours, recall


def measure_recall(
    found: Neighbours,
    queries: Vectors,
    documents: Vectors,
    sample: int,
    excluded: RowLists | None = None,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
) -> Recall:
    """The share of the true best of ``sample`` queries, drawn by the seed, that were found."""
    count, depth = found.rows.shape
    chosen = np.sort(generator(seed, "mine", "recall").choice(count, size=min(sample, count), replace=False))
    hidden = None if excluded is None else RowLists.of([excluded[row] for row in chosen.tolist()])
    true = search(queries[chosen], documents, depth, excluded=hidden, memory=memory)
    hits = sum(
        len(np.intersect1d(best[best >= 0], mine[mine >= 0]))
        for best, mine in zip(true.rows, found.rows[chosen], strict=True)
    )
    return Recall(hits / max(1, int(true.counts().sum())), len(chosen), depth)


def _build(documents: Vectors, config: IVFSearch | HNSWSearch, seed: int) -> Any:
    import faiss

    dimension = documents.shape[1]
    documents = np.ascontiguousarray(documents)
    if config.kind == "hnsw":
        index: Any = faiss.IndexHNSWFlat(dimension, config.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.build_width
        index.hnsw.efSearch = config.width
    else:
        lists = config.lists or max(1, round(4 * np.sqrt(len(documents))))
        lists = min(lists, max(1, len(documents)))
        quantizer = faiss.IndexFlatIP(dimension)
        index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = derive_seed(seed, "mine", "ivf") % (1 << 31)
        index.cp.min_points_per_centroid = 1
        index.cp.max_points_per_centroid = _TRAIN_A_LIST
        index.nprobe = min(config.probes, lists)
        if len(documents):
            index.train(documents)
    if len(documents):
        index.add(documents)
    return index


def _listed(found: Rows, hidden: RowLists | None) -> Mask:
    """[n, k] bool: which of the found rows are hidden from their query."""
    if hidden is None:
        return np.zeros(found.shape, dtype=bool)
    width = int(max(found.max(initial=0), hidden.rows.max(initial=0))) + 2
    keys = hidden.owners() * width + hidden.rows
    listed: Mask = np.isin(np.arange(len(found))[:, None] * width + found, keys)
    return listed
