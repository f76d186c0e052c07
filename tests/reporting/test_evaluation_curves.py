"""Evaluations during the training in the report."""

from __future__ import annotations

import json
from pathlib import Path

from nearfield.reporting import build_report
from nearfield.reporting.curves import SCORE_CHARTS, build_scores


def write(run: Path, *lines: object) -> None:
    run.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run / "evaluations.jsonl").write_text("\n".join(texts) + "\n")


def at(step: int, **scores: float | None) -> dict[str, object]:
    return {"step": step, "scores": scores, "seconds": 1.0}


def test_a_chart_a_score(tmp_path: Path) -> None:
    write(tmp_path, at(0, mean=0.5, A=0.4, B=0.6), at(10, mean=0.6, A=None, B=0.7), at(20, mean=0.7, A=0.5, B=0.9))
    charts, notes = build_scores(tmp_path)
    assert [chart.caption for chart in charts] == ["Evaluation: mean", "Evaluation: A", "Evaluation: B"]
    values = [chart.values or {} for chart in charts]
    assert [one["x"] for one in values] == [[0, 10, 20]] * 3
    assert values[2]["series"] == [{"label": "score", "y": [0.6, 0.7, 0.9]}]
    assert "from 0.4 to 0.5" in charts[1].svg, "a score that is no number is a gap"
    assert notes == []
    assert len({chart.key for chart in charts}) == 3


def test_the_mean_of_one_task_is_not_drawn_twice(tmp_path: Path) -> None:
    write(tmp_path, at(0, mean=0.5, A=0.5))
    assert [chart.caption for chart in build_scores(tmp_path)[0]] == ["Evaluation: A"]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert build_scores(tmp_path) == ([], [])
    write(tmp_path, at(3, mean=None))
    assert build_scores(tmp_path)[0] == []


def test_many_scores_and_damage(tmp_path: Path) -> None:
    names = {f"task{n}": 0.1 for n in range(9)}
    write(tmp_path, at(0, mean=0.5, **names), "{", [1], {"step": "x"}, {"step": 2, "scores": 3}, at(5, mean=0.6))
    charts, notes = build_scores(tmp_path)
    assert len(charts) == SCORE_CHARTS
    assert notes == [
        "3 lines of evaluations.jsonl cannot be read and are left out.",
        "6 of 10 scores are drawn; all are in evaluations.jsonl.",
    ]


def test_the_page_escapes_and_tells_the_outcome(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, at(0, mean=0.5, **{"<script>alert(1)</script>\u202e": 0.5, "B": 0.1}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    record = {"best": {"step": 1, "score": 0.5}, "checkpoint": "step-00000001", "stopped_early": True}
    (run / "manifest.json").write_text(json.dumps({"stages": {"train": record}}))
    page = build_report(run).path.read_text()
    assert "<script>alert(1)" not in page
    assert "Evaluation: &lt;script&gt;alert(1)&lt;/script&gt;[U+202E]" in page
    assert "The training ended early" in page
    assert "The best evaluation was that after step 1: 0.5000; the model is made of it." in page
