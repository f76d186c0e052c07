"""Do the intervals cover what they should, and are the p-values honest? Simulations of the suite's own estimators.

    python scripts/simulate_statistics.py --json results/statistics/simulations.json --table results/statistics/README.md

The per-query scores of retrieval are drawn from those of real models (``results/quickstart``), whose mean is then the
truth; accuracy, Spearman, average precision and F1 of matches come from models with a known truth. All simulations of a
mean share their resamples, which changes no expectation and makes thousands of them one matrix product.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nearfield.evaluation import statistics
from nearfield.evaluation.scores import AVERAGE_PRECISION, CROSSED_MEAN, MATCH_F1, SPEARMAN, CrossedError, Estimator
from nearfield.files import write_json, write_text
from nearfield.provenance import generator

ROOT = Path(__file__).parents[1]
SIZES = (50, 200, 1000)
ALPHAS = (0.01, 0.05, 0.1)
METRICS = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "recall@10": "recall_at_10"}
Floats = statistics.Floats
Rng = np.random.Generator


def populations() -> dict[str, Floats]:
    """Metric -> scores of 4,000 WordNet queries, ``[queries, 2]``: all-MiniLM-L6-v2 and the same model after training."""
    folders = [
        ROOT / "results" / "quickstart" / name
        for name in ("sentence-transformers__all-MiniLM-L6-v2", "nearfield__wordnet")
    ]
    tables = [pq.read_table(next(folder.glob("*/WordNetGlossRetrieval.units.parquet"))) for folder in folders]
    found = {}
    for title, metric in METRICS.items():
        columns = []
        for table in tables:
            kept = table.filter(pc.equal(table["metric"], metric)).sort_by("id")
            columns.append(kept["value"].to_numpy())
        found[title] = np.stack(columns, axis=1)
    return found


def covered(replicates: Floats, truth: float, freedom: Floats | float) -> float:
    """The share of simulations ``replicates [samples, simulations]`` whose interval holds the truth."""
    freedoms = np.broadcast_to(np.asarray(freedom, dtype=np.float64), replicates.shape[1])
    inside = 0
    for i in range(replicates.shape[1]):
        interval = statistics.percentile_interval(replicates[:, i], 0.95, float(freedoms[i]))
        inside += int(interval.low <= truth <= interval.high)
    return float(inside / replicates.shape[1])


def mean_coverage(population: Floats, n: int, simulations: int, samples: int, rng: Rng) -> float:
    """Means over queries drawn from a population."""
    values = rng.choice(population, size=(n, simulations))
    replicates = statistics.bootstrap_means(values, np.arange(n), samples, rng)
    return covered(replicates, float(population.mean()), n - 1.0)


def clustered_coverage(n: int, simulations: int, samples: int, rng: Rng) -> float:
    """Means over queries in clusters of one to seven that share half of their variance; the truth is 0.5."""
    sizes = rng.integers(1, 8, size=n)
    clusters = np.repeat(np.arange(n), sizes)
    shared = rng.normal(size=(n, simulations))[clusters]
    values = 0.5 + 0.1 * (shared + rng.normal(size=(len(clusters), simulations)))
    return covered(statistics.bootstrap_means(values, clusters, samples, rng), 0.5, n - 1.0)


def _correct(n: int, simulations: int, rng: Rng, shift: float = 0.0, runs: int = 10) -> Floats:
    """Whether each of ten classifiers gets an item right ``[runs, n, simulations]``: items and samples differ."""
    logit = 0.8 + shift + 1.5 * rng.normal(size=(1, n, simulations)) + 0.2 * rng.normal(size=(runs, 1, simulations))
    logit = logit + 0.8 * rng.normal(size=(runs, n, simulations))
    return (rng.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(np.float64)


def accuracy_coverage(n: int, simulations: int, samples: int, rng: Rng) -> float:
    """Accuracy over new items and new training samples."""
    truth = float(np.mean([_correct(2000, 50, rng).mean() for _ in range(40)]))
    inside, block = 0.0, 250
    for _ in range(0, simulations, block):
        runs = _correct(n, block, rng)
        replicates = CROSSED_MEAN.replicates(np.empty(0), runs, np.arange(n), samples, rng)
        errors = [CrossedError.of(runs[:, :, i], np.arange(n)) for i in range(block)]
        centre = runs.mean(axis=(0, 1))
        replicates = centre + np.array([error.scale for error in errors]) * (replicates - centre)
        inside += covered(replicates, truth, np.array([error.freedom for error in errors])) * block
    return inside / (-(-simulations // block) * block)


def _graded(n: int, rng: Rng) -> tuple[Floats, Floats]:
    latent = rng.normal(size=n)
    return np.clip(np.round(2 * (latent * 1.2 + 2.5)) / 2, 0, 5), 0.8 * latent + 0.6 * rng.normal(size=n)


def _labelled(n: int, rng: Rng) -> tuple[Floats, Floats]:
    labels = (rng.random(n) < 0.4).astype(np.float64)
    return labels, 1.3 * labels + rng.normal(size=n)


def _single(
    make: Callable[[int, Rng], tuple[Floats, Floats]],
    estimator: Estimator,
    n: int,
    simulations: int,
    samples: int,
    rng: Rng,
) -> float:
    truth = float(np.mean([estimator.value(*make(200_000, rng)) for _ in range(10)]))
    inside = 0
    for _ in range(simulations):
        gold, predicted = make(n, rng)
        replicates = estimator.replicates(gold, predicted[:, None], np.arange(n), samples, rng)[:, 0]
        interval = statistics.percentile_interval(replicates, 0.95, n - 1.0)
        inside += interval.low <= truth <= interval.high
    return inside / simulations


def f1_coverage(n: int, simulations: int, samples: int, rng: Rng) -> float:
    """F1 of matches of n noisy pairs of vectors; the truth is the mean score at this n."""
    found, intervals = [], []
    for _ in range(simulations):
        left = rng.normal(size=(n, 16)).astype(np.float32)
        right = left + 0.9 * rng.normal(size=(n, 16)).astype(np.float32)
        match = (left @ right.T - 0.5 * (right**2).sum(axis=1)).argmax(axis=1)[:, None]
        gold = np.arange(n)
        replicates = MATCH_F1.replicates(gold, match, np.arange(n), samples, rng)[:, 0]
        intervals.append(statistics.percentile_interval(replicates, 0.95, n - 1.0))
        found.append(MATCH_F1.value(gold, match[:, 0]))
    truth = float(np.mean(found))
    return float(np.mean([one.low <= truth <= one.high for one in intervals]))


def shares(p_values: Floats) -> dict[str, float]:
    """How many p-values are at most each alpha."""
    return {str(alpha): float((p_values <= alpha).mean()) for alpha in ALPHAS}


def null_p_values(population: Floats, simulations: int, permutations: int, rng: Rng) -> dict[str, Any]:
    """p-values where there is no difference: the two models' scores of each query are exchanged at random."""
    found: dict[str, Any] = {}
    difference = population[:, 1] - population[:, 0]
    for n in SIZES:
        drawn = rng.choice(difference, size=(n, simulations))
        signs = rng.integers(2, size=drawn.shape) * 2 - 1
        p = statistics.sign_flip_ps(drawn * signs, np.arange(n), permutations, rng)
        found[f"nDCG@10, exchangeable, n = {n}"] = shares(p)
        centred = statistics.sign_flip_ps(drawn - difference.mean(), np.arange(n), permutations, rng)
        found[f"nDCG@10, equal means but skewed, n = {n}"] = shares(centred)
    return found


