"""Run folders to report on, written as the stages write them, with any texts put in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nearfield.data.items import item_id
from nearfield.data.store import EXAMPLES_SCHEMA, FORMAT_VERSION, ITEMS_SCHEMA
from tests.reporting.analyses import made_analysis

STEPS = 120
QUERIES = 40
Say = Callable[[str], str]
Rank = Callable[[int], int]


def _before(query: int) -> int:
    return (query * 7) % 9


def _after(query: int) -> int:
    return 1 if query % 3 else (query * 5) % 8


def item(text: str) -> bytes:
    """The id of a text, as the store has it."""
    return item_id("text", (("text", text.encode("utf-8", "surrogatepass")),))


def write_items(folder: Path, say: Say, count: int) -> tuple[list[str], list[str]]:
    """A store of pairs: query i has documents i and i + count as positives. Returns queries and documents."""
    queries = [say(f"query {i}").encode("utf-8", "replace").decode() for i in range(count)]
    documents = [
        say(f"a document that explains number {i}").encode("utf-8", "replace").decode() for i in range(2 * count)
    ]
    texts = queries + documents
    with pa.ipc.new_stream(str(folder / "items.arrow"), ITEMS_SCHEMA) as writer:
        columns = [pa.array([item(one) for one in texts], pa.binary(16)), pa.array(texts, pa.large_string())]
        writer.write_batch(pa.record_batch(columns, schema=ITEMS_SCHEMA))
    rows = [
        {
            "source": 0, "query": i, "positives": [count + i, 2 * count + i], "negatives": [], "score": None,
            "label": None, "group": str(i), "cluster": str(i), "split": "test",
        }
        for i in range(count)
    ]  # fmt: skip
    with pa.ipc.new_stream(str(folder / "examples.arrow"), EXAMPLES_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=EXAMPLES_SCHEMA))
    return queries, documents


def write_summaries(folder: Path, say: Say) -> None:
    """The summary of a store: sources, counts, quarantine, conflicts."""
    names = [say("gloss"), say("gloss-similarity")]
    sources = [
        {"name": name, "kind": "retrieval", "task_type": "Retrieval", "prompts": {"query": None, "document": None}}
        for name in names
    ]
    meta = {"format_version": FORMAT_VERSION, "name": say("wordnet"), "fingerprint": "f" * 32, "sources": sources}
    (folder / "store.json").write_text(json.dumps(meta))
    bad = {say("'gloss' is empty"): 3, say("bad JSON"): 2}
    summaries = [
        {
            "name": name, "kind": "retrieval", "task_type": "Retrieval", "rows": 1000, "examples": 990, "duplicates": 5,
            "quarantined": bad if name == names[0] else {}, "splits": {"train": 900, "test": 90}, "groups": 400,
            "clusters": 500,
        }
        for name in names
    ]  # fmt: skip
    conflict = {"kind": "positive and negative", "query": say("bank"), "text": say("the side of a river")}
    summary = {
        "name": say("wordnet"), "fingerprint": "f" * 32, "items": 120, "examples": 1980, "sources": summaries,
        "conflicts": {"positive_and_negative": 4, "examples_changed": 4, "labels": 0, "scores": 0, "first": [conflict]},
        "shared_between_splits": {"test+train": 7},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    excerpt = {"file": say("rows.jsonl"), "line": 17, "reason": say("bad JSON"), "excerpt": say('{"lemma": "ban')}
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(excerpt) + "\n" for _ in range(5)))


def write_metrics(path: Path, steps: int = STEPS) -> None:
    """Curves that look like a training, with a torn last line."""
    lines = []
    for step in range(1, steps + 1):
        noise = math.sin(step * 12.9898) * 0.08
        tokens = 3000 + 40 * (step % 7)
        lines.append(
            json.dumps(
                {
                    "step": step,
                    "epoch": 0,
                    "loss": 1.9 * math.exp(-step / 40) + 0.55 + noise,
                    "learning_rate": 2e-5 * min(step / 12, (steps - step) / (steps - 12)),
                    "gradient_norm": 3.1 + 8 * noise,
                    "rows": 64,
                    "tokens": tokens,
                    "padded_tokens": round(tokens * 1.06),
                    "seconds": 0.9 + noise,
                    "positive_similarity": 0.45 + 0.25 * step / steps + noise / 8,
                    "hardest_negative_similarity": 0.5 - 0.1 * step / steps + noise / 8,
                }
            )
        )
    path.write_text("\n".join(lines) + '\n{"step": 121, "lo')


def write_plan_summary(folder: Path, say: Say) -> None:
    """The summary of a plan of two epochs."""
    epochs = [
        {
            "epoch": epoch, "file": f"epoch-{epoch:03d}.parquet", "hash": "0" * 32, "batches": 60, "rows": 3840, "tokens": 183_000,
            "batches_by_source": {"0": 50, "1": 10}, "dropped": {say("last batch too small"): 21, say("item twice"): 4},
        }
        for epoch in range(2)
    ]  # fmt: skip
    (folder / "summary.json").write_text(
        json.dumps({"kind": "single_source", "batch_size": 64, "steps": 120, "epochs": epochs})
    )


def write_plan(folder: Path) -> None:
    """The plan of the first epoch."""
    draw = np.random.Generator(np.random.PCG64(1))
    rows = 3840
    table = {
        "step": np.arange(rows) // 64, "slot": np.arange(rows, dtype=np.int32) % 64, "example": np.arange(rows),
        "query": np.arange(rows), "positives": [[1]] * rows, "negatives": [[2]] * rows,
        "query_prompt": np.zeros(rows, np.int32), "document_prompt": np.zeros(rows, np.int32),
        "query_tokens": draw.poisson(5, rows).astype(np.int32) + 2, "document_tokens": draw.gamma(4, 9, rows).astype(np.int32) + 3,
        "source": (np.arange(rows) // 64 % 6 == 5).astype(np.int32), "stratum": np.full(rows, -1, np.int32),
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "epoch-000.parquet")


def write_results(folder: Path, task: str, queries: list[str], documents: list[str], good: Rank) -> None:
    """The files beside a result: ``good(i)`` is the rank of query i's first positive, 0 for not found."""
    folder.mkdir(parents=True)
    units, top = [], []
    for i, query in enumerate(queries):
        one = item(query).hex()
        rank = good(i)
        value = 1 / math.log2(rank + 1) if rank else 0.0
        units.append(
            {
                "task": task,
                "subset": "default",
                "split": "test",
                "unit": "query",
                "id": one,
                "cluster": str(i),
                "metric": "ndcg_at_10",
                "value": value,
            }
        )
        others = [documents[(i + k + 1) % len(queries)] for k in range(10)]
        if rank:
            others.insert(rank - 1, documents[i])
        for position, document in enumerate(others[:10], start=1):
            top.append(
                {
                    "task": task, "subset": "default", "split": "test", "query_id": one, "rank": position,
                    "doc_id": item(document).hex(), "score": 0.9 - position / 20,
                }
            )  # fmt: skip
    metadata = {
        "version": 1,
        "task": task,
        "main_score": "ndcg_at_10",
        "details": {"store": "f" * 32},
        "no_interval": {},
    }
    table = pa.Table.from_pylist(units).replace_schema_metadata({b"nearfield": json.dumps(metadata).encode()})
    pq.write_table(table, folder / f"{task}.units.parquet")
    pq.write_table(pa.Table.from_pylist(top), folder / f"{task}.top10.parquet")


