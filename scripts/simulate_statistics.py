"""Do the intervals cover what they should, and are the p-values honest? Simulations of the suite's own estimators.

    python scripts/simulate_statistics.py --json results/statistics/simulations.json --table results/statistics/README.md

The per-query scores of retrieval are drawn from those of real models (``results/quickstart``), whose mean is then the
truth; accuracy, Spearman, average precision and F1 of matches come from models with a known truth. All simulations of a
mean share their resamples, which changes no expectation and makes thousands of them one matrix product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import stats

from nearfield.evaluation import statistics
from nearfield.evaluation.scores import (
    AVERAGE_PRECISION,
    CROSSED_MEAN,
    MATCH_F1,
    SPEARMAN,
    CrossedError,
    Estimator,
    TaskScores,
)
from nearfield.evaluation.sharing import Sharing
from nearfield.evaluation.statistics import LINEAR, LOGIT
from nearfield.files import read_json, write_json, write_text
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


# Units that share content


def structures(n: int, rng: Rng) -> dict[str, Sharing]:
    """How ``n`` units may share content so that all hang together."""

    def drawn(each: int, contents: int, power: float = 0.0) -> Sharing:
        weights = 1 / np.arange(1, contents + 1) ** power
        chance = weights / weights.sum()
        return Sharing(tuple(tuple(rng.choice(contents, each, replace=False, p=chance).tolist()) for _ in range(n)))

    few = int(np.ceil((1 + np.sqrt(1 + 8 * n)) / 2))
    pairs = list(combinations(range(few), 2))
    chosen = rng.choice(len(pairs), n, replace=False)
    return {
        "2 of n/2 documents": drawn(2, n // 2),
        "2 of n/5 documents": drawn(2, n // 5),
        "5 of n/2 documents": drawn(5, n // 2),
        "all pairs of few documents (LIMIT)": Sharing(tuple(pairs[i] for i in chosen)),
        "pairs of n sentences": drawn(2, n),
        "pairs of n sentences, popularity 1/rank^0.5": drawn(2, n, 0.5),
        "2 of n/2 documents, popularity 1/rank^0.7": drawn(2, n // 2, 0.7),
        "2 of n/2 documents, popularity 1/rank": drawn(2, n // 2, 1.0),
        "12 clusters": Sharing(tuple((i * 12 // n,) for i in range(n))),
        "8 clusters": Sharing(tuple((i * 8 // n,) for i in range(n))),
    }


def _shared_scores(sharing: Sharing, kind: str, part: float, simulations: int, rng: Rng) -> tuple[Floats, float]:
    """Scores ``[units, simulations]`` of which ``part`` of the variance is that of their contents, and the true mean."""
    n = len(sharing.contents)
    rows = np.repeat(np.arange(n), [len(of) for of in sharing.contents])
    columns = np.concatenate([np.array(of) for of in sharing.contents])
    width, sizes = int(columns.max()) + 1, np.bincount(rows)
    noise = rng.normal(size=(n, simulations))
    if kind == "found":
        effects = rng.normal(size=(width, simulations))
        latent = np.sqrt(part) * effects[columns] + np.sqrt((1 - part) / 2) * (
            noise[rows] + rng.normal(size=(len(rows), simulations))
        )
        return np.add.reduceat(
            latent > 1.0, np.flatnonzero(np.diff(rows, prepend=-1)), axis=0, dtype=np.float64
        ) / sizes[:, None], float(stats.norm.sf(1.0))
    effects = (
        rng.normal(size=(width, simulations)) if kind == "normal" else rng.exponential(size=(width, simulations)) - 1
    )
    summed = np.add.reduceat(effects[columns], np.flatnonzero(np.diff(rows, prepend=-1)), axis=0)
    return np.sqrt(part) * summed / np.sqrt(sizes)[:, None] + np.sqrt(1 - part) * noise, 0.0


def shared(simulations: int, seed: int) -> list[dict[str, Any]]:
    """Coverage and p-values of independent units (as before) and of pairs that share something, by structure."""
    rows = []
    for n in (200, 1000):
        for title, sharing in structures(n, generator(seed, "structure", n)).items():
            count = simulations if n < 1000 else simulations // 4
            for kind, parts in (("normal", (0.0, 0.2, 0.5, 0.9)), ("skewed", (0.2, 0.9)), ("found", (0.2, 0.5, 0.9))):
                for part in parts:
                    rng = generator(seed, "shared", n, title, kind, part)
                    values, truth = _shared_scores(sharing, kind, part, count, rng)
                    means, plain = values.mean(axis=0), values.var(axis=0, ddof=1) / n
                    scale = LOGIT if kind == "found" else LINEAR
                    slope = scale.slope(means)
                    distance = np.abs(scale.to(means) - scale.to(truth)) / slope
                    error = np.sqrt(np.maximum(sharing.variances(values), 1e-300))
                    p_new = 2 * stats.t.sf(distance / error, sharing.effective)
                    p_old = 2 * stats.t.sf(np.abs(means - truth) / np.sqrt(np.maximum(plain, 1e-300)), n - 1)
                    rows.append(
                        {
                            "n": n, "structure": title, "effects": kind, "part": part, "simulations": count,
                            "effective": sharing.effective, "given": sharing.reason is None,
                            "before": shares(p_old), "now": shares(p_new),
                            "width": float(np.median(error / np.sqrt(np.maximum(plain, 1e-300)))),
                        }
                    )  # fmt: skip
            print(f"{title}, n = {n}: {rows[-1]['effective']:.1f} effective", flush=True)
    return rows


def shared_pairs(simulations: int, seed: int) -> list[dict[str, Any]]:
    """The same for Spearman's correlation and average precision of pairs of sentences that occur in other pairs as well."""
    rows = []
    for n in (200, 1000):
        sharing = structures(n, generator(seed, "structure", n))["pairs of n sentences"]
        columns = np.array(sharing.contents)
        for title, estimator in (("Spearman", SPEARMAN), ("average precision", AVERAGE_PRECISION)):
            rng, count = generator(seed, "shared pairs", n, title), simulations if n < 1000 else simulations // 3

            def make(pairs: Floats, rng: Rng, title: str = title) -> tuple[Floats, Floats, Floats]:
                width = int(pairs.max()) + 1
                gold = rng.normal(size=len(pairs)) + 0.8 * rng.normal(size=width)[pairs].sum(axis=1)
                first, second = (
                    gold + rng.normal(size=len(pairs)) + rng.normal(size=width)[pairs].sum(axis=1) for _ in range(2)
                )
                return (gold if title == "Spearman" else (gold > 0.4).astype(np.float64)), first, second

            far = rng.integers(200_000, size=(200_000, 2))
            truth = float(np.mean([estimator.value(*make(far, rng)[:2]) for _ in range(10)]))
            inside, before, p_values = 0, 0, []
            for _ in range(count):
                gold, first, second = make(columns, rng)
                ours, theirs = estimator.influence(gold, first), estimator.influence(gold, second)
                score, scale = estimator.value(gold, first), estimator.scale(first)
                interval = sharing.interval(score, ours, 0.95, scale)
                single = statistics.t_interval(score, float(ours.var(ddof=1)) / n, n - 1, 0.95, scale)
                inside += interval.low <= truth <= interval.high
                before += single.low <= truth <= single.high
                p_values.append(sharing.p(score - estimator.value(gold, second), ours - theirs))
            rows.append(
                {
                    "n": n, "score": title, "simulations": count, "before": before / count, "now": inside / count,
                    "p": shares(np.array(p_values)),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def shared_ranks(simulations: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """Rank sets of eight models on queries that share documents: by resampled queries, and by joint draws."""
    true = np.array([0.60, 0.58, 0.57, 0.55, 0.55, 0.54, 0.50, 0.40])
    best, worst = 1 + (true[None] > true[:, None]).sum(axis=1), (true[None] >= true[:, None]).sum(axis=1)
    rows = []
    for n in (200, 1000):
        sharing = structures(n, generator(seed, "structure", n))["all pairs of few documents (LIMIT)"]
        columns, rng, held = np.array(sharing.contents), generator(seed, "shared ranks", n), np.zeros(2)
        widths = np.zeros(2)
        for _ in range(simulations):
            effects = 0.1 * rng.normal(size=(int(columns.max()) + 1, len(true)))
            values = true + effects[columns].sum(axis=1) + 0.1 * rng.normal(size=(n, len(true)))
            means = values.mean(axis=0)
            drawn = (
                statistics.bootstrap_means(values, np.arange(n), samples, rng),
                sharing.replicates(means, values, samples, rng),
            )
            for i, replicates in enumerate(drawn):
                sets = statistics.rank_sets(means, replicates)
                held[i] += bool(((sets.low <= best) & (sets.high >= worst)).all())
                widths[i] += float((sets.high - sets.low + 1).mean())
        rows.append(
            {"n": n, "before": held[0] / simulations, "now": held[1] / simulations, "ranks": widths[1] / simulations}
        )
        print(rows[-1], flush=True)
    return rows


# Shapes that are hard


def _shapes(n: int, simulations: int, rng: Rng) -> dict[str, tuple[Floats, float]]:
    def ones(share: float) -> Floats:
        return (rng.random((n, simulations)) < share).astype(np.float64)

    ranks = 1 / np.log2(np.arange(2, 8))
    return {
        "97 % zeros": (ones(0.03), 0.03),
        "97 % zeros, else nDCG of one document": (
            ones(0.03) * rng.choice(ranks, (n, simulations)),
            0.03 * ranks.mean(),
        ),
        "95 % ones": (ones(0.95), 0.95),
        "95 % ones, else uniform": (1 - ones(0.05) * rng.random((n, simulations)), 0.975),
        "80 % zeros": (ones(0.2), 0.2),
        "uniform": (rng.random((n, simulations)), 0.5),
    }


def _interval_of(values: Floats, clusters: tuple[str, ...], replicates: Floats) -> statistics.Interval:
    ids = tuple(map(str, range(len(values))))
    of = TaskScores(
        "score", float(values.mean()), "", None, ids=ids, clusters=clusters or (None,) * len(ids), values=values
    )
    return of.interval(replicates, 0.95)


def shapes(simulations: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """Coverage of means of many zeros or ones, by percentiles of resamples (as before) and now."""
    rows = []
    for n in SIZES:
        rng = generator(seed, "shapes", n)
        for title, (values, truth) in _shapes(n, simulations, rng).items():
            replicates = statistics.bootstrap_means(values, np.arange(n), samples, rng)
            found = [_interval_of(values[:, i], (), replicates[:, i]) for i in range(simulations)]
            now = float(np.mean([one.low <= truth + 1e-12 and truth - 1e-12 <= one.high for one in found]))
            rows.append({"n": n, "shape": title, "before": covered(replicates, truth, n - 1.0), "now": now})
        for alike in (0.0, 0.3, 0.8):
            sizes = np.maximum(1, np.round(0.1 * n / np.arange(1, 4 * n))).astype(np.int64)
            sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), n)) + 1]
            numbers = np.repeat(np.arange(len(sizes)), sizes)
            skewed = rng.exponential(size=(len(sizes), simulations)) - 1
            values = np.sqrt(alike) * skewed[numbers] + np.sqrt(1 - alike) * rng.normal(
                size=(len(numbers), simulations)
            )
            replicates = statistics.bootstrap_means(values, numbers, samples, rng)
            names = tuple(map(str, numbers))
            found = [_interval_of(values[:, i], names, replicates[:, i]) for i in range(simulations)]
            now = float(np.mean([one.low <= 0 <= one.high for one in found]))
            title = f"{alike:.0%} of the variance is that of clusters of Zipf's sizes"
            rows.append({"n": n, "shape": title, "before": covered(replicates, 0.0, len(sizes) - 1.0), "now": now})
        print([row for row in rows if row["n"] == n], flush=True)
    return rows


