"""Results folders with made-up scores of queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nearfield.evaluation.results import Record, write_record


def write_result(
    folder: Path, values: list[float], *, task: str = "Made", revision: str = "local-1", **more: Any
) -> Path:
    """Unit files of a retrieval task with the given score for each query."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_meta.json").write_text(
        json.dumps({"name": f"local/{folder.parent.name}", "revision": folder.name})
    )
    record = Record()
    clusters = more.get("clusters", [None] * len(values))
    contents = more.get("contents", [None] * len(values))
    for i, (value, cluster) in enumerate(zip(values, clusters, strict=True)):
        row = (task, "default", "test", "query", f"q{i}", cluster, "ndcg_at_10", value, contents[i])
        for column, cell in zip(record.columns.values(), row, strict=True):
            column.append(cell)
    main = more.get("main", float(np.mean(values)))
    metadata = {
        "task_type": more.get("task_type", "Retrieval"),
        "main_score": "ndcg_at_10",
        "main_scores": {"test": {"default": main}},
        "dataset_revision": revision,
        "notices": more.get("notices", []),
    }
    write_record(folder, task, record, metadata)
    return folder
