"""The check of a GPU runs on a CPU at a small size: every part says passed or why it was skipped, and a fault is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
# What needs CUDA or a package that is not among this project's own is skipped by name.
MAY_SKIP = {"flash", "qlora", "eight_bits"}


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--tiny", "--patience", "20", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def whole() -> subprocess.CompletedProcess[str]:
    return check()


def test_every_part_says_what_it_found(whole: subprocess.CompletedProcess[str]) -> None:
    *lines, summary = whole.stdout.splitlines()
    words = {line.split()[1]: line.split()[0] for line in lines}
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert {name for name, word in words.items() if word == "skipped"} <= MAY_SKIP
    assert {name for name, word in words.items() if word == "passed"} >= {"packing", "bf16", "fsdp2", "resume", "run"}
    counts = [list(words.values()).count(word) for word in ("passed", "failed", "skipped")]
    assert summary == "{} passed, {} failed, {} skipped".format(*counts)


def test_a_part_that_passes_says_how_near_it_came(whole: subprocess.CompletedProcess[str]) -> None:
    passed = [line for line in whole.stdout.splitlines() if line.startswith("passed")]
    assert all(re.search(r"\d+ comparisons, the nearest to its limit: .* \(<= ", line) for line in passed), passed


def test_without_a_gpu_nothing_passes() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "packing"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stdout


def test_a_part_that_hangs_is_ended() -> None:
    done = check("dropout", "--patience", "0.0001")
    assert done.returncode == 1
    assert "not finished after" in done.stdout
