"""Scoring a model by nearfield beside `mteb.evaluate`: the same tasks, data and model; A B A B.

    python scripts/bench_eval.py --data FOLDER --preset short --json short.json --floor 1.4

FOLDER holds local tasks (docs/evaluation.md). Each measurement is a process of its own, one thread; time is CPU seconds from
the loaded model to the last score, without reading the data. The file is written after each pair, and a second call goes on from
it. Both must give the same scores; those that differ by more than 1e-6 (a decision that the last digit of a vector turns) are
listed, and none may differ by more than 1e-4. Beside the ratio, of all tasks together and of each: the share of our time outside
of the model's forward, the real tokens that went in on either side, the share of the machine's matrix peak, and the CPU seconds from nothing to the first
task. Leaves with 1 if a check fails or the ratio is below --floor.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from frame import Pair, Sample, alone, compare, finish, in_turn, make_parser, ratio_of, write

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


PRESETS = {
    # A mean of 13 to 16 tokens a text; the smallest of each type come first.
    "short": ("STS16", "STSBenchmark", "STS13", "STS12", "Tatoeba", "Banking77Classification"),
    # All tasks of texts that are in the folder.
    "whole": (),
}


def tasks_of(data: Path) -> list[str]:
    """The tasks of a folder that a model of texts can do."""
    from nearfield.evaluation.folder import folder_task, task_folders

    names = [folder.name for folder in task_folders(data, None)]
    return [name for name in names if set(folder_task(data / name).task.metadata.modalities) == {"text"}]


class Counter:
    """CPU seconds, rows, tokens and cells of a model's forwards, padded or packed."""

    def __init__(self, model: Any) -> None:
        self.seconds, self.rows, self.tokens, self.cells = 0.0, 0, 0, 0
        self.pad = model.tokenizer.pad_token_id
        # Padded calls go to the first module, whose transformer they reach past its hooks; packed ones to the transformer.
        model[0].register_forward_pre_hook(lambda _, args: self._before(args[0]))
        model[0].register_forward_hook(self._after)
        model[0].auto_model.register_forward_pre_hook(
            lambda _module, _args, named: self._before(named), with_kwargs=True
        )
        model[0].auto_model.register_forward_hook(self._after)

    def _before(self, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        self.rows += len(named["segments"].lengths) if "segments" in named else int(ids.shape[0])
        self.cells += int(ids.numel())
        self.tokens += int((ids != self.pad).sum())
        self._started = time.process_time()

    def _after(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._started


def measure(side: str, model_name: str, data: Path, tasks: list[str]) -> Sample:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(1)
    from nearfield.cli.app import quiet_libraries

    quiet_libraries()
    import mteb

    from nearfield.encoders import load_encoder
    from nearfield.evaluation import evaluate
    from nearfield.evaluation.folder import folder_task, task_folders

    loaded = load_encoder(model_name, device="cpu")
    # Both sides pay for imports, kernels and the tokenizer before the clock starts.
    loaded.model.encode(["a text", "another and longer text"])
    counter = Counter(loaded.model)
    scores: dict[str, dict[str, float]] = {}
    by_task: dict[str, float] = {}
    first = 0.0
    if side == "peer":
        opened = [folder_task(folder).task for folder in task_folders(data, tasks)]
        for task in opened:
            task.load_data()
        started = time.process_time()
        for task in opened:
            begun = time.process_time()
            result = mteb.evaluate(loaded.model, task, cache=None, co2_tracker=False, show_progress_bar=False)
            by_task[task.metadata.name] = time.process_time() - begun
            entries = [entry for of in result.task_results[0].scores.values() for entry in of]
            scores[task.metadata.name] = {entry["hf_subset"]: float(entry["main_score"]) for entry in entries}
        seconds = time.process_time() - started
    else:
        from nearfield.evaluation import runner

        load = 0.0
        plain = runner._Run._score

        def timed(self: Any, suite_task: Any, mark: str) -> None:
            nonlocal load, first
            begun = time.process_time()
            first = first or begun
            suite_task.task.load_data()
            read = time.process_time()
            load += read - begun
            plain(self, suite_task, mark)
            by_task[suite_task.name] = time.process_time() - read

        runner._Run._score = timed  # type: ignore[method-assign]
        with tempfile.TemporaryDirectory() as out:
            started = time.process_time()
            made = evaluate(loaded, data, Path(out) / "results", tasks=tasks)
            seconds = time.process_time() - started - load
        scores = made.scores
        if made.failures:
            raise SystemExit(f"failed: {made.failures}")
    weights = sum(p.numel() for n, p in loaded.model[0].auto_model.named_parameters() if "embeddings" not in n)
    return {
        "cpu_seconds": seconds,
        "cpu_seconds_of_tasks": by_task,
        "cpu_seconds_to_first_task": first,
        "forward_seconds": counter.seconds,
        "rows": counter.rows,
        "tokens": counter.tokens,
        "cells": counter.cells,
        "flops": 2.0 * weights * counter.tokens,
        "scores": scores,
    }


def matrix_peak() -> float:
    """Floating-point operations a CPU second of a large single-thread product."""
    import torch

    torch.set_num_threads(1)
    a = torch.randn(1024, 1024)
    best = 0.0
    for _ in range(8):
        started = time.process_time()
        a @ a
        best = max(best, 2 * 1024**3 / (time.process_time() - started))
    return best


def summary(samples: list[Pair], tasks: list[str]) -> dict[str, Any]:
    """The figures of some pairs."""
    ours, peer = samples[0]["ours"], samples[0]["peer"]
    pairs = [
        (task, subset, score, peer["scores"][task][subset])
        for task, of in ours["scores"].items()
        for subset, score in of.items()
    ]
    worst = max(abs(mine - theirs) for *_, mine, theirs in pairs)
    same = all(set(ours["scores"][task]) == set(peer["scores"][task]) for task in tasks)
    peak = matrix_peak()
    outside = statistics.median(1 - p["ours"]["forward_seconds"] / p["ours"]["cpu_seconds"] for p in samples)
    return {
        **compare(samples),
        "ratio of tasks": {
            task: statistics.median(
                p["peer"]["cpu_seconds_of_tasks"][task] / p["ours"]["cpu_seconds_of_tasks"][task] for p in samples
            )
            for task in tasks
        },
        "seconds to the first task": statistics.median(p["ours"]["cpu_seconds_to_first_task"] for p in samples),
        "checks": {
            "tasks": tasks,
            "largest score difference": worst,
            "scores that differ": [each for each in pairs if abs(each[2] - each[3]) > 1e-6],
            "scores": len(pairs),
            "same subsets": same,
            "rows": {"ours": ours["rows"], "peer": peer["rows"]},
            "real tokens": {"ours": ours["tokens"], "peer": peer["tokens"]},
            "padded tokens": {"ours": ours["cells"], "peer": peer["cells"]},
            "threads": 1,
        },
        "outside the forward": outside,
        "share of matrix peak": {
            side: statistics.median(p[side]["flops"] / p[side]["cpu_seconds"] for p in samples) / peak
            for side in ("ours", "peer")
        },
        "machine": platform.processor() or platform.machine(),
        "samples": samples,
    }


def main() -> int:
    """Measure, check, write."""
    parser = make_parser(__doc__, floor=0.0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="short", help="tasks by the kind of their texts")
    parser.add_argument("--tasks", help="instead of a preset's")
    parser.add_argument("--model", default=MODEL)
    arguments = parser.parse_args()
    stated = [task.strip() for task in arguments.tasks.split(",")] if arguments.tasks else PRESETS[arguments.preset]
    tasks = list(stated) or tasks_of(arguments.data)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    samples: list[Pair] = []
    if arguments.json and arguments.json.is_file():
        made = json.loads(arguments.json.read_text())
        if made["checks"]["tasks"] != tasks:
            raise SystemExit(f"{arguments.json} is of other tasks: name another file")
        samples = made["samples"]
    sides = {
        side: lambda _, side=side: alone(measure, side, arguments.model, arguments.data, tasks)
        for side in ("ours", "peer")
    }
    for pair in in_turn(sides, arguments.pairs, first=len(samples)):
        samples.append(pair)
        ours, peer = pair["ours"]["cpu_seconds"], pair["peer"]["cpu_seconds"]
        print(f"pair {len(samples)}: ours {ours:.1f} s, mteb {peer:.1f} s", flush=True)
        write(arguments.json, summary(samples, tasks))
    result = summary(samples, tasks)
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=2))
    failed = []
    if result["checks"]["largest score difference"] > 1e-4:
        failed.append("the scores differ")
    if not result["checks"]["same subsets"]:
        failed.append("other subsets were scored")
    if result["ratio"] < arguments.floor:
        failed.append(f"the ratio {ratio_of(samples)} is below {arguments.floor}")
    return finish(result, failed, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
