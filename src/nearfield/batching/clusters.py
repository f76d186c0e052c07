"""Batches of one cluster of one source each (Embedding And Clustering Your Data, arXiv 2407.18887)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.arrays import Rows, Vectors
from nearfield.batching.planner import Drawn, Request, SingleSourcePlanner
from nearfield.batching.streams import Stream
from nearfield.mining.kmeans import spherical_kmeans

if TYPE_CHECKING:
    from nearfield.batching.config import KMeansStrataConfig

logger = logging.getLogger("nearfield.batching")


class KMeansStrataPlanner(SingleSourcePlanner):
    """As single-source batches, but the examples of a batch have one cluster."""

    config: KMeansStrataConfig
    cluster = staticmethod(spherical_kmeans)

    def strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        """The cluster of each row; found once for all epochs. With one cluster no vectors are needed."""
        strata: tuple[Rows, dict[str, Any]] = self.remember(stream, request, lambda: self._strata(stream, request))
        return strata

    def _strata(self, stream: Stream, request: Request) -> tuple[Rows, dict[str, Any]]:
        config = self.config
        vectors_of = request.need_vectors(config.kind)
        # More clusters than batches would leave none that fills a batch.
        clusters = max(1, min(config.clusters, len(stream) // config.batch_size))
        if not len(stream):
            return np.empty(0, dtype=np.int64), {}
        items = stream.queries if config.side == "query" else stream.representatives()
        seed = request.fixed_seed("kmeans", stream.name)
        clustering = self.cluster(
            vectors_of(config.side, items), clusters, seed=seed, iterations=config.iterations, sample=config.sample
        )
        labels = np.asarray(clustering.labels, dtype=np.int64)
        merged = 0
        if config.small == "merge":
            labels, merged = merge_small(labels, np.asarray(clustering.centroids), config.batch_size)
        sizes = np.bincount(labels, minlength=1)
        about = {
            "kind": "kmeans",
            "wanted": config.clusters,
            "clusters": len(sizes),
            "merged": merged,
            "sizes": np.sort(sizes)[::-1].tolist(),
        }
        logger.info(
            "%s: %d clusters of %d to %d examples (%d asked for, %d small ones merged)",
            stream.name, len(sizes), sizes.min(), sizes.max(), config.clusters, merged,
        )  # fmt: skip
        return labels, about

    def groups(self, drawn: Drawn, strata: Rows, request: Request, turn: int) -> Iterator[Rows]:
        """The rows of each cluster, in the order in which a single-source batch would take them."""
        labels = strata[drawn.order]
        by_label = drawn.order[np.argsort(labels, kind="stable")]
        edges = np.searchsorted(np.sort(labels), np.arange(int(strata.max(initial=-1)) + 2))
        for start, stop in itertools.pairwise(edges.tolist()):
            yield by_label[start:stop]


def merge_small(labels: Rows, centroids: Vectors, least: int) -> tuple[Rows, int]:
    """Join clusters with fewer than ``least`` members to the nearest other one, smallest first.

    Returns the labels, numbered anew without gaps, and how many clusters were joined to another.
    """
    sizes = np.bincount(labels, minlength=len(centroids)).astype(np.int64)
    sums = centroids.astype(np.float64) * sizes[:, None]
    target = np.arange(len(centroids))
    alive = sizes > 0
    merged = 0
    while alive.sum() > 1:
        living = np.flatnonzero(alive)
        small = living[np.argmin(sizes[living])]
        if sizes[small] >= least:
            break
        others = living[living != small]
        norms = np.maximum(np.linalg.norm(sums[others], axis=1), 1e-12)
        nearest = others[np.argmax((sums[others] @ sums[small]) / norms)]
        target[target == small] = nearest
        sums[nearest] += sums[small]
        sizes[nearest] += sizes[small]
        alive[small] = False
        merged += 1
    renumbered = np.cumsum(alive) - 1
    result: Rows = renumbered[target[labels]].astype(np.int64)
    return result, merged
