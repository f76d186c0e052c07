"""Ranks that have no row of a batch: every objective, gathered and in a ring, against one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.launching import PYTHONPATH, environment


def few_rows(out: Path, ranks: str, rows: str) -> dict[str, str]:
    """Objective -> what differs, of all that does."""
    script = Path(__file__).parent / "ranks_few_rows.py"
    command = [sys.executable, "-W", "ignore", str(script), str(out), ranks, rows]
    done = subprocess.run(command, env=environment(PYTHONPATH=PYTHONPATH), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(out.read_text())
    assert "siglip" in found and "infonce, ring" in found
    return {name: what for name, what in found.items() if what}


@pytest.mark.slow
def test_two_to_four_ranks_and_up_to_five_rows(tmp_path: Path) -> None:
    assert few_rows(tmp_path / "out.json", "2,3,4", "0,1,2,3,4,5") == {}
