"""Time and memory of the planner's parts by the number of examples: no duplicates, k-means, neighbours, communities.

    python scripts/bench_scale.py --sizes 10k 100k 1M --work /var/tmp/scale --json results/scale/scale.json

Every measurement runs in a fresh process and is written to the JSON file at once; what is there already is not measured
again (delete its record to do so). Vectors are synthetic: a mixture of Gaussians around random directions in 384
dimensions, all by seed; a query is its document with noise. They are made once per size in --work and mapped from there.

Phases, each on what the one before left in --work:

    vectors        makes the vectors (no measurement of nearfield)
    no_duplicates  plans one epoch: single-source batches without an item twice; a tenth of the documents has two queries
    kmeans         spherical k-means of the queries, on a sample of 256 a cluster, and the assignment of all
    kmeans_all     the same with all vectors in each of the iterations
    communities    nearest documents by cells, mutual graph, METIS, exact sizes; the recall on 1,000 queries
    graph          the mutual graph alone, from the neighbours that were found
    cut            METIS and the repair alone, from that graph
    plan_kmeans    the whole plan of one epoch of kind kmeans_strata
    plan_communities  the whole plan of one epoch of kind communities

Peak memory is the high-water mark of the resident set of the process (VmHWM). It counts imports and the pages of mapped
files that were read; `before` is the mark when the inputs were open and the modules loaded, before work began.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from frame import Clock, alone, finish, machine, make_parser, peak_bytes, versions, write
from nearfield.files import atomic_path

DIMENSIONS = 384
BLOCK = 1 << 16
PHASES = {
    "vectors": (),
    "no_duplicates": (),
    "kmeans": ("vectors",),
    "kmeans_all": ("vectors",),
    "communities": ("vectors",),
    "graph": ("communities",),
    "cut": ("graph",),
    "plan_kmeans": ("vectors",),
    "plan_communities": ("vectors",),
}
GOALS = {"no_duplicates": 10.0, "kmeans": 600.0, "communities": 900.0}
"""Seconds of wall time at one million examples on two cores."""


def examples(text: str) -> int:
    """``10k`` as 10,000 and ``1M`` as 1,000,000."""
    scale = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    return int(float(text.rstrip("kM")) * scale)


# Data


def rows_of(path: Path, count: int) -> Any:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, DIMENSIONS))


def make_vectors(folder: Path, options: argparse.Namespace) -> None:
    """queries.npy and documents.npy: unit rows; a document is its component's centre plus noise, a query a document plus
    half as much noise. Noise is given by its length relative to the centre's."""
    random = np.random.default_rng(options.seed)
    centres = unit(random.standard_normal((options.components, DIMENSIONS), dtype=np.float32))
    component = random.integers(options.components, size=options.size)
    with atomic_path(folder / "documents.npy") as path, atomic_path(folder / "queries.npy") as other:
        documents, queries = rows_of(path, options.size), rows_of(other, options.size)
        for start in range(0, options.size, BLOCK):
            centre = centres[component[start : start + BLOCK]]
            scale = np.float32(options.noise / np.sqrt(DIMENSIONS))
            block = centre + scale * random.standard_normal(centre.shape, dtype=np.float32)
            documents[start : start + BLOCK] = unit(block)
            block += scale / 2 * random.standard_normal(centre.shape, dtype=np.float32)
            queries[start : start + BLOCK] = unit(block)
        documents.flush(), queries.flush()


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def open_vectors(folder: Path) -> tuple[Any, Any]:
    return np.load(folder / "queries.npy", mmap_mode="r"), np.load(folder / "documents.npy", mmap_mode="r")


