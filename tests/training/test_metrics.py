"""metrics.jsonl, TensorBoard and the progress display."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nearfield.training import metrics
from nearfield.training.metrics import TrainingProgress, read_metrics
from nearfield.training.tracker_configs import TensorBoardConfig
from nearfield.training.trackers import JsonLines, Trackers

FIGURES = ("loss", "learning_rate", "gradient_norm", "positive_similarity", "hardest_negative_similarity")


def line(step: int) -> dict[str, Any]:
    return {"step": step, **{name: step + number / 10 for number, name in enumerate(FIGURES)}, "rows": 4}


def test_lines_are_there_as_soon_as_written(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    log = JsonLines(run / "metrics.jsonl", 0)
    assert not run.exists(), "nothing to say, nothing written"
    for step in (1, 2):
        log.write(line(step))
        assert read_metrics(run / "metrics.jsonl") == [line(s) for s in range(1, step + 1)]
    log.close()
    log.close()
    text = (run / "metrics.jsonl").read_text()
    assert text == json.dumps(line(1)) + "\n" + json.dumps(line(2)) + "\n"
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line(s)) + "\n" for s in range(1, 6)) + '{"step": 6, "lo'
    )
    log = JsonLines(tmp_path / "metrics.jsonl", 3)
    assert [entry["step"] for entry in read_metrics(log.path)] == [1, 2, 3]
    log.write(line(4))
    log.close()
    assert read_metrics(log.path) == [line(s) for s in range(1, 5)]


def test_reading_stops_at_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_figures_and_forgets_what_a_resumed_run_replays(tmp_path: Path) -> None:
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Trackers((TensorBoardConfig(),), tmp_path, first, evaluated=-1, about={}, writes=True) as trackers:
            for step in steps:
                trackers.step(line(step))
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(step) for step in (1, 2, 3, 4)]
    shown = scalars(tmp_path)
    assert set(shown) == {f"train/{name}" for name in FIGURES}
    for number, name in enumerate(FIGURES):
        assert shown[f"train/{name}"] == [(step, pytest.approx(step + number / 10)) for step in (1, 2, 3, 4)]


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trackers((TensorBoardConfig(),), run, 0, evaluated=-1, about={}, writes=False) as trackers:
        trackers.step(line(1))
        trackers.evaluation({"step": 1, "scores": {"mean": 0.5}})
    assert not run.exists()


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time stands still until ``clock.now`` is moved."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_line_every_ten_seconds_where_there_is_no_terminal(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nearfield")
    with TrainingProgress(first_step=4, total_steps=24) as progress:
        for step, now in ((5, 105.0), (6, 109.9), (8, 110.0), (9, 119.0), (12, 120.0)):
            clock.now = now
            progress.update(step, 0.5, 10)
    # 3 batches of 10 in 10 s, 4 of the 20 steps done; then 5 in 20 s, 8 done.
    assert caplog.messages == [
        "Training: step 8 of 24, loss 0.5000, 3.0 examples/s, 40 s left",
        "Training: step 12 of 24, loss 0.5000, 2.5 examples/s, 30 s left",
    ]
    assert {record.name for record in caplog.records} == {"nearfield.training"}


def test_no_time_at_all_is_no_division_by_zero(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nearfield")
    with TrainingProgress(0, 2) as progress:
        progress.update(1, 0.5, 10)
    assert caplog.messages == []


def test_a_bar_on_a_terminal(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nearfield")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(metrics, "stderr_console", lambda: console)
    progress = TrainingProgress(first_step=4, total_steps=24)
    bar = progress._bar
    assert bar is not None
    assert not bar.live.is_started
    with progress as entered:
        assert entered is progress
        assert bar.live.is_started
        assert bar.tasks[0].completed == 4
        clock.now = 110.0
        progress.update(8, 0.25, 30)
        (task,) = bar.tasks
        assert (task.completed, task.total) == (8, 24)
        assert task.description == "Training  loss 0.2500  3.0 examples/s"
        bar.refresh()
    assert not bar.live.is_started
    shown = screen.getvalue()
    assert "Training  loss 0.2500  3.0 examples/s" in shown
    assert " 8/24" in shown
    assert "━" in shown
    assert caplog.messages == []


def test_no_bar_where_nobody_wants_to_know(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="nearfield")
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(metrics, "stderr_console", lambda: console)
    assert TrainingProgress(0, 2)._bar is None
