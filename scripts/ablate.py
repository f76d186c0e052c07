"""Runs a study: arms that differ in a few settings, each trained with several paired seeds and scored on held-out queries.

    OMP_NUM_THREADS=1 python scripts/ablate.py results/ablations/batches.yaml --work /var/tmp/batches --processes 2
    python scripts/ablate.py results/ablations/batches.yaml --report      # the tables again, from the records

A study is a YAML file: the sets, the settings that all arms share, the arms, and which are compared. Its records go to a JSON
file beside it, a record a run, written when the run is done: what is there is not run again, so the script can be stopped at any
time. From the records it makes the tables (the same name, ``.md``).

A seed draws its own training examples and its own test queries, and is the seed of the training; arms with the same set and
seed share all three. So differences between arms are paired by seed, and the t interval over seeds speaks of other data of
the same kind, other orders and other dropout at once. ``detects`` is the true difference that such a paired t-test of
this many seeds finds in 80 % of studies (two-sided, 5 %), by the spread of the differences that was found.

The model is the first layers of all-MiniLM-L6-v2, or of the ``model`` that the study names, which is cheap enough for many
runs; the teacher of mining and of planners is the whole all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nearfield.files import atomic_path, write_json, write_text

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGES = ("nearfield", "torch", "transformers", "sentence-transformers", "mteb")


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    set: str
    settings: dict[str, Any]
    """Over those of the study."""


class Study:
    """A study's file, and the records beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = yaml.safe_load(path.read_text())
        self.arms = [
            Arm(arm["name"], name, arm.get("settings") or {})
            for name, group in self.content["sets"].items()
            for arm in group["arms"]
        ]
        names = [(arm.set, arm.name) for arm in self.arms]
        if len(set(names)) < len(names):
            raise SystemExit(f"{path}: an arm stands twice")

    @property
    def seeds(self) -> list[int]:
        return list(self.content["seeds"])

    @cached_property
    def records(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        """The runs that are done, by set, arm and seed."""
        path = self.path.with_suffix(".json")
        if not path.is_file():
            return {}
        return {(r["set"], r["arm"], r["seed"]): r for r in json.loads(path.read_text())["records"]}

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, at once on disk."""
        self.records[record["set"], record["arm"], record["seed"]] = record
        order = [(arm.set, arm.name, seed) for arm in self.arms for seed in self.seeds]
        order += [key for key in self.records if key not in order]
        kept = [self.records[key] for key in order if key in self.records]
        about = {"machine": f"{os.cpu_count()} x {platform.machine()}", "versions": {p: version(p) for p in PACKAGES}}
        write_json(self.path.with_suffix(".json"), {**about, "records": kept})

    def by_seed(self, set_name: str, arm: str, what: str = "score") -> dict[int, float]:
        """A figure of an arm for each seed that is done."""
        return {seed: r[what] for (s, a, seed), r in self.records.items() if (s, a) == (set_name, arm) and what in r}


# Data and model, drawn and cut by seed


def cut_model(folder: Path, name: str, layers: int) -> Path:
    """The first layers of a model as a model of its own."""
    path = folder / f"{name.rpartition('/')[2]}-{layers}-layers"
    if not path.is_dir():
        from nearfield.encoders.load import load_encoder, save_encoder
        from nearfield.encoders.transformer import keep_layers

        model = load_encoder(name, device="cpu").model
        keep_layers(model, layers)
        with atomic_path(path) as aside:
            save_encoder(model, aside)
    return path


def draw_rows(store: Any, source: str, split: str, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Examples of a split, drawn without replacement, as rows of a JSONL file."""
    chosen = np.sort(rng.permutation(store.select(source, split))[:count])
    rows = store.examples.take(chosen).to_pylist()
    return [
        {
            "query": store.texts([row["query"]])[0],
            "positives": store.texts(row["positives"]),
            "negatives": [],
            "cluster": row["cluster"],
            "split": split,
        }
        for row in rows
    ]


def give_negatives(rows: list[dict[str, Any]], false: float, rng: np.random.Generator, count: int = 2) -> None:
    """Explicit negatives for each row: positives of other rows or, each with the chance ``false``, its own less a word.

    The latter are false negatives that the data do not know of: other texts with the same meaning.
    """
    for place, row in enumerate(rows):
        for _ in range(count):
            words = row["positives"][0].split()
            other = (place + int(rng.integers(1, len(rows)))) % len(rows)
            negative = rows[other]["positives"][0]
            if rng.random() < false and len(words) > 1:
                del words[int(rng.integers(len(words)))]
                negative = " ".join(words)
            row["negatives"].append(negative)


def draw_set(study: Study, name: str, seed: int, work: Path) -> Path:
    """The data of a set for a seed: a data recipe, a suite, and a JSONL file for each source."""
    from nearfield.api import build_data
    from nearfield.provenance import generator

    folder = work / "data" / f"{name}-{seed}"
    if folder.is_dir():
        return folder
    common, group = study.content, study.content["sets"][name]
    sources, tasks = [], []
    with atomic_path(folder) as aside:
        aside.mkdir(parents=True)
        for label, origin in group["sources"].items():
            recipe, source = origin["data"], origin["source"]
            store = build_data(study.path.parent / recipe, cache=work / "runs" / ".cache")
            rng = generator(seed, "ablation", label)
            rows = draw_rows(store, source, "train", origin["examples"] + common["distractors"], rng)
            # The last rows lend their documents to the test's corpus and are not trained on.
            order = rng.permutation(len(rows))
            for place in order[origin["examples"] :]:
                rows[place]["split"] = "distractor"
            if "false_negatives" in group:
                give_negatives(rows, group["false_negatives"], generator(seed, "ablation", label, "noise"))
            rows += draw_rows(store, source, "test", origin["queries"], rng)
            with (aside / f"{label}.jsonl").open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            sources.append(
                {
                    "name": label,
                    "task_type": "Retrieval",
                    "reader": {"kind": "jsonl", "path": f"{label}.jsonl"},
                    "examples": {
                        "kind": "retrieval",
                        "query": "query",
                        "positives": "positives",
                        "negatives": "negatives",
                    },
                    "cluster": "cluster",
                    "split": {"kind": "column", "column": "split"},
                }
            )
            task = {"kind": "heldout", "name": label, "data": "data.yaml", "source": label}
            tasks.append({**task, "distractors": common["distractors"]})
        (aside / "data.yaml").write_text(yaml.safe_dump({"name": name, "sources": sources}))
        (aside / "suite.yaml").write_text(yaml.safe_dump({"name": name, "tasks": tasks}))
    return folder


# A run


def merged(*settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, the later over the earlier; a value with a ``kind`` replaces as a whole."""
    result: dict[str, Any] = {}
    for part in settings:
        for key, value in part.items():
            old: Any = result.get(key)
            nested = isinstance(old, dict) and isinstance(value, dict) and "kind" not in value
            result[key] = merged(old, value) if nested else value
    return result


def write_recipe(study: Study, arm: Arm, seed: int, work: Path) -> Path:
    data = draw_set(study, arm.set, seed, work)
    model = cut_model(work, study.content.get("model", MINILM), study.content["layers"])
    own = {
        "name": f"{arm.set}-{arm.name}-{seed}",
        "seed": seed,
        "data": str(data / "data.yaml"),
        "encoder": {"model": str(model), "max_length": study.content["max_length"]},
        "teacher": {"kind": "sentence_transformer", "model": MINILM, "max_length": study.content["max_length"]},
        "evaluation": {"suite": str(data / "suite.yaml"), "baselines": [], "before": False},
    }
    settings = merged(study.content["recipe"], own, arm.settings)
    path = work / "recipes" / f"{own['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(settings, sort_keys=False))
    return path


Job = tuple[str, str, str, int, str]


def prepared(study: Study, pending: list[tuple[Arm, int]], work: Path) -> Iterator[Job]:
    """The runs, each once its stages before the training are done: runs side by side must not make the same artifact."""
    from nearfield.pipeline import open_run, run_stages

    for arm, seed in pending:
        recipe = write_recipe(study, arm, seed, work)
        run_stages(open_run(recipe, (), work / "runs" / recipe.stem), "plan")
        yield str(study.path), arm.set, arm.name, seed, str(work)


def run_arm(study_path: str, set_name: str, arm_name: str, seed: int, work: str) -> dict[str, Any]:
    """Plan, train and score one arm; returns its record."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from nearfield.pipeline import open_run, run_stages

    study, folder = Study(Path(study_path)), Path(work)
    arm = next(arm for arm in study.arms if (arm.set, arm.name) == (set_name, arm_name))
    recipe = write_recipe(study, arm, seed, folder)
    run_folder = folder / "runs" / recipe.stem
    spent: dict[str, float] = {}
    for stage in ("train", "evaluate"):
        began = time.process_time()
        run_stages(open_run(recipe, (), run_folder), stage)
        spent[stage] = round(time.process_time() - began, 1)
    scores, counts = task_scores(run_folder)
    plan = json.loads((run_folder / "plan" / "summary.json").read_text())["epochs"][0]
    negatives = pq.read_table(run_folder / "plan" / "epoch-000.parquet", columns=["negatives"]).column("negatives")
    record: dict[str, Any] = {
        "set": set_name,
        "arm": arm_name,
        "seed": seed,
        "score": sum(scores.values()) / len(scores),
        "scores": scores,
        "queries": counts,
        "steps": plan["batches"],
        "rows": plan["rows"],
        "negatives": pc.sum(pc.list_value_length(negatives)).as_py(),
        "tokens": plan["tokens"],
        "dropped": plan["dropped"],
        "trained": trained_parameters(run_folder),
        "cpu_s": spent,
    }
    record |= plan.get("hardness") or {}
    shutil.rmtree(run_folder)
    return record


def trained_parameters(run_folder: Path) -> int:
    """How many numbers the training changes: those that its checkpoints hold."""
    from safetensors import safe_open

    newest = sorted((run_folder / "checkpoints").glob("step-*"))[-1]
    with safe_open(newest / "model.safetensors", framework="np") as tensors:
        return sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118


def task_scores(run_folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """nDCG@10 of each task, and how many queries it has."""
    import pyarrow.parquet as pq

    from nearfield.evaluation.results import UNITS_SUFFIX

    results = json.loads((run_folder / "manifest.json").read_text())["stages"]["evaluate"]["results"]
    scores: dict[str, float] = {}
    counts: dict[str, int] = {}
    for path in sorted((run_folder / results["after"]).glob(f"*{UNITS_SUFFIX}")):
        values = pq.read_table(path, filters=[("metric", "=", "ndcg_at_10")]).column("value").to_numpy()
        task = path.name.removesuffix(UNITS_SUFFIX)
        scores[task], counts[task] = float(values.mean()), len(values)
    return scores, counts


# The tables of the records


def report(study: Study) -> str:
    """The tables of a study."""
    records = list(study.records.values())
    spent = [sum(r["cpu_s"].values()) for r in records]
    trained = [r["cpu_s"]["train"] for r in records]
    lines = [f"# {study.content['title']}", "", study.content["about"].strip(), ""]
    if records:
        lines += [
            f"{len(records)} runs; CPU seconds a run: median {np.median(spent):.0f}, most {max(spent):.0f}, of them training "
            f"{np.median(trained):.0f} and {max(trained):.0f}. Means over seeds; in brackets 95 % t intervals over paired seeds; p adjusted "
            "by Holm within a table; `detects`: the true difference found in 80 % of such studies.",
            "",
        ]
    for name, group in study.content["sets"].items():
        arms = [arm for arm in study.arms if arm.set == name and study.by_seed(name, arm.name)]
        if not arms:
            continue
        lines += [f"## {group['title']}", "", *arms_table(study, name, arms), ""]
        for family, pairs in (group.get("compare") or {}).items():
            lines += comparisons_table(study, name, family, pairs)
    return "\n".join(lines).rstrip() + "\n"


def arms_table(study: Study, name: str, arms: list[Arm]) -> list[str]:
    tasks = list(study.content["sets"][name]["sources"])
    heads = [
        "arm",
        "seeds",
        "nDCG@10",
        *(tasks if len(tasks) > 1 else []),
        "similarity",
        "false negatives",
        "negatives",
        "rows",
        "steps",
        *(["trained"] if _differ(study, name, "trained") else []),
    ]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for arm in arms:
        runs = [r for (s, a, _), r in study.records.items() if (s, a) == (name, arm.name)]
        cells = [f"`{arm.name}`", str(len(runs)), f"{np.mean([r['score'] for r in runs]):.4f}"]
        if len(tasks) > 1:
            cells += [f"{np.mean([r['scores'][task] for r in runs]):.4f}" for task in tasks]
        for figure, form in (("planned_similarity", ".3f"), ("planned_false_negatives", ".2%")):
            found = [r[figure] for r in runs if figure in r]
            cells.append(format(np.mean(found), form) if found else "")
        cells += [f"{np.mean([r[figure] for r in runs]):,.0f}" for figure in ("negatives", "rows", "steps")]
        if "trained" in heads:
            cells.append(f"{np.mean([r['trained'] for r in runs if 'trained' in r]):,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _differ(study: Study, name: str, figure: str) -> bool:
    """Whether the arms of a set have different values of a figure."""
    return len({r[figure] for (s, _, _), r in study.records.items() if s == name and figure in r}) > 1


def comparisons_table(study: Study, name: str, family: str, pairs: list[list[str]]) -> list[str]:
    from nearfield.evaluation.comparison import SEEDS
    from nearfield.evaluation.statistics import detectable, holm, paired_interval

    found = []
    for ours, other in pairs:
        one, two = study.by_seed(name, ours), study.by_seed(name, other)
        differences = [one[seed] - two[seed] for seed in sorted(set(one) & set(two))]
        if len(differences) >= SEEDS:
            found.append((ours, other, differences, *paired_interval(differences, 0.95)))
    if not found:
        return []
    lines = [f"{family}:", "", "| difference | seeds | nDCG@10 | p | detects |", "| --- | --- | --- | --- | --- |"]
    adjusted = holm([p for *_, p in found])
    for (ours, other, differences, low, high, _), p in zip(found, adjusted, strict=True):
        verdict = "" if p < 0.05 else ", not separable"
        figures = (
            f"{np.mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]{verdict} | {p:.3f} | {detectable(differences):.4f}"
        )
        lines.append(f"| `{ours}` - `{other}` | {len(differences)} | {figures} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ablations"), help="where data, models and runs are kept"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--arms", nargs="*", help="only these arms")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these seeds")
    parser.add_argument("--report", action="store_true", help="only make the tables from the records")
    given = parser.parse_args()
    study = Study(given.study.resolve())
    if not given.report:
        work = given.work.resolve()
        pending = [
            (arm, seed)
            for seed in study.seeds
            for arm in study.arms
            if (not given.sets or arm.set in given.sets)
            and (not given.arms or arm.name in given.arms)
            and (not given.seeds or seed in given.seeds)
            and (arm.set, arm.name, seed) not in study.records
        ]
        jobs = prepared(study, pending, work)
        context = multiprocessing.get_context("spawn")
        with context.Pool(given.processes) as pool:
            began = time.monotonic()
            for place, record in enumerate(pool.imap_unordered(_run_job, jobs), start=1):
                study.add(record)
                left = (time.monotonic() - began) / place * (len(pending) - place) / 60
                print(
                    f"{place} of {len(pending)}: {record['set']} {record['arm']} seed {record['seed']}: {record['score']:.4f}, "
                    f"{record['cpu_s']}; {left:.0f} min left",
                    flush=True,
                )
    write_text(study.path.with_suffix(".md"), report(study))
    print(f"Tables: {study.path.with_suffix('.md')}")


def _run_job(job: Job) -> dict[str, Any]:
    return run_arm(*job)


if __name__ == "__main__":
    main()
