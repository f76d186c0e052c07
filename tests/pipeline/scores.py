"""The scores that a run's evaluation wrote."""

from __future__ import annotations

import json
from pathlib import Path


def score(folder: Path, side: str, task: str) -> float:
    """The main score of one side (``before``, ``after``) of a run in a task with one subset."""
    results = json.loads((folder / "manifest.json").read_text())["stages"]["evaluate"]["results"]
    entries = json.loads((folder / results[side] / f"{task}.json").read_text())["scores"]["test"]
    return float(entries[0]["main_score"])