def hard_pairs(simulations: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """Coverage of high correlations with outliers and average precisions near 1: before, now, and where nothing is cautioned."""
    rows = []

    def outliers(n: int, rng: Rng) -> tuple[Floats, Floats]:
        latent = rng.normal(size=n)
        return latent, np.where(rng.random(n) < 0.03, rng.normal(size=n), latent + 0.2 * rng.normal(size=n))

    def labelled(apart: float, share: float) -> Callable[[int, Rng], tuple[Floats, Floats]]:
        def make(n: int, rng: Rng) -> tuple[Floats, Floats]:
            labels = (rng.random(n) < share).astype(np.float64)
            labels[:2] = (1.0, 0.0)
            return labels, apart * labels + rng.normal(size=n)

        return make

    plans: dict[str, tuple[Estimator, Callable[[int, Rng], tuple[Floats, Floats]]]] = {
        "Spearman 0.95 with 3 % outliers": (SPEARMAN, outliers),
        "average precision 0.976": (AVERAGE_PRECISION, labelled(3.0, 0.4)),
        "average precision 0.997": (AVERAGE_PRECISION, labelled(4.0, 0.4)),
        "average precision 0.26, 5 % positives": (AVERAGE_PRECISION, labelled(1.3, 0.05)),
    }
    for n in SIZES:
        for title, (estimator, make) in plans.items():
            rng = generator(seed, "hard", n, title)
            truth = float(np.mean([estimator.value(*make(100_000, rng)) for _ in range(10)]))
            before, now, unmarked = 0, 0, []
            for _ in range(simulations):
                gold, values = make(n, rng)
                replicates = estimator.replicates(gold, values[:, None], np.arange(n), samples, rng)[:, 0]
                plain = statistics.percentile_interval(replicates, 0.95, n - 1.0)
                ids = tuple(map(str, range(n)))
                of = TaskScores(
                    "score", estimator.value(gold, values), "", None, estimator, ids, (None,) * n, values, gold
                )
                interval = of.interval(replicates, 0.95)
                before += plain.low <= truth <= plain.high
                now += interval.low <= truth <= interval.high
                if of.caution is None:
                    unmarked.append(interval.low <= truth <= interval.high)
            rows.append(
                {
                    "n": n, "shape": title, "simulations": simulations, "before": before / simulations,
                    "now": now / simulations, "marked": 1 - len(unmarked) / simulations,
                    "unmarked": float(np.mean(unmarked)) if unmarked else None,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def skewed_differences(simulations: int, permutations: int, seed: int) -> list[dict[str, Any]]:
    """p-values of 0/1 scores against steady ones of the same mean: by sign flips alone (as before) and now."""
    rows = []
    for n in SIZES:
        rng = generator(seed, "skewed", n)
        kinds = {
            f"0/1 ({share:g}) against steady": (rng.random((n, simulations)) < share) - share
            for share in (0.8, 0.9, 0.95, 0.97)
        }
        kinds["exponential"] = rng.exponential(size=(n, simulations)) - 1
        kinds["normal"] = rng.normal(size=(n, simulations))
        for title, values in kinds.items():
            flips = statistics.flip_ps(values.astype(np.float64), permutations, rng)
            now = statistics.sign_flip_ps(values.astype(np.float64), np.arange(n), permutations, rng)
            rows.append({"n": n, "difference": title, "before": shares(flips), "now": shares(now)})
        print([row for row in rows if row["n"] == n], flush=True)
    return rows


def shared_power(simulations: int, seed: int) -> list[dict[str, Any]]:
    """How often a true difference is found on queries that share documents (half of the variance is theirs)."""
    rows = []
    for n in (200, 1000):
        for title in ("2 of n/2 documents", "all pairs of few documents (LIMIT)", "pairs of n sentences"):
            sharing = structures(n, generator(seed, "structure", n))[title]
            values, _ = _shared_scores(sharing, "normal", 0.5, simulations, generator(seed, "shared power", n, title))
            error = np.sqrt(sharing.variances(values))
            for shift in (0.1, 0.2, 0.4):
                p = 2 * stats.t.sf(np.abs(values.mean(axis=0) + shift) / error, sharing.effective)
                rows.append({"n": n, "structure": title, "shift": shift, "power": float((p <= 0.05).mean())})
    return rows


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


def _grid(heads: list[str], rows: list[list[str]], words: int = 1) -> list[str]:
    """A Markdown table whose first columns are words."""
    marks = " --- |" * words + " ---: |" * (len(heads) - words)
    return ["", "| " + " | ".join(heads) + " |", "|" + marks, *("| " + " | ".join(row) + " |" for row in rows)]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def shared_summary(found: dict[str, Any]) -> str:
    """The lowest and highest coverage of each structure, over all effects of its contents, and how often p is at most 0.05."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found["shared"]:
        rows.setdefault((row["structure"], row["n"]), []).append(row)

    def ends(values: list[float], percent: bool = True) -> str:
        low, high = min(values), max(values)
        return f"{100 * low:.1f} to {100 * high:.1f} %" if percent else f"{low:.3f} to {high:.3f}"

    made = []
    for (structure, n), of in rows.items():
        effective = f"{of[0]['effective']:.0f}" + ("" if of[0]["given"] else ": no interval")
        covers = [ends([1 - row[when]["0.05"] for row in of]) for when in ("before", "now")]
        made.append([structure, f"{n:,}", effective, *covers, ends([row["now"]["0.05"] for row in of], percent=False)])
    return "\n".join(
        _grid(["structure", "n", "effective contents", "before", "now", "p <= 0.05 without a difference"], made)[1:]
    )


def shared_tables(found: dict[str, Any]) -> list[str]:
    """Tables of units that share content and of hard shapes, before and now."""
    rows = []
    for row in found["shared"]:
        covers = [_percent(1 - row[when]["0.05"]) for when in ("before", "now")]
        at = [f"{row['now'][alpha]:.3f}" for alpha in map(str, ALPHAS)]
        effective = f"{row['effective']:.0f}" + ("" if row["given"] else ": none given")
        rows.append(
            [
                row["structure"],
                str(row["n"]),
                effective,
                f"{row['effects']}, {100 * row['part']:.0f} %",
                *covers,
                *at,
                f"{row['width']:.2f}",
            ]
        )
    levels = [f"p <= {alpha}" for alpha in ALPHAS]
    heads = ["structure", "n", "effective contents", "effects", "before", "now", *levels, "width"]
    lines = _grid(heads, rows)
    rows = [
        [
            of["score"],
            str(of["n"]),
            _percent(of["before"]),
            _percent(of["now"]),
            *(f"{of['p'][str(a)]:.3f}" for a in ALPHAS),
        ]
        for of in found["shared_pairs"]
    ]
    lines += _grid(["pairs of n sentences", "n", "before", "now", *levels], rows)
    rows = [
        [str(of["n"]), _percent(of["before"]), _percent(of["now"]), f"{of['ranks']:.2f}"]
        for of in found["shared_ranks"]
    ]
    lines += _grid(["rank sets of 8 models (LIMIT), n", "before", "now", "ranks in a set"], rows)
    rows = [[of["structure"], str(of["n"]), f"{of['shift']:g}", f"{of['power']:.3f}"] for of in found["shared_power"]]
    lines += _grid(["power at p <= 0.05", "n", "difference / standard deviation", "found"], rows)
    rows = [[of["shape"], str(of["n"]), _percent(of["before"]), _percent(of["now"])] for of in found["shapes"]]
    lines += _grid(["mean", "n", "before", "now"], rows)
    rows = [
        [of["shape"], str(of["n"]), *(_percent(of[name]) for name in ("before", "now", "marked", "unmarked"))]
        for of in found["hard_pairs"]
    ]
    lines += _grid(["score", "n", "before", "now", "marked", "now, of those not marked"], rows)
    rows = [
        [of["difference"], str(of["n"]), *(f"{of[when][str(a)]:.3f}" for when in ("before", "now") for a in ALPHAS)]
        for of in found["skewed"]
    ]
    heads = ["no difference in the mean", "n", *(f"{when}, {level}" for when in ("before", "now") for level in levels)]
    return lines + _grid(heads, rows)


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


def run_shared(simulations: int, seed: int) -> dict[str, Any]:
    """The simulations of units that share content and of hard shapes."""
    started, few = time.process_time(), max(simulations // 4, 100)
    found = {
        "shared_simulations": simulations,
        "shared": shared(simulations, seed),
        "shared_pairs": shared_pairs(few, seed),
        "shared_ranks": shared_ranks(few, 1000, seed),
        "shared_power": shared_power(simulations, seed),
        "shapes": shapes(few, 1000, seed),
        "hard_pairs": hard_pairs(few, 400, seed),
        "skewed": skewed_differences(few, 999, seed),
    }
    return found | {"shared_cpu_seconds": round(time.process_time() - started)}


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=("all", "independent", "shared"), default="all")
    parser.add_argument("--json", type=Path, help="write all figures here; those of the other part are kept")
    parser.add_argument("--table", type=Path, help="write the tables here, as Markdown")
    arguments = parser.parse_args()
    found = read_json(arguments.json) if arguments.part != "all" and arguments.json and arguments.json.is_file() else {}
    if arguments.part in ("all", "independent"):
        found |= run(arguments.simulations, arguments.seed)
    if arguments.part in ("all", "shared"):
        found |= run_shared(arguments.simulations, arguments.seed)
    tables = table(found) if "coverage" in found else ""
    tables += "\n".join(shared_tables(found)) + "\n" if "shared" in found else ""
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.table:
        write_text(arguments.table, tables)
    print(tables)


if __name__ == "__main__":
    main()
