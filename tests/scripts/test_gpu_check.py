"""The check of a GPU runs on a CPU at a small size: every part says passed or why it was skipped, and a fault is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
# Parts that need CUDA or a package that is not among this project's own are skipped by name.
MAY_SKIP = {"flash", "qlora", "eight_bits"}
CALLS = {
    "whole": ["--tiny", "--patience", "20"],
    "without a GPU": ["packing"],
    "hanging": ["--tiny", "dropout", "--patience", "0.0001"],
}
# The script's imports take ten seconds, and each part is a process of its own in any case: one process makes all calls.
SEVERAL = """
import contextlib, io, json, runpy, sys
script, calls = sys.argv[1], json.loads(sys.argv[2])
sys.argv = [script, "--tiny"]
main = runpy.run_path(script)["main"]
said = {}
for name, arguments in calls.items():
    sys.argv, out = [script, *arguments], io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main()
    said[name] = {"code": code, "out": out.getvalue()}
print(json.dumps(said))
"""
Said = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def said() -> Said:
    """Exit code and standard output of each call."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SEVERAL, str(SCRIPT), json.dumps(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: Said = json.loads(done.stdout)
    found["whole"]["errors"] = done.stderr
    return found


def test_every_part_says_what_it_found(said: Said) -> None:
    whole = said["whole"]
    *lines, summary = whole["out"].splitlines()
    words = {line.split()[1]: line.split()[0] for line in lines}
    assert whole["code"] == 0, whole["out"] + whole["errors"]
    assert {name for name, word in words.items() if word == "skipped"} <= MAY_SKIP
    assert {name for name, word in words.items() if word == "passed"} >= {"packing", "bf16", "fsdp2", "resume", "run"}
    counts = [list(words.values()).count(word) for word in ("passed", "failed", "skipped")]
    assert summary == "{} passed, {} failed, {} skipped".format(*counts)


def test_a_part_that_passes_says_how_near_it_came(said: Said) -> None:
    passed = [line for line in said["whole"]["out"].splitlines() if line.startswith("passed")]
    assert all(re.search(r"\d+ comparisons, the nearest to its limit: .* \(<= ", line) for line in passed), passed


def test_without_a_gpu_nothing_passes(said: Said) -> None:
    assert said["without a GPU"]["code"] == 1
    assert "there is no CUDA device" in said["without a GPU"]["out"]


def test_a_part_that_hangs_is_ended(said: Said) -> None:
    assert said["hanging"]["code"] == 1
    assert "not finished after" in said["hanging"]["out"]
