"""The scale benchmark on a few examples: what it records, and that it measures nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_scale.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads peak memory from /proc"),
]


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--work", str(folder / "work"), "--json", str(folder / "scale.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)


def records(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "scale.json").read_text())["records"]
    return found


def test_each_phase_is_measured_once(tmp_path: Path) -> None:
    settings = ["--sizes", "600", "--components", "12", "--noise", "0.3", "--community-size", "10", "--rank-from", "2"]
    done = bench(tmp_path, *settings, "--rank-to", "40", "--phases", "cut", "no_duplicates", "kmeans", "communities")
    assert done.returncode == 0, done.stderr
    found = {record["phase"]: record for record in records(tmp_path)}
    assert set(found) == {"no_duplicates", "kmeans", "communities", "graph", "cut"}
    for record in found.values():
        assert record["size"] == 600
        assert record["wall_s"] >= 0 and record["cpu_s"] >= 0
        assert record["peak_bytes"] >= record["before_bytes"] > 10**7
    assert found["no_duplicates"]["items_twice_in_a_batch"] == 0
    assert found["communities"]["each_example_once"] is True
    assert found["communities"]["groups"] == 60
    assert found["communities"]["recall_at_30"] > 0.9
    # The parts alone do the same as the whole.
    assert found["graph"]["edges"] == found["cut"]["edges"] == found["communities"]["edges"]
    assert found["kmeans"]["largest_fall"] < 1e-7

    again = bench(tmp_path, *settings, "--rank-to", "40", "--phases", "cut", "no_duplicates", "kmeans", "communities")
    assert again.returncode == 0
    assert again.stderr == ""
    assert records(tmp_path) == list(found.values())
    other = bench(tmp_path, *settings, "--rank-to", "30", "--phases", "communities")
    assert "vectors" not in other.stderr and "communities" in other.stderr
    assert len(records(tmp_path)) == 6
