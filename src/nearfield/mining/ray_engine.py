"""Encoding and searching on a Ray cluster (extra ``ray``), with the results of one machine.

Encoding: each shard of items is a task, with the shards that one machine would have; the files lie in the run's cache, which
all machines must see. Searching: each part of the queries is a task; the documents' vectors go into Ray's object store, and
the exact search gives every query the same result whatever is searched beside it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from nearfield.arrays import Ragged, Vectors
from nearfield.data.vectors import SHARD, VectorJob
from nearfield.errors import BadInputError
from nearfield.mining.search import DEFAULT_MEMORY, Documents, Neighbours, search

logger = logging.getLogger("nearfield.mining")

_LEAST_CPUS = 4
"""Ray Data's own read tasks want CPUs beside the workers': with two it was found to hang."""
_QUERIES_A_TASK = 8_192


def require_ray() -> None:
    """Raise :class:`BadInputError` where Ray Data is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise BadInputError("the engine ray needs Ray, which is not installed", hint="pip install 'nearfield[ray]'.")


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """Ray's module, connected: to what runs already, to the cluster at RAY_ADDRESS, or to workers on this machine."""
    require_ray()
    import ray

    began = not ray.is_initialized()
    if began:
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if not os.environ.get("RAY_ADDRESS"):
            settings |= {"num_cpus": max(_LEAST_CPUS, os.cpu_count() or 1), "include_dashboard": False}
        ray.init(**settings)
    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield ray
    finally:
        context.enable_progress_bars = bars
        if began:
            ray.shutdown()


def workers(ray: Any) -> int:
    """Tasks that run at a time: half of the cluster's CPUs, the others being left to Ray Data's reads."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)


class _Encoding:
    """A worker that encodes shares of a job's shards."""

    def __init__(self, job: VectorJob, shares: int, threads: int) -> None:
        import torch

        # Sums over another number of threads may differ in the last digits.
        torch.set_num_threads(threads)
        self.job, self.shares = job, shares

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["number"].tolist():
            self.job.do_share((number, self.shares))
        return {"number": batch["number"]}


def spread_encoding(job: VectorJob) -> None:
    """Make the shards of vectors on the workers, a share for each shard at most.

    The job is sent to them, so its encoder must open its model there.
    """
    import torch

    total = sum(len(rows) for rows in job.wanted.values())
    shares = max(1, -(-total // SHARD))
    with connected() as ray:
        tasks = min(workers(ray), shares)
        logger.info("Encoding %d items in %d shares on %d Ray workers", total, shares, tasks)
        numbers = ray.data.from_items([{"number": number} for number in range(shares)], override_num_blocks=shares)
        done = numbers.map_batches(
            _Encoding,
            fn_constructor_args=(job, shares, torch.get_num_threads()),
            batch_size=1,
            concurrency=tasks,
            num_cpus=1,
            num_gpus=int(torch.cuda.is_available()),
        )
        done.materialize()


class _Searching:
    """A worker that searches for parts of the queries."""

    def __init__(
        self, queries: Any, documents: Any, excluded: Any, depth: int, memory: int, device: str, part: int
    ) -> None:
        self.given = (queries, documents, excluded)
        self.depth, self.memory, self.device, self.part = depth, memory, device, part

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import ray

        queries, documents, excluded = (ray.get(one) for one in self.given)
        blocks: list[tuple[Any, Neighbours]] = []
        for start in batch["start"].tolist():
            stop = min(start + self.part, len(queries))
            hidden = None if excluded is None else excluded.slice(start, stop)
            best = search(
                queries[start:stop], documents, self.depth, excluded=hidden, memory=self.memory, device=self.device
            )
            blocks.append((np.arange(start, stop), best))
        return {
            "query": np.concatenate([numbers for numbers, _ in blocks]),
            "rows": np.concatenate([best.rows for _, best in blocks]),
            "scores": np.concatenate([best.scores for _, best in blocks]),
        }


def spread_search(
    queries: Vectors,
    documents: Documents,
    depth: int,
    *,
    excluded: Ragged | None = None,
    memory: int = DEFAULT_MEMORY,
    device: str = "cpu",
    part: int = _QUERIES_A_TASK,
) -> Neighbours:
    """As :func:`~nearfield.mining.search.search`, with ``memory`` for each worker."""
    rows = np.full((len(queries), depth), -1, dtype=np.int64)
    scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)
    starts = [{"start": start} for start in range(0, len(queries), part)]
    if not starts:
        return Neighbours(rows, scores)
    with connected() as ray:
        tasks = min(workers(ray), len(starts))
        logger.info("Searching for %d queries in %d parts on %d Ray workers", len(queries), len(starts), tasks)
        given = (ray.put(np.asarray(queries)), ray.put(documents), ray.put(excluded))
        batches = ray.data.from_items(starts, override_num_blocks=len(starts)).map_batches(
            _Searching,
            fn_constructor_args=(*given, depth, memory, device, part),
            batch_size=1,
            concurrency=tasks,
            num_cpus=1,
            num_gpus=int(device != "cpu"),
        )
        for batch in batches.iter_batches(batch_size=None, batch_format="numpy"):
            rows[batch["query"]] = np.stack(batch["rows"])
            scores[batch["query"]] = np.stack(batch["scores"])
    return Neighbours(rows, scores)
