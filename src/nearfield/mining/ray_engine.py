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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from nearfield.arrays import Ragged, Vectors
from nearfield.data.vectors import SHARD, VectorJob
from nearfield.errors import BadInputError
from nearfield.mining.search import DEFAULT_MEMORY, Documents, Neighbours, search

logger = logging.getLogger("nearfield.mining")

_LEAST_CPUS = 4
"""Ray Data's own read tasks want CPUs beside the workers': with two it was found to hang."""


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


class _Worker:
    """A worker that does numbered parts of a work."""

    def __init__(self, work: Callable[[int], dict[str, Any]]) -> None:
        self.work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (number,) = batch["number"].tolist()
        return self.work(number)


def _spread(
    ray: Any, work: Callable[[int], dict[str, Any]], parts: int, what: str, gpu: bool
) -> Iterator[dict[str, Any]]:
    """The result of ``work`` for each part, as they are done; each worker is sent it once."""
    # The other half of the CPUs is left to Ray Data's reads.
    workers = min(parts, max(1, int(ray.cluster_resources().get("CPU", 1)) // 2))
    logger.info("%s in %d parts on %d Ray workers", what, parts, workers)
    numbers = ray.data.from_items([{"number": number} for number in range(parts)], override_num_blocks=parts)
    settings = {"batch_size": 1, "concurrency": workers, "num_cpus": 1, "num_gpus": int(gpu)}
    done = numbers.map_batches(_Worker, fn_constructor_args=(work,), **settings)
    yield from done.iter_batches(batch_size=None, batch_format="numpy")


def _encode(number: int, job: VectorJob, shares: int, threads: int) -> dict[str, Any]:
    import torch

    # Sums over another number of threads may differ in the last digits.
    torch.set_num_threads(threads)
    job.do_share((number, shares))
    return {"number": np.array([number])}


def spread_encoding(job: VectorJob) -> None:
    """Make the shards of vectors on the workers, a share for each shard at most.

    The job is sent to them, so its encoder must open its model there.
    """
    import torch

    total = sum(len(rows) for rows in job.wanted.values())
    shares = max(1, -(-total // SHARD))
    work = partial(_encode, job=job, shares=shares, threads=torch.get_num_threads())
    with connected() as ray:
        for _ in _spread(ray, work, shares, f"Encoding {total} items", torch.cuda.is_available()):
            pass


def _search(number: int, given: Sequence[Any], part: int, depth: int, **settings: Any) -> dict[str, Any]:
    import ray

    queries, documents, excluded = map(ray.get, given)
    start, stop = number * part, min((number + 1) * part, len(queries))
    hidden = None if excluded is None else excluded.slice(start, stop)
    best = search(queries[start:stop], documents, depth, excluded=hidden, **settings)
    return {"query": np.arange(start, stop), "rows": best.rows, "scores": best.scores}


def spread_search(
    queries: Vectors,
    documents: Documents,
    depth: int,
    *,
    excluded: Ragged | None = None,
    memory: int = DEFAULT_MEMORY,
    device: str = "cpu",
    part: int = 8_192,
) -> Neighbours:
    """As :func:`~nearfield.mining.search.search`, ``part`` queries at a time and with ``memory`` for each worker."""
    rows = np.full((len(queries), depth), -1, dtype=np.int64)
    scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)
    if not len(queries):
        return Neighbours(rows, scores)
    with connected() as ray:
        given = [ray.put(each) for each in (np.asarray(queries), documents, excluded)]
        work = partial(_search, given=given, part=part, depth=depth, memory=memory, device=device)
        searched = f"Searching for {len(queries)} queries"
        for batch in _spread(ray, work, -(-len(queries) // part), searched, device != "cpu"):
            rows[batch["query"]] = np.stack(batch["rows"])
            scores[batch["query"]] = np.stack(batch["scores"])
    return Neighbours(rows, scores)
