"""Batches without duplicates: nearfield's planner beside the samplers of sentence-transformers; A B A B.

    python scripts/bench_plan.py --json plan.json
    python scripts/bench_plan.py --pairs-of-texts 20000

All read the same Hugging Face data set of two text columns and give every batch of an epoch: sentence-transformers'
NO_DUPLICATES and NO_DUPLICATES_HASHED, and nearfield's ``batch_sampler``. Reading and hashing the texts is part of the time
of each, as it is in a training. Time is CPU seconds, of child processes too. Checked: batches of the size asked for,
no text twice in a batch, no row twice in an epoch, and (nearly) all rows. The ratio that counts is that to the hashed
sampler. Of nearfield's planner alone, on rows of a store, the time is measured beside. Leaves with 1 if a check fails,
or the ratio is below --floor.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import datasets
import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from frame import Clock, Pair, Sample, compare, finish, in_turn, make_parser, versions
from nearfield.arrays import Ragged
from nearfield.batching import SingleSourceConfig, batch_sampler
from nearfield.batching.streams import SourceExamples

Batches = list[list[int]]


def make_texts(count: int) -> Dataset:
    """Pairs whose queries are distinct but for 5 %, and whose passages belong to 1.6 queries each in the mean."""
    random = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    queries = [" ".join(row) for row in words[random.integers(0, 5000, size=(count, 8))]]
    again = random.integers(0, count, size=count // 20)
    for place in again.tolist():
        queries[place] = queries[0 if place == 0 else place - 1]
    passages = [" ".join(row) for row in words[random.integers(0, 5000, size=(count, 30))]]
    return Dataset.from_dict(
        {"anchor": queries, "positive": [passages[i] for i in random.integers(0, count, size=count)]}
    )


def peer(hashed: bool) -> Callable[[Dataset, int, int], Iterable[list[int]]]:
    """A sampler of sentence-transformers, with a generator as its trainer gives one."""

    def make(dataset: Dataset, batch: int, seed: int) -> Iterable[list[int]]:
        sampler: Iterable[list[int]] = NoDuplicatesBatchSampler(
            dataset, batch_size=batch, drop_last=True, generator=torch.Generator(), seed=seed, precompute_hashes=hashed
        )
        return sampler

    return make


def ours(dataset: Dataset, batch: int, seed: int) -> Iterable[list[int]]:
    """Nearfield's sampler, as its trainer calls it."""
    factory = batch_sampler(SingleSourceConfig(), world_size=1)
    made: Iterable[list[int]] = factory(dataset, batch, True, seed=seed)
    return made


def measure(make: Callable[[Dataset, int, int], Iterable[list[int]]], *arguments: Any) -> tuple[Sample, Batches]:
    """The seconds of one epoch's batches, and the batches."""
    gc.collect()
    with Clock() as clock:
        batches = list(make(*arguments))
    return {"cpu": clock.cpu, "wall": clock.wall}, batches


def check(batches: Batches, texts: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], batch: int) -> dict[str, Any]:
    """The counts of a set of batches that show whether it keeps the rules; the same for both sides."""
    rows = np.asarray(list(itertools.chain.from_iterable(batches)))
    where = np.repeat(np.arange(len(batches)), [len(one) for one in batches])
    items = np.concatenate([texts[0][rows], texts[1][rows]])
    pairs = np.stack([np.concatenate([where, where]), items])
    return {
        "batches": len(batches),
        "rows": len(rows),
        "other_sizes": sum(len(one) != batch for one in batches),
        "repeated_texts": len(items) - np.unique(pairs, axis=1).shape[1],
        "repeated_rows": len(rows) - len(np.unique(rows)),
    }


def planner_alone(texts: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], batch: int, times: int) -> list[float]:
    """CPU seconds of the planner on rows of items, one a run."""
    count = len(texts[0])
    source = SourceExamples(0, "pairs", np.arange(count), texts[0], Ragged.single(texts[1]), Ragged.empty(count))
    samples = []
    for seed in range(times):
        gc.collect()
        with Clock() as clock:
            SingleSourceConfig(batch_size=batch).build().plan([source], seed, 0)
        samples.append(clock.cpu)
    return samples