def other_null_p_values(simulations: int, permutations: int, rng: Rng) -> dict[str, Any]:
    """As above for Spearman, average precision, F1 of matches and accuracy, at n = 200."""
    n, clusters = 200, np.arange(200)
    found: dict[str, list[float]] = {"Spearman": [], "average precision": [], "F1 of matches": [], "accuracy (t)": []}
    for _ in range(simulations):
        gold, first = _graded(n, rng)
        noise = rng.normal(size=n) * first.std() * 0.75
        second = first + noise
        swap = rng.random(n) < 0.5
        a, b = statistics.midranks(first), statistics.midranks(second)
        one, other = np.where(swap, b, a), np.where(swap, a, b)
        found["Spearman"].append(SPEARMAN.p(gold, one, other, clusters, permutations, rng))
        labels, scores = _labelled(n, rng)
        other = 1.3 * labels + rng.normal(size=n)
        found["average precision"].append(AVERAGE_PRECISION.p(labels, scores, other, clusters, permutations, rng))
        matches = np.where(rng.random((2, n)) < 0.6, clusters, rng.integers(n, size=(2, n)))
        found["F1 of matches"].append(MATCH_F1.p(clusters, matches[0], matches[1], clusters, permutations, rng))
    for _ in range(-(-simulations // 100)):
        difference = _correct(n, 100, rng) - _correct(n, 100, rng)
        for i in range(100):
            error = CrossedError.of(difference[:, :, i], clusters)
            found["accuracy (t)"].append(error.p(float(difference[:, :, i].mean())))
    return {f"{name}, n = 200": shares(np.array(values)) for name, values in found.items()}


def power(population: Floats, simulations: int, permutations: int, rng: Rng) -> list[dict[str, Any]]:
    """How often a true difference is found at p <= 0.05: a share of the queries gains as training made them gain."""
    difference = population[:, 1] - population[:, 0]
    rows = []
    for share in (0.125, 0.25, 0.5, 1.0):
        for n in (50, 200, 1000, 4000):
            count = min(simulations, 4_000_000 // n)
            drawn = rng.choice(difference, size=(n, count))
            signs = np.where(rng.random(drawn.shape) < share, 1, rng.integers(2, size=drawn.shape) * 2 - 1)
            p = statistics.sign_flip_ps(drawn * signs, np.arange(n), permutations, rng)
            rows.append(
                {
                    "difference": float(share * difference.mean()),
                    "n": n,
                    "power": float((p <= 0.05).mean()),
                    "simulations": count,
                }
            )
    return rows


def equivalence(simulations: int, samples: int, rng: Rng) -> dict[str, float]:
    """How often 'within 0.5 points' is said where the true difference is 0.5 points (an error) and where it is 0."""
    n = 1000
    found = {}
    for title, true in (("0.5 points (an error)", 0.005), ("0", 0.0)):
        values = true + 0.05 * rng.normal(size=(n, simulations))
        replicates = statistics.bootstrap_means(values, np.arange(n), samples, rng)
        p = [statistics.equivalence_p(replicates[:, i], 0.005) for i in range(simulations)]
        found[title] = float((np.array(p) <= 0.05).mean())
    return found


def rank_coverage(simulations: int, samples: int, rng: Rng) -> dict[str, Any]:
    """Eight models, two of them equal: how often all true ranks lie in their sets, and how wide the sets are."""
    true = np.array([0.60, 0.58, 0.57, 0.55, 0.55, 0.54, 0.50, 0.40])
    best, worst = 1 + (true[None] > true[:, None]).sum(axis=1), (true[None] >= true[:, None]).sum(axis=1)
    n, held, width = 200, 0, 0.0
    for _ in range(simulations):
        values = true + 0.15 * rng.normal(size=(n, 1)) + 0.1 * rng.normal(size=(n, len(true)))
        replicates = statistics.bootstrap_means(values, np.arange(n), samples, rng)
        sets = statistics.rank_sets(values.mean(axis=0), replicates)
        held += bool(((sets.low <= best) & (sets.high >= worst)).all())
        width += float((sets.high - sets.low + 1).mean())
    return {
        "all true ranks inside": held / simulations,
        "mean ranks in a set": width / simulations,
        "models": len(true),
        "n": n,
    }


def run(simulations: int, seed: int) -> dict[str, Any]:
    """All simulations."""
    real = populations()
    coverage: dict[str, dict[str, float]] = {}
    started = time.process_time()
    for n in SIZES:
        few = 1000 if n < 1000 else 400
        for title, scores in real.items():
            coverage.setdefault(title, {})[str(n)] = mean_coverage(
                scores[:, 0], n, simulations, 2000, generator(seed, title, n)
            )
        plan: dict[str, Callable[[Rng], float]] = {
            "nDCG@10-like, n clusters": lambda rng, n=n: clustered_coverage(n, min(simulations, 2000), 2000, rng),  # type: ignore[misc]
            "accuracy (10 classifiers)": lambda rng, n=n: accuracy_coverage(n, simulations, 1000, rng),  # type: ignore[misc]
            "Spearman": lambda rng, n=n, few=few: _single(_graded, SPEARMAN, n, simulations, few, rng),  # type: ignore[misc]
            "average precision": lambda rng, n=n, few=few: _single(
                _labelled, AVERAGE_PRECISION, n, simulations, few, rng
            ),  # type: ignore[misc]
            "F1 of matches": lambda rng, n=n: f1_coverage(n, min(simulations, 2000 if n < 1000 else 300), 400, rng),  # type: ignore[misc]
        }
        for title, simulate in plan.items():
            coverage.setdefault(title, {})[str(n)] = simulate(generator(seed, title, n))
            print(
                f"{title}, n = {n}: {coverage[title][str(n)]:.4f} ({time.process_time() - started:.0f} s)", flush=True
            )
    calibration = null_p_values(real["nDCG@10"], simulations, 1999, generator(seed, "null"))
    calibration |= other_null_p_values(min(simulations, 2000), 499, generator(seed, "other null"))
    return {
        "simulations": simulations,
        "seed": seed,
        "coverage": coverage,
        "calibration": calibration,
        "power": power(real["nDCG@10"], simulations, 1999, generator(seed, "power")),
        "equivalence": equivalence(simulations, 2000, generator(seed, "equivalence")),
        "ranks": rank_coverage(min(simulations, 2000), 1000, generator(seed, "ranks")),
        "cpu_seconds": round(time.process_time() - started),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| coverage of the 95 % interval | " + " | ".join(f"n = {n}" for n in SIZES) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    lines += [
        f"| {title} | " + " | ".join(f"{100 * of[str(n)]:.1f} %" for n in SIZES) + " |"
        for title, of in found["coverage"].items()
    ]
    lines += [
        "",
        "| share of p-values where there is no difference | p <= 0.01 | p <= 0.05 | p <= 0.1 |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {title} | " + " | ".join(f"{of[str(alpha)]:.4f}" for alpha in ALPHAS) + " |"
        for title, of in found["calibration"].items()
    ]
    sizes = sorted({row["n"] for row in found["power"]})
    lines += ["", "| power at p <= 0.05, true difference of nDCG@10 | " + " | ".join(f"n = {n}" for n in sizes) + " |"]
    lines += ["| --- |" + " ---: |" * len(sizes)]
    for difference in sorted({row["difference"] for row in found["power"]}):
        of = {row["n"]: row["power"] for row in found["power"] if row["difference"] == difference}
        lines.append(f"| {difference:+.4f} | " + " | ".join(f"{of[n]:.3f}" for n in sizes) + " |")
    lines += [
        "",
        "| said to be equivalent within 0.5 points (n = 1,000, standard deviation 5 points), true difference | share |",
        "| --- | ---: |",
    ]
    lines += [f"| {title} | {share:.3f} |" for title, share in found["equivalence"].items()]
    ranks = found["ranks"]
    lines += [
        "",
        f"Rank confidence sets of {ranks['models']} models on {ranks['n']} queries: all true ranks were inside in "
        f"{100 * ranks['all true ranks inside']:.1f} % of the simulations; a set held {ranks['mean ranks in a set']:.2f} ranks on average.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="write the tables here, as Markdown")
    arguments = parser.parse_args()
    found = run(arguments.simulations, arguments.seed)
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.table:
        write_text(arguments.table, table(found))
    print(json.dumps(found["calibration"], indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