def write_comparison(path: Path, task: str, say: Say) -> None:
    """Four models on one task with intervals, and on one without."""
    models = {"before": 0.4312, "after": 0.5127, "bm25": 0.3020, "random": 0.0021}
    at = {"subset": "default", "split": "test"}
    one = {"task": task, **at, "metric": "ndcg_at_10", "units": 1208, "clusters": 540, "reason": None}
    other = {
        "task": say("Topics"),
        **at,
        "metric": "v_measure",
        "units": None,
        "clusters": None,
        "reason": say("no interval"),
    }
    scores = [
        {**one, "model": label, "score": score, "low": score - 0.012, "high": score + 0.011}
        for label, score in models.items()
    ]
    scores += [{**other, "model": label, "score": score, "low": None, "high": None} for label, score in models.items()]
    differences = []
    for label, score in models.items():
        if label != "before":
            found = score - models["before"]
            verdict = "better" if found > 0 else "worse"
            tested = {
                "model": label, "baseline": "before", "difference": found, "low": found - 0.01, "high": found + 0.01, "p": 1e-4,
                "p_adjusted": 3e-4, "verdict": verdict,
                "sentence": say(f"{label} is {verdict} than before on {task}: {found:+.4f} [{found - 0.01:+.4f}, {found + 0.01:+.4f}], p = 0.0001."),
            }  # fmt: skip
            untested = {"low": None, "high": None, "p": None, "p_adjusted": None, "verdict": "not tested"}
            differences += [
                {**one, **tested},
                {**other, **tested, **untested, "sentence": say(f"{label}: not tested (no interval).")},
            ]
    value = {
        "version": 1, "baseline": "before", "settings": {"samples": 10000, "permutations": 10000, "level": 0.95, "seed": 0},
        "models": [{"label": label, "name": say(f"org/{label}"), "revision": "abc", "path": say("results")} for label in models],
        "scores": scores, "differences": differences, "notes": [say("Other: no result of bm25")],
    }  # fmt: skip
    path.write_text(json.dumps(value))


TASK = "WordNetGloss"
FOLDERS = {
    "before": "results/sentence-transformers__all-MiniLM-L6-v2/abc",
    "after": "results/nearfield__example/def",
}