def run(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """All sides on one size."""
    dataset = make_texts(count)
    numbers: dict[str, int] = {}
    codes = [
        np.array([numbers.setdefault(text, len(numbers)) for text in dataset[name]]) for name in ("anchor", "positive")
    ]
    texts = (codes[0], codes[1])
    full = count // options.batch
    result: dict[str, Any] = {"pairs_of_texts": count, "batch": options.batch, "full_batches": full}
    failures: list[str] = []
    checks: dict[str, dict[str, Any]] = {}

    def once(name: str, make: Callable[[Dataset, int, int], Iterable[list[int]]], seed: int) -> Sample:
        sample, batches = measure(make, dataset, options.batch, seed)
        checks[name] = made = check(batches, texts, options.batch)
        print(
            f"  {name:10} {sample['cpu']:7.2f} CPU s {sample['wall']:7.2f} s, {made['batches']:,} batches, {made['rows']:,} rows",
            flush=True,
        )
        if made["other_sizes"] or made["repeated_texts"] or made["repeated_rows"] or full - made["batches"] > 1:
            failures.append(f"{name}: {made}")
        return sample

    print(f"{count:,} pairs, batches of {options.batch}")
    sides = {
        "nearfield": lambda seed: once("nearfield", ours, seed),
        "hashed": lambda seed: once("hashed", peer(True), seed),
    }
    pairs: list[Pair] = list(in_turn(sides, options.pairs))
    samples = {name: [pair[name] for pair in pairs] for name in sides}
    samples["plain"] = [once("plain", peer(False), seed) for seed in range(options.plain)]
    result |= {
        **compare(pairs, "cpu", unit="CPU seconds an epoch's batches, texts read and hashed"),
        "planner_alone": statistics.median(planner_alone(texts, options.batch, options.pairs)),
        "checks": checks,
        "failures": failures,
        "samples": samples,
    }
    if samples["plain"]:
        result["plain"] = statistics.median(sample["cpu"] for sample in samples["plain"])
        result["ratio_to_plain"] = result["plain"] / result["ours"]
    return result


def main() -> int:
    """Measure, print, write; 1 where a check fails."""
    parser = make_parser(__doc__, floor=3.0)
    parser.add_argument("--pairs-of-texts", type=int, action="append", help="sizes; 200,000 and 1,000,000 by default")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--plain", type=int, default=1, help="how often the sampler without hashes is run")
    options = parser.parse_args()
    if options.pairs < 5:
        parser.error("--pairs must be at least 5")
    datasets.disable_progress_bars()
    logging.getLogger("nearfield").setLevel(logging.WARNING)
    # Imports and compilation at a first call count for neither side.
    warm = make_texts(2000)
    for make in (ours, peer(True), peer(False)):
        list(make(warm, 16, 0))
    results = [run(count, options) for count in options.pairs_of_texts or [200_000, 1_000_000]]
    for one in results:
        print(
            f"{one['pairs_of_texts']:>9,} pairs: nearfield {one['ours']:.2f} CPU s (planner alone {one['planner_alone']:.2f}), "
            f"hashed {one['peer']:.2f}, ratio {one['ratio']:.1f} ({one['spread'][0]:.1f} to {one['spread'][1]:.1f})"
            + (f"; plain {one['plain']:.2f}, ratio {one['ratio_to_plain']:.1f}" if "plain" in one else "")
        )
    first = results[0]
    failed = [failure for one in results for failure in one["failures"]]
    if first["ratio"] < options.floor:
        failed.append(f"the ratio {first['ratio']:.2f} is below {options.floor}")
    sides = {
        "sides": first["checks"], "tokens": None, "dropout": None, "threads": torch.get_num_threads(), "failures": failed,
    }  # fmt: skip
    report = {
        **{name: first[name] for name in ("ratio", "interval", "spread", "pairs", "ours", "peer", "unit")},
        "checks": sides,
        "samples": first["samples"],
        "sizes": results,
        "versions": versions("numpy", "pyarrow", "datasets", "torch", "sentence-transformers"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "processor": platform.machine()},
    }
    return finish(report, failed, options.json)


if __name__ == "__main__":
    sys.exit(main())
