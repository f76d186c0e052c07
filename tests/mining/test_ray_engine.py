"""Ray gives the results of one machine, bit for bit, on a local cluster of two workers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfield.arrays import Ragged
from nearfield.data.vectors import ItemVectors, VectorJob
from nearfield.errors import BadInputError
from nearfield.mining import ray_engine
from nearfield.mining.negatives import Negatives
from nearfield.mining.search import ArrayDocuments, Neighbours, search
from nearfield.pipeline import open_run
from nearfield.pipeline.audit import mine_run
from tests.data.test_vectors import WANTED, InChunks

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")


def test_without_ray_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch, toy_recipe: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(BadInputError, match="Ray, which is not installed"):
        ray_engine.require_ray()


def test_a_worker_that_is_killed_loses_seconds_and_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps pieces of its shard in the cache that all machines see, as one machine does."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    whole = InChunks(monkeypatch)
    once = VectorJob(WANTED, whole, tmp_path / "once", "p").run()
    stopped = InChunks(monkeypatch, 10)
    job = VectorJob(WANTED, stopped, tmp_path / "v", "p")

    def divide(own: Any) -> None:
        ray_engine._encode(0, job, 1, 1)

    with pytest.raises(KeyboardInterrupt):
        job.run(divide=divide)
    going = InChunks(monkeypatch)
    later = VectorJob(WANTED, going, tmp_path / "v", "p").run()
    assert len(stopped.made) == 10 and len(stopped.made) + len(going.made) == len(whole.made)
    for role in WANTED:
        np.testing.assert_array_equal(later.table(role).vectors, once.table(role).vectors)


def test_what_is_mined_on_ray_is_encoded_and_searched_there(monkeypatch: pytest.MonkeyPatch, toy_recipe: Path) -> None:
    spread = []

    def encode(job: VectorJob) -> None:
        spread.append("encoding")
        job.do_share((0, 1))

    def searched(*given: Any, **settings: Any) -> Neighbours:
        spread.append("search")
        return search(*given, **settings)

    monkeypatch.setattr(ray_engine, "spread_encoding", encode)
    monkeypatch.setattr(ray_engine, "spread_search", searched)
    monkeypatch.setattr("nearfield.pipeline.audit.require_ray", lambda: None)
    settings = ["mining={negatives: 3, depth: 12, rules: [{kind: naive}]}", "teacher={kind: sentence_transformer}"]
    mine_run(open_run(toy_recipe, settings), engine="ray")
    assert set(spread) == {"encoding", "search"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of two CPUs each on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@needs_ray
def test_searching_on_two_workers(cluster: Any) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((3000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    excluded = Ragged.from_lists([[i, i + 1] for i in range(500)])
    alone = search(vectors[:500], vectors, 20, excluded=excluded)
    spread = ray_engine.spread_search(vectors[:500], ArrayDocuments(vectors), 20, excluded=excluded, part=90)
    np.testing.assert_array_equal(spread.rows, alone.rows)
    np.testing.assert_array_equal(spread.scores, alone.scores)


@pytest.mark.slow
@needs_ray
def test_mining_on_two_workers(cluster: Any, toy_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So small a set would be one shard; the shards stay as they are, and the workers share the two roles' tables.
    monkeypatch.setattr(ray_engine, "SHARD", 150)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    teacher = "teacher={kind: sentence_transformer, prompts: {query: 'word1 '}}"
    mining = "mining={negatives: 3, depth: 12, rules: [{kind: naive}, {kind: sampled_top_k}]}"
    found = {}
    try:
        for engine in ("local", "ray"):
            run = open_run(toy_recipe, [mining, teacher], toy_recipe.parent / engine / "toy")
            negatives: Negatives = mine_run(run, engine=engine)  # type: ignore[arg-type]
            path = next(iter((toy_recipe.parent / engine / ".cache" / "vectors").iterdir()))
            found[engine] = (ItemVectors.open(path).table("document").vectors, negatives.table)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(found["ray"][0], found["local"][0])
    assert found["ray"][1].equals(found["local"][1]) and len(found["ray"][1])
