"""The comparison's section: the plot of all differences, and rows that say whether two models can be told apart."""

from __future__ import annotations

import json
from pathlib import Path

from nearfield.reporting.comparison import build_comparison


def write(run: Path, verdicts: list[str]) -> None:
    at = {"subset": "default", "split": "test", "metric": "ndcg_at_10", "units": 100, "clusters": 100, "reason": None}
    scores, differences = [], []
    for number, verdict in enumerate(verdicts):
        task = {"task": f"Task{number}", **at}
        scores += [
            {**task, "model": label, "score": 0.5, "low": 0.4, "high": 0.6} for label in ("before", "after", "bm25")
        ]
        for label in ("after", "bm25"):
            ends = {"low": None, "high": None} if verdict == "not tested" else {"low": -0.01, "high": 0.05}
            row = {"difference": 0.02, "p": 0.1, "p_adjusted": 0.1, "verdict": verdict, "sentence": "Said."}
            differences.append({**task, "model": label, "baseline": "before", **row, **ends})
    value = {"baseline": "before", "settings": {"level": 0.95}, "models": [], "notes": []}
    (run / "comparison.json").write_text(json.dumps({**value, "scores": scores, "differences": differences}))


def test_all_tasks_stand_in_one_plot_with_a_line_at_zero(tmp_path: Path) -> None:
    write(tmp_path, ["better", "not separable", "not tested"])
    made = build_comparison(tmp_path)
    plot = str(made.forest)
    assert "after minus before on each task" in plot and 'class="cursor"' in plot
    assert plot.count("whisker s1") == 1 and plot.count("whisker s4") == 1 and "Task2" not in plot
    tones = [list(task.tables[1].tones) for task in made.tasks]
    assert tones == [["better"] * 2, ["even"] * 2, ["untested"] * 2]


def test_one_task_needs_no_such_plot(tmp_path: Path) -> None:
    write(tmp_path, ["better"])
    assert str(build_comparison(tmp_path).forest) == ""
