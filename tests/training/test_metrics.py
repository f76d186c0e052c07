"""Reading metrics.jsonl, and the progress display."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from nearfield.pipeline.watch import Watcher
from nearfield.reporting.curves import read_columns
from nearfield.training import tracking
from nearfield.training.tracking import TrainingProgress, read_metrics


def test_a_line_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    bad = [b'{"st', b"null", b"[1]", b'"step"', b'{"loss": 1.0}', b'{"step": "2"}', b"\xff\xfe", b"[" * 100_000]
    path.write_bytes(b'{"step": 1}\n' + b"\n".join(bad) + b'\n\n{"step": 3}\n{"step": 4, "lo')
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert f"{len(bad) + 1} lines of {path} cannot be read and are left out" in caplog.messages


def test_a_number_beyond_all_figures_ends_no_reader(tmp_path: Path) -> None:
    digits = "9" * 400
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": 2.0}}\n{{"step": {digits}, "loss": 1.0}}\n'
        f'{{"step": 2, "loss": {digits}, "rows": -{digits}, "seconds": {digits}}}\n{{"step": 3, "loss": 1.0}}\n'
    )
    (tmp_path / "evaluations.jsonl").write_text(f'{{"step": 3, "scores": {{"mean": {digits}}}}}\n')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert Watcher(tmp_path).look().step == 3
    assert read_columns(tmp_path / "metrics.jsonl").steps == [1, 2, 3]


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time stands still until ``clock.now`` is moved."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: clock.now))
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
    monkeypatch.setattr(tracking, "stderr_console", lambda: console)
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
    monkeypatch.setattr(tracking, "stderr_console", lambda: console)
    assert TrainingProgress(0, 2)._bar is None
