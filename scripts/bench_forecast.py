"""How near a dry run's forecast comes to what training takes: memory and time, over ten shapes of model, batch and length.

    OMP_NUM_THREADS=1 python scripts/bench_forecast.py --json forecast.json
    python scripts/bench_forecast.py --only minilm-long --work DIR

Each shape is planned by `nearfield train --dry-run` in one process and trained in another. Compared are, in bytes, the
growth of the training process's resident memory from the moment when the model is in place to its peak (predicted by the
dry run, and read from the kernel at the end), and the seconds of the steps, by the wall clock and of the CPU. Beside it
stands the forecast that the run itself makes at its start from a few chunks. Goals: growth within 15 % and never more
than 5 % under, time within 25 %; leaves with 1 if the growth or the seconds of the CPU miss them (the wall clock of a
shared machine is shown, and judged with --wall).
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from frame import finish, make_parser, run_command
from nearfield.conformance.tiny_models import WORDS, save_tiny_bert

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
FROZEN = "training.freeze=['*.embeddings.*','*.layer.0.*','*.layer.1.*','*.layer.2.*']"
SHAPES: dict[str, tuple[str, tuple[int, int], int, list[str]]] = {
    # name: model, words of a text from and to, batch size, settings
    "tiny-kept": ("tiny", (3, 40), 128, []),
    "tiny-cached": ("tiny", (3, 40), 256, ["training.gradient_cache=always"]),
    "minilm-short": (MINILM, (5, 30), 16, []),
    "minilm-no-dropout": (MINILM, (5, 30), 32, ["training.dropout=false"]),
    "minilm-long": (MINILM, (60, 200), 4, ["training.max_length=256"]),
    "minilm-cached": (MINILM, (5, 30), 32, ["training.gradient_cache=always"]),
    "minilm-sgd": (MINILM, (5, 30), 16, ["training.optimizer={kind: sgd}"]),
    "minilm-frozen": (MINILM, (5, 30), 32, [FROZEN]),
    "minilm-lora": (MINILM, (5, 30), 32, ["encoder.adapter={kind: lora}"]),
    "minilm-recomputed": (MINILM, (60, 200), 4, ["training.max_length=256", "training.gradient_checkpointing=true"]),
    "minilm-checkpoints": (MINILM, (5, 30), 16, ["training.checkpoints.every_steps=3"]),
}


def make_data(folder: Path, words: tuple[int, int], examples: int) -> Path:
    """Pairs of random words of ragged length."""
    folder.mkdir(parents=True)
    rows = random.Random(0)

    def text(number: int) -> str:
        return " ".join(rows.choices(WORDS, k=rows.randint(*words))) + f" {number}"

    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(examples):
            row = {"query": text(number), "positive": text(number), "group": str(number)}
            file.write(json.dumps(row) + "\n")
    recipe = folder / "data.yaml"
    recipe.write_text(
        "name: pairs\nsources:\n  - name: pairs\n    task_type: Retrieval\n    reader: {kind: jsonl, path: pairs.jsonl}\n"
        "    examples: {kind: retrieval, query: query, positives: positive}\n"
        "    split: {kind: hash, fractions: {train: 0.99, test: 0.01}, seed: 0}\n"
    )
    return recipe


def run_shape(name: str, work: Path, steps: int) -> dict[str, Any]:
    """Dry run, then training, each in a process of its own; what was predicted and what came."""
    model, words, size, settings = SHAPES[name]
    folder = work / name
    data = make_data(folder, words, int(size * steps * 1.1) + 8)
    path = str(save_tiny_bert(folder / "tiny")) if model == "tiny" else model
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: {name}\ndata: {data}\nencoder: {{model: {path}}}\nbatches: {{kind: single_source, batch_size: {size}}}\n"
        f"training: {{max_steps: {steps}, device: cpu}}\n"
    )
    command = [sys.executable, "-m", "nearfield", "--quiet", "train", str(recipe), *settings]
    command += ["--run-folder", str(folder / "run")]
    for extra in (["--dry-run"], ["--until", "train"]):
        used = run_command([*command, *extra])
        if used.code:
            raise SystemExit(f"{name} failed:\n{used.output[-4000:]}")
    found = json.loads((folder / "run" / "forecast.json").read_text())
    memory, actual, start = found["memory"], found["actual"], found["at_start"]
    held = memory["base"] + memory["weights"]
    return {
        "shape": name,
        "measured": found["measured"],
        "predicted_growth": memory["peak"] - held,
        "start_growth": start["peak"] - held,
        "actual_growth": actual["peak"] - held,
        "held": held,
        "predicted_seconds": found["seconds"],
        "start_seconds": start["seconds"],
        "actual_seconds": actual["seconds"],
        "predicted_cpu_seconds": found["cpu_seconds"],
        "actual_cpu_seconds": actual["cpu_seconds"],
        "kept_graphs": found["kept_graphs"],
        "memory": memory,
    }


def ratio(row: dict[str, Any], ours: str, actual: str) -> float:
    """Predicted over actual."""
    return float(row[ours]) / max(float(row[actual]), 1e-9)


def main() -> int:
    """Run the shapes and print a line each."""
    parser = make_parser(__doc__, pairs=None)
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), help="these shapes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--work", type=Path, help="keep the runs in this new folder")
    parser.add_argument("--wall", action="store_true", help="judge the wall clock too")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="forecast-"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("predicted / actual     growth  (at start)   CPU s   wall s  (at start)   actual growth, wall s")
    rows = []
    for name in options.only or SHAPES:
        row = run_shape(name, work, options.steps)
        row["growth_ratio"] = ratio(row, "predicted_growth", "actual_growth")
        row["start_growth_ratio"] = ratio(row, "start_growth", "actual_growth")
        row["cpu_ratio"] = ratio(row, "predicted_cpu_seconds", "actual_cpu_seconds")
        row["wall_ratio"] = ratio(row, "predicted_seconds", "actual_seconds")
        row["start_wall_ratio"] = ratio(row, "start_seconds", "actual_seconds")
        rows.append(row)
        print(
            f"{name:20} {row['growth_ratio']:8.2f} {row['start_growth_ratio']:10.2f} {row['cpu_ratio']:9.2f}"
            f" {row['wall_ratio']:8.2f} {row['start_wall_ratio']:10.2f}"
            f"   {row['actual_growth'] / 1e6:8,.0f} MB {row['actual_seconds']:8.1f} s",
            flush=True,
        )
    misses = [row["shape"] for row in rows if not 0.95 <= row["growth_ratio"] <= 1.15]
    late = [row["shape"] for row in rows if not 0.75 <= row["cpu_ratio"] <= 1.25]
    wall = [row["shape"] for row in rows if not 0.75 <= row["wall_ratio"] <= 1.25]
    for what, names in (("growth", misses), ("CPU seconds", late), ("wall seconds", wall)):
        print(f"{what}: {len(rows) - len(names)} of {len(rows)} within the goal", *names)
    print(f"median growth {statistics.median(row['growth_ratio'] for row in rows):.2f}")
    failed = [f"growth of {name}" for name in misses] + [f"CPU seconds of {name}" for name in late]
    failed += [f"wall seconds of {name}" for name in wall if options.wall]
    return finish({"threads": os.environ.get("OMP_NUM_THREADS"), "shapes": rows}, failed, options.json)


if __name__ == "__main__":
    sys.exit(main())