def make_source(count: int, seed: int) -> Any:
    """``count`` pairs; queries are items 0 to count - 1, documents above; a tenth of the documents is in two pairs."""
    from nearfield.arrays import Ragged
    from nearfield.batching.streams import SourceExamples

    random = np.random.default_rng(seed)
    documents = np.arange(count, dtype=np.int64)
    again = random.permutation(count)
    documents[again[: count // 10]] = documents[again[count // 10 : 2 * (count // 10)]]
    rows = np.arange(count, dtype=np.int64)
    return SourceExamples(0, "pairs", rows, rows.copy(), Ragged.single(count + documents), Ragged.empty(count))


# Phases: each gives the work and what to say of its result


Work = Callable[[], dict[str, Any]]


def plan_work(config: Any, options: argparse.Namespace, folder: Path) -> Work:
    source = make_source(options.size, options.seed)
    planner = config.build()
    opened = open_vectors(folder) if config.needs_vectors else None

    def vectors(role: str, rows: Any) -> Any:
        """As from a folder of vectors: a copy of the rows that are asked for."""
        assert opened is not None
        return opened[0][rows] if role == "query" else opened[1][rows - options.size]

    def work() -> dict[str, Any]:
        epoch = planner.plan([source], options.seed, 0, vectors=vectors if opened else None)
        items = [epoch.rows.items()]
        batch = np.repeat(epoch.batch_of_rows(), items[0].lengths)
        pairs = batch * np.int64(4 * options.size) + items[0].values
        return {
            "batches": len(epoch),
            "rows": len(epoch.rows.example),
            "batch_size": config.batch_size,
            "dropped": dict(epoch.dropped),
            "items_twice_in_a_batch": int(len(pairs) - len(np.unique(pairs))),
        }

    return work


def no_duplicates(options: argparse.Namespace, folder: Path) -> Work:
    from nearfield.batching import SingleSourceConfig

    return plan_work(SingleSourceConfig(batch_size=256), options, folder)


def plan_kmeans(options: argparse.Namespace, folder: Path) -> Work:
    from nearfield.batching import KMeansStrataConfig

    sample = min(256 * options.clusters, options.size)
    return plan_work(KMeansStrataConfig(batch_size=256, clusters=options.clusters, sample=sample), options, folder)


def plan_communities(options: argparse.Namespace, folder: Path) -> Work:
    from nearfield.batching import CommunitiesConfig

    return plan_work(CommunitiesConfig(batch_size=256, search="ivf"), options, folder)


def kmeans(options: argparse.Namespace, folder: Path, *, sample: int | None = 256) -> Work:
    from nearfield.mining.approximate import spherical_kmeans

    queries, _ = open_vectors(folder)
    clusters = min(options.clusters, options.size // 50)

    def work() -> dict[str, Any]:
        seen = None if sample is None else sample * clusters
        found = spherical_kmeans(queries, clusters, seed=options.seed, sample=seen)
        falls = np.diff(found.objective)
        return {
            "clusters_made": clusters,
            "sample": seen if seen is not None and seen < options.size else options.size,
            "assignments": len(found.objective),
            "objective": [float(found.objective[0]), float(found.objective[-1])],
            "largest_fall": float(max(0.0, -falls.min())) if len(falls) else 0.0,
            "sizes": [int(value) for value in np.quantile(found.sizes, [0, 0.5, 1])],
        }

    return work


def kmeans_all(options: argparse.Namespace, folder: Path) -> Work:
    return kmeans(options, folder, sample=None)


def communities(options: argparse.Namespace, folder: Path) -> Work:
    from nearfield.batching.groups import find_communities

    queries, documents = open_vectors(folder)

    def work() -> dict[str, Any]:
        found = find_communities(
            queries,
            documents,
            size=options.community_size,
            window=(options.rank_from, options.rank_to),
            seed=options.seed,
            method=options.method,
        )
        with atomic_path(folder / "neighbours.npy") as path, path.open("wb") as file:
            np.save(file, found.neighbours)
        placed = np.sort(np.concatenate([found.groups.ravel(), found.left]))
        return {
            "recall_at_30": found.recall,
            "recall_at_rank_to": found.recall_all,
            "seconds_by_phase": {name: round(value, 2) for name, value in found.seconds.items()},
            "groups": len(found.groups),
            "window": [options.rank_from, options.rank_to],
            "left": len(found.left),
            "edges": found.edges,
            "cut": found.cut,
            "isolated": found.isolated,
            "moved": found.moved,
            "each_example_once": bool(np.array_equal(placed, np.arange(options.size))),
        }

    return work


def graph(options: argparse.Namespace, folder: Path) -> Work:
    from nearfield.batching.groups import mutual_edges

    neighbours = np.load(folder / "neighbours.npy")

    def work() -> dict[str, Any]:
        made = mutual_edges(neighbours)
        for name in ("indptr", "indices"):
            with atomic_path(folder / f"graph-{name}.npy") as path, path.open("wb") as file:
                np.save(file, getattr(made, name))
        return {"edges": int(made.nnz) // 2}

    return work


def cut(options: argparse.Namespace, folder: Path) -> Work:
    import pymetis  # noqa: F401
    from scipy.sparse import csr_array

    from nearfield.batching.groups import cut_edges, partition

    ends, indices = (np.load(folder / f"graph-{name}.npy") for name in ("indptr", "indices"))
    made = csr_array((np.ones(len(indices), np.int8), indices, ends), shape=(options.size, options.size))

    def work() -> dict[str, Any]:
        part = partition(made, options.community_size, options.seed)
        return {
            "groups": len(part.groups),
            "edges": int(made.nnz) // 2,
            "cut": cut_edges(made, part.groups) / max(1, made.nnz // 2),
            "isolated": part.isolated,
            "moved": part.moved,
        }

    return work


WORK: dict[str, Callable[[argparse.Namespace, Path], Work]] = {
    "no_duplicates": no_duplicates,
    "kmeans": kmeans,
    "kmeans_all": kmeans_all,
    "communities": communities,
    "graph": graph,
    "cut": cut,
    "plan_kmeans": plan_kmeans,
    "plan_communities": plan_communities,
}


def measure(phase: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do one phase in this process; its record."""
    if phase == "vectors":
        make_vectors(folder, options)
        return {"bytes": sum(file.stat().st_size for file in folder.glob("*.npy"))}
    import faiss  # noqa: F401
    import torch  # noqa: F401

    work = WORK[phase](options, folder)
    before = peak_bytes()
    load = os.getloadavg()
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    with Clock() as clock:
        result = work()
    return {
        "wall_s": round(clock.wall, 2),
        "cpu_s": round(clock.cpu, 2),
        "system_s": round(resource.getrusage(resource.RUSAGE_SELF).ru_stime - system, 2),
        "peak_bytes": peak_bytes(),
        "before_bytes": before,
        "load_before": [round(value, 2) for value in load],
        "load_after": [round(value, 2) for value in os.getloadavg()],
        **result,
    }


# The parent


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The phases asked for and those that they need, in order, for each size."""
    for size in options.sizes:
        needed = set(options.phases)
        for phase in reversed(PHASES):
            if phase in needed:
                needed |= set(PHASES[phase])
        yield from ((phase, size) for phase in PHASES if phase in needed)


def left_behind(phase: str, folder: Path) -> bool:
    """Whether the files that later phases need of this one are there."""
    files = {
        "vectors": ("queries.npy", "documents.npy"),
        "communities": ("neighbours.npy",),
        "graph": ("graph-indptr.npy", "graph-indices.npy"),
    }
    return all((folder / name).is_file() for name in files.get(phase, ()))


def run(options: argparse.Namespace) -> int:
    settings = {
        name: getattr(options, name)
        for name in ("noise", "seed", "clusters", "community_size", "rank_from", "rank_to", "method")
    }
    records: list[dict[str, Any]] = []
    if options.json.is_file():
        records = json.loads(options.json.read_text())["records"]
    for phase, size in wanted(options):
        components = options.components or max(1, size // options.per_component)
        key = {"phase": phase, "size": size, "components": components, **settings}
        if phase == "no_duplicates":
            key = {"phase": phase, "size": size, "seed": options.seed}
        folder = options.work / f"{size}-{components}-{options.noise:g}-{options.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        known = any(all(record.get(name) == value for name, value in key.items()) for record in records)
        if (known or phase == "vectors") and left_behind(phase, folder):
            continue
        if known and phase not in options.phases:
            continue
        print(f"{size:,} examples: {phase} ...", file=sys.stderr, flush=True)
        asked = argparse.Namespace(**{**vars(options), "size": size, "components": components})
        try:
            measured = alone(measure, phase, asked, folder)
        except ChildProcessError as ended:
            print(f"{phase} at {size:,}: {ended}", file=sys.stderr)
            return 1
        if phase == "vectors":
            continue
        record = {
            **key,
            **measured,
            "command": f"python scripts/bench_scale.py --sizes {size} --components {components} --phases {phase}",
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "niceness": os.nice(0),
            "machine": machine(),
            "versions": versions("numpy", "scipy", "torch", "pymetis", "faiss-cpu"),
        }
        records = [other for other in records if any(other.get(name) != value for name, value in key.items())]
        records.append(record)
        write(options.json, {"dimensions": DIMENSIONS, "records": records})
        print(
            f"  {record['wall_s']} s, {record['cpu_s']} CPU s, peak {record['peak_bytes'] / 2**30:.2f} GiB",
            file=sys.stderr,
        )
    show(records)
    return finish({"dimensions": DIMENSIONS, "records": records}, wrong_in(records), options.json)


def show(records: list[dict[str, Any]]) -> None:
    print(f"{'phase':18} {'examples':>10} {'components':>10} {'wall s':>9} {'CPU s':>9} {'peak GiB':>9} {'before':>7}")
    for record in sorted(records, key=lambda r: (list(PHASES).index(r["phase"]), r["size"], r.get("components", 0))):
        print(
            f"{record['phase']:18} {record['size']:>10,} {record.get('components', ''):>10} {record['wall_s']:>9.1f} "
            f"{record['cpu_s']:>9.1f} {record['peak_bytes'] / 2**30:>9.2f} {record['before_bytes'] / 2**30:>7.2f}"
        )


def wrong_in(records: list[dict[str, Any]]) -> list[str]:
    """The results that are wrong; that a goal was missed is only printed: the machine may be busy."""
    wrong = []
    for record in records:
        name = f"{record['phase']} at {record['size']:,}"
        if record.get("items_twice_in_a_batch") or record.get("each_example_once") is False:
            wrong.append(f"{name}: an item twice in a batch, or an example not placed once")
        if record["size"] == 1_000_000:
            goal = GOALS.get(record["phase"])
            if goal is not None and record["wall_s"] > goal:
                print(f"goal missed: {name}: {record['wall_s']} s, wanted {goal:g}; load {record['load_before'][0]}")
            if record["peak_bytes"] > 8 * 10**9:
                print(f"goal missed: {name}: {record['peak_bytes'] / 1e9:.2f} GB, wanted 8")
            if record.get("recall_at_30") is not None and record["recall_at_30"] < 0.9:
                print(f"goal missed: {name}: recall@30 {record['recall_at_30']:.3f}, wanted 0.9")
    return wrong


def main() -> int:
    parser = make_parser(__doc__, pairs=None)
    parser.set_defaults(json=Path("results/scale/scale.json"))
    parser.add_argument("--sizes", type=examples, nargs="+", default=[10_000, 100_000], metavar="N")
    parser.add_argument(
        "--phases", nargs="+", choices=[name for name in PHASES if name != "vectors"],
        default=["no_duplicates", "kmeans", "communities", "graph", "cut"],
    )  # fmt: skip
    parser.add_argument(
        "--components", type=int, default=20_000, help="Gaussians of the mixture; 0: by --per-component"
    )
    parser.add_argument("--per-component", type=int, default=50, help="examples a Gaussian, with --components 0")
    parser.add_argument("--noise", type=float, default=0.6, help="length of the noise, the centre's being 1")
    parser.add_argument("--clusters", type=int, default=1000, help="of k-means; at most one for 50 examples")
    parser.add_argument("--community-size", type=int, default=32)
    parser.add_argument("--rank-from", type=int, default=30)
    parser.add_argument("--rank-to", type=int, default=130)
    parser.add_argument("--method", choices=["exact", "ivf"], default="ivf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, default=Path("scale-work"), help="folder for vectors and what phases leave"
    )
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
