"""Ten kills with SIGKILL at random moments; minutes, so not part of `make test`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "torture_resume.py"


@pytest.mark.slow
def test_ten_kills() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--kills", "10", "--seed", "1"], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1] == {"kills": 10, "seed": 1, "failures": 0}
    assert all(line["weights_identical"] for line in lines[:-1])
