"""Memory that runs out on one of two ranks, in launches of their own: both end with exit code 75 and go on when asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nearfield.files import read_metrics
from nearfield.training.checkpoint import checkpoint_paths, open_checkpoint
from tests.patience import PATIENCE

FAULTY = Path(__file__).with_name("faulty_rank.py")


def launch(recipe: Path, run: Path, *more: str, script: list[str]) -> subprocess.CompletedProcess[str]:
    """Two ranks of a training that encodes up to 160 tokens at a time."""
    settings = ["training.micro_batch_tokens=160", "training.gradient_cache=always", "training.max_steps=8"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    command += ["train", str(recipe), *settings, *more, "--run-folder", str(run), "--until", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero1"])
def test_sharded_ranks_stop_and_go_on(toy_recipe: Path, tmp_path: Path, backend: str) -> None:
    run, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    setting = f"training.backend={backend}"
    stopped = launch(toy_recipe, run, setting, script=[str(FAULTY), "1", "6"])
    assert stopped.returncode != 0
    codes = [int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", stopped.stderr)]
    assert codes and set(codes) == {75}, stopped.stderr
    assert "memory ran out in step 6 with 160 tokens at a time" in stopped.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(FAULTY) not in stopped.stderr
    last = open_checkpoint(checkpoint_paths(run / "checkpoints")[-1])
    assert (last.step, last.state["micro_batch_tokens"]) == (4, 80)
    # The fault is still there: without the smaller budget the resumed run would stop again.
    resumed = launch(toy_recipe, run, setting, "--resume", script=[str(FAULTY), "1", "1"])
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "manifest.json").read_text())["stages"]["train"]["resumed_from"] == 4
    healthy = launch(toy_recipe, whole, setting, "training.dropout=false", script=["-m", "nearfield"])
    assert healthy.returncode == 0, healthy.stderr
    assert len(read_metrics(run / "metrics.jsonl")) == len(read_metrics(whole / "metrics.jsonl")) == 8
