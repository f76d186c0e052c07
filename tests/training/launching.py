"""Common parts of the tests of launched runs: the environment, the ranks' processes, and waiting for a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nearfield.files import read_metrics
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SGD = ("training.optimizer.kind=sgd", "training.learning_rate=0.1", "training.max_steps=4", "training.dropout=false")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""With which ranks find the tests' own modules."""


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, no hub, and nothing that a launcher around the tests may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path, **more}


def launch(command: list[str], cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, at most five minutes."""
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=PATIENCE)


def train_record(run: Path) -> dict[str, Any]:
    """The training's entry in the manifest."""
    record: dict[str, Any] = json.loads((run / "manifest.json").read_text())["stages"]["train"]
    return record


def rank_processes(launcher: int) -> dict[int, int]:
    """The processes of a launcher's ranks, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
        found.update(dict.fromkeys(ranks, int(child)))
    return found


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    """Return once so many steps are done."""
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"step {steps} was not reached"
        time.sleep(0.05)
