"""Kill a small training at random moments with SIGKILL, resume it, and compare the final weights bit for bit.

    python scripts/torture_resume.py --kills 10 --seed 0

Prints a JSON line a kill: the step it fell in, the step that the run resumed from, and whether
weights and metrics equal those of the run that was never killed. Leaves with 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nearfield.files import hash_file
from nearfield.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.models import WORDS, save_tiny_bert  # noqa: E402

STEPS = 400


def write_inputs(folder: Path) -> Path:
    """A tiny BERT with dropout, 2,000 pairs and a recipe of 400 steps with a checkpoint every 20."""
    save_tiny_bert(folder / "model")
    rows = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(2000):
            words = rows.sample(WORDS, 12)
            row = {"q": " ".join(words[: rows.randint(1, 6)]) + f" {number}", "d": " ".join(words) + f" {number}"}
            file.write(json.dumps(row) + "\n")
    (folder / "data.yaml").write_text(
        "name: pairs\nsources:\n  - name: pairs\n    task_type: Retrieval\n    reader: {kind: jsonl, path: pairs.jsonl}\n"
        "    examples: {kind: retrieval, query: q, positives: d}\n    split: {kind: all}\n"
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: torture\ndata: data.yaml\nencoder: {{model: model}}\nbatches: {{batch_size: 32}}\n"
        f"training: {{epochs: 20, max_steps: {STEPS}, checkpoints: {{every_steps: 20}}, trackers: []}}\n"
    )
    return recipe


def command(recipe: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "nearfield", "-q", "train", str(recipe), "--run-folder", str(run), "--until", "train"]


def outcome(run: Path) -> tuple[str, list[dict[str, float]]]:
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]
    return hash_file(run / "model" / "model.safetensors"), lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder = Path(tempfile.mkdtemp(prefix="nearfield-torture-"))
    failures = 0
    try:
        recipe = write_inputs(folder)
        whole = folder / "runs" / "whole"
        subprocess.run(command(recipe, whole), check=True, env=environment)
        expected = outcome(whole)
        for kill in range(arguments.kills):
            run = folder / "runs" / f"kill-{kill}"
            shutil.copytree(whole / "plan", run / "plan")
            process = subprocess.Popen(command(recipe, run), env=environment)
            # A step and a little more: the moment falls anywhere in a step, in a checkpoint's writing too.
            step, more = draw.randint(1, STEPS - 10), draw.uniform(0, 0.1)
            while len(read_metrics(run / "metrics.jsonl")) < step and process.poll() is None:
                time.sleep(0.01)
            time.sleep(more)
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before it could be killed, with code {process.returncode}")
            process.kill()
            process.wait()
            lines = read_metrics(run / "metrics.jsonl")
            subprocess.run(command(recipe, run), check=True, env=environment)
            resumed = json.loads((run / "manifest.json").read_text())["stages"]["train"]["resumed_from"]
            weights, metrics = outcome(run)
            same = {"weights_identical": weights == expected[0], "metrics_identical": metrics == expected[1]}
            failures += not all(same.values())
            figures = {
                "kill": kill,
                "killed_in_step": len(lines) + 1,
                "resumed_from": resumed,
            }
            print(json.dumps({**figures, **same}), flush=True)
            shutil.rmtree(run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"kills": arguments.kills, "seed": arguments.seed, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
