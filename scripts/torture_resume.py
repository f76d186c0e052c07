"""Kill one training again and again with SIGKILL, resume it each time, and compare the outcome bit for bit.

    python scripts/torture_resume.py                                  # ten kills on each of five backends, two ranks
    python scripts/torture_resume.py --backend single --kills 10 --seed 3

A backend's chain is one run: it is killed at a drawn step, resumed, killed again, and so on to its end. A third of the
kills fall inside the writing of a checkpoint, a third hit a single rank (the others must end by themselves), a third hit
all processes at once. Prints a JSON line a kill and one a chain: whether weights and metrics equal those of the run that
was never killed. Leaves with 1 if one differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nearfield.conformance.tiny_models import WORDS, save_tiny_bert
from nearfield.files import hash_file, read_metrics
from nearfield.training.checkpoint import checkpoint_paths

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
KINDS = ("in a checkpoint's writing", "one rank", "all ranks")
STEPS = 220
EVERY = 5


def write_inputs(folder: Path) -> Path:
    """A tiny BERT with dropout, 2,000 pairs and a recipe with many checkpoints and a learnt temperature."""
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
        "name: torture\ndata: data.yaml\nencoder: {model: model}\n"
        "objective: {kind: infonce, learn_temperature: true}\nbatches: {kind: single_source, batch_size: 32}\n"
        f"training: {{epochs: 20, max_steps: {STEPS}, learning_rate: 1.0e-3, micro_batch_tokens: 128, trackers: [], "
        f"checkpoints: {{every_steps: {EVERY}}}}}\n"
    )
    return recipe


def command(backend: str, recipe: Path, run: Path) -> list[str]:
    """The command line of a run: a launcher with two ranks, or one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if backend != "single" else []
    train = ["-m", "nearfield", "-q", "train", str(recipe), f"training.backend={backend}"]
    return [sys.executable, *launcher, *train, "--run-folder", str(run), "--until", "train"]


def outcome(run: Path) -> tuple[str, list[dict[str, float]]]:
    """The hash of the final weights and all figures but the times."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]
    return hash_file(run / "model" / "model.safetensors"), lines


def descendants(process: int) -> list[int]:
    """The processes below a process, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [process]
    while queue:
        for child in parents.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def is_rank(process: int) -> bool:
    """Whether a process is a rank of the training, not a helper of the launcher."""
    try:
        return b"nearfield" in (Path("/proc") / str(process) / "cmdline").read_bytes()
    except OSError:
        return False


def kill(process: subprocess.Popen[bytes], kind: str, draw: random.Random) -> None:
    """Kill a rank, or everything; return when nothing of the run is left."""
    everyone = [process.pid, *descendants(process.pid)]
    ranks = [pid for pid in everyone[1:] if is_rank(pid)] or [process.pid]
    targets = [draw.choice(ranks)] if kind == "one rank" else everyone
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("the other ranks did not end within 60 s") from error
    deadline = time.monotonic() + 60
    while any(is_rank(pid) for pid in everyone):
        if time.monotonic() > deadline:
            raise RuntimeError("a rank is left 60 s after the launcher ended")
        time.sleep(0.1)


def wait_for_moment(process: subprocess.Popen[bytes], run: Path, step: int, kind: str, draw: random.Random) -> None:
    """Wait until ``step`` is done, then a little, or until a checkpoint is being written."""
    more = draw.uniform(0, 0.1)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while len(read_metrics(metrics)) < step and process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"step {step} was not reached within 240 s")
        time.sleep(0.01)
    if kind == KINDS[0]:
        checkpoints = run / "checkpoints"
        while process.poll() is None and not any(path.name.startswith(".step-") for path in checkpoints.iterdir()):
            pass
    else:
        time.sleep(more)
    if process.poll() is not None:
        raise RuntimeError(f"the run ended before it could be killed, with code {process.returncode}")


def torture(backend: str, folder: Path, recipe: Path, kills: int, seed: int) -> bool:
    """A chain of kills on one backend; whether its end is that of the run that was never killed."""
    began = time.monotonic()
    draw = random.Random(f"{seed} {backend}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("DS_ACCELERATOR", "cpu")
    whole, run = folder / "runs" / f"{backend}-whole", folder / "runs" / f"{backend}-killed"
    quiet = {"env": environment, "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    subprocess.run(command(backend, recipe, whole), check=True, **quiet)
    expected = outcome(whole)
    shutil.copytree(whole / "plan", run / "plan")
    for number in range(kills):
        kind = KINDS[number % len(KINDS)] if backend != "single" or number % len(KINDS) != 1 else KINDS[2]
        low, high = STEPS * number // (kills + 1), STEPS * (number + 1) // (kills + 1)
        step = draw.randint(low + 2, high - 1)
        process = subprocess.Popen(command(backend, recipe, run), **quiet)
        wait_for_moment(process, run, step, kind, draw)
        kill(process, kind, draw)
        whole_ones = [path.name for path in checkpoint_paths(run / "checkpoints")]
        torn = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".step-")]
        figures = {
            "backend": backend,
            "kill": number,
            "kind": kind,
            "killed_in_step": len(read_metrics(run / "metrics.jsonl")) + 1,
            "checkpoints": whole_ones,
            "half_written": len(torn),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(json.dumps(figures), flush=True)
    subprocess.run(command(backend, recipe, run), check=True, **quiet)
    weights, metrics = outcome(run)
    same = {"weights_identical": weights == expected[0], "metrics_identical": metrics == expected[1]}
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"backend": backend, "kills": kills, "seed": seed, **same, "seconds": seconds}), flush=True)
    return all(same.values())


def main() -> int:
    """Torture the named backends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=["single", *BACKENDS], help="may be given again")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nearfield-torture-"))
    try:
        recipe = write_inputs(folder)
        results = [
            torture(backend, folder, recipe, arguments.kills, arguments.seed)
            for backend in arguments.backend or BACKENDS
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
