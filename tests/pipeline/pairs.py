"""A small source of pairs, on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def write_pairs(folder: Path) -> None:
    """``rows.jsonl`` with 40 queries, each with a positive, and ``data.yaml`` that reads them as the source ``pairs``."""
    rows = [{"query": f"word{i} word{i + 1}", "positive": f"word{i} word{i + 2} word{i + 3}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "name": "pairs",
        "task_type": "Retrieval",
        "reader": {"kind": "jsonl", "path": "rows.jsonl"},
        "examples": {"kind": "retrieval", "query": "query", "positives": "positive"},
        "split": {"kind": "all"},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump({"name": "data", "sources": [source]}))
