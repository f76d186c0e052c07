"""A chain of kills with SIGKILL on one run of two ranks; minutes, so not part of `make test`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "torture_resume.py"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["single", "ddp", "zero3"])
def test_a_chain_of_kills(backend: str) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "4", "--seed", "1", "--backend", backend]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 5
    assert lines[-1]["weights_identical"] and lines[-1]["metrics_identical"]