def write_run(folder: Path, say: Say = str, count: int = QUERIES, ranks: tuple[Rank, Rank] = (_before, _after)) -> Path:
    """A whole run folder ``folder/runs/example`` with its store in ``folder/runs/.cache``.

    Every free text goes through ``say``; ``ranks`` are where each query finds its first positive before and after.
    """
    run = folder / "runs" / "example"
    store = store_of(run)
    for one in (run / "plan", store):
        one.mkdir(parents=True)
    queries, documents = write_items(store, say, count)
    write_metrics(run / "metrics.jsonl")
    write_plan(run / "plan")
    for rank, place in zip(ranks, FOLDERS.values(), strict=True):
        write_results(run / place, TASK, queries, documents, rank)
    write_names(run, say)
    return run


SUITE = {
    "Retrieval": ["SciFact", "NFCorpus", "ArguAna", "CQADupstackGamingRetrieval"],
    "STS": ["STSBenchmark", "SICK-R", "STSBenchmarkMultilingualSTS"],
    "Classification": ["Banking77Classification", "TweetSentimentExtractionClassification"],
    "Clustering": ["ArXivHierarchicalClusteringP2P"],
}


def write_suite(run: Path) -> None:
    """Ten tasks of four types in place of a run's comparison, with made scores of four models."""
    whole = json.loads((run / "comparison.json").read_text())
    whole |= {"scores": [], "differences": []}
    rng = np.random.default_rng(0)
    for kind, tasks in SUITE.items():
        for task in tasks:
            about = {"task": task, "subset": "default", "split": "test", "metric": "accuracy", "type": kind}
            about |= {"units": 300, "clusters": 250, "reason": None}
            base, learnt = rng.uniform(0.3, 0.7), rng.normal(0.02, 0.03)
            for model, value in {"before": 0.0, "after": learnt, "bm25": -0.1, "random": -0.3}.items():
                ends = {"low": base + value - 0.02, "high": base + value + 0.02}
                whole["scores"].append({**about, "model": model, "score": base + value, **ends})
                if model != "before":
                    verdict = "not separable" if abs(value) < 0.02 else "better" if value > 0 else "worse"
                    row = {
                        "difference": value,
                        "low": value - 0.02,
                        "high": value + 0.02,
                        "p": 0.01,
                        "p_adjusted": 0.04,
                    }
                    sentence = f"{model} and before on {task}: {verdict}."
                    row |= {"model": model, "baseline": "before", "verdict": verdict, "sentence": sentence}
                    whole["differences"].append({**about, **row})
    (run / "comparison.json").write_text(json.dumps(whole))


def store_of(run: Path) -> Path:
    """The folder of a run's store."""
    return run.parent / ".cache" / "data" / ("f" * 32)


def write_names(run: Path, say: Say) -> None:
    """All of a run and its store that is JSON or YAML: recipe, manifest, comparison, summaries, quarantine."""
    store = store_of(run)
    recipe = {
        "name": say("example"), "seed": 0, "data": "../../data_recipes/wordnet.yaml", "split": "train",
        "encoder": {"kind": "sentence_transformer", "model": say("sentence-transformers/all-MiniLM-L6-v2"), "max_length": 128},
        "objective": {"kind": "infonce", "temperature": 0.05}, "batches": {"kind": "single_source", "batch_size": 64},
        "training": {"epochs": 2, "learning_rate": 2e-5, "schedule": {"kind": "cosine", "warmup": 0.1}},
        "prompts": {say("query"): say("search: ")}, "evaluation": {"suite": "suites/wordnet.yaml", "baselines": ["bm25", "random"]},
    }  # fmt: skip
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=False))
    write_comparison(run / "comparison.json", TASK, say)
    (run / "analysis.json").write_text(json.dumps(made_analysis(say)))
    write_plan_summary(run / "plan", say)
    write_summaries(store, say)
    manifest = {
        "name": say("example"), "created": "2026-11-23T19:41:07+00:00", "command": say("nearfield train training/recipes/wordnet.yaml"),
        "recipe": {"path": say("training/recipes/wordnet.yaml"), "overrides": [say("training.epochs=2")]}, "seed": 0,
        "versions": {"python": "3.11.9", "nearfield": "0.1.0", "torch": "2.13.0", "sentence-transformers": "6.2.0", say("numpy"): say("2.4.6")},
        "device": {"machine": "x86_64", "system": "Linux", "cpus": 2, "threads": 2},
        "stages": {
            "data": {"fingerprint": "f" * 32, "path": str(store), "seconds": 8.2, "items": 120, "examples": 1980},
            "plan": {"fingerprint": "b" * 32, "path": str(run / "plan" / "summary.json"), "seconds": 0.7, "steps": 120},
            "train": {
                "fingerprint": "c" * 32, "path": str(run / "model"), "seconds": 108.4, "device": "cpu", "precision": "float32",
                "base_model": [say("sentence-transformers/all-MiniLM-L6-v2"), "abc"],
            },
            "evaluate": {"fingerprint": "d" * 32, "path": str(run / "results"), "seconds": 61.0, "results": FOLDERS},
        },
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))


def hash_of(source: str) -> str:
    """The SHA-256 of a text, in the form of a content security policy."""
    import base64

    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
