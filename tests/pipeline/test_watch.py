"""Following a run by its files: running, stopped, finished, and not begun."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nearfield.errors import BadInputError
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.watch import Progress, Watcher, duration, facts, one_line, sparkline
from tests.cli.command import run


class Folder:
    """A run's folder, made by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "plan").mkdir(parents=True)
        self.json("manifest.json", {"stages": {}})
        self.json("plan/summary.json", {"steps": 100})
        evaluation = "{metric: Task, suite: s, every_steps: 10}"
        (path / "recipe.yaml").write_text(f"name: toy\ntraining: {{max_steps: 40, evaluation: {evaluation}}}\n")

    def json(self, name: str, value: Any) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(json.dumps(value))

    def owner(self, pid: int, host: str | None = None) -> None:
        self.json(".lock", {"pid": pid, "host": host or socket.gethostname(), "stage": "train"})

    def steps(self, first: int, last: int, mode: str = "a", **more: Any) -> None:
        with (self.path / "metrics.jsonl").open(mode) as file:
            for step in range(first, last + 1):
                line = {
                    "step": step,
                    "loss": 1 / step,
                    "learning_rate": 1e-4,
                    "rows": 16,
                    "tokens": 400,
                    "seconds": 0.5,
                }
                file.write(json.dumps({**line, **more}) + "\n")

    def scores(self, **by_step: float | None) -> None:
        with (self.path / "evaluations.jsonl").open("a") as file:
            for step, score in by_step.items():
                line = {"step": int(step[1:]), "scores": {"mean": 0.9, "Task": score}, "seconds": 1.0}
                file.write(json.dumps(line) + "\n")

    def checkpoint(self, step: int, fingerprint: str = "f") -> None:
        self.json(f"checkpoints/step-{step:08d}/state.json", {"step": step, "fingerprint": fingerprint})


@pytest.fixture()
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "toy")


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_running_one(folder: Folder) -> None:
    folder.owner(os.getpid())
    folder.steps(1, 10, memory_bytes=3 * 2**30)
    folder.scores(s0=0.99, s5=0.5, s9=0.4)
    found = Watcher(folder.path).look()
    assert (found.state, found.stage, found.host) == ("running", "train", None)
    assert (found.step, found.steps) == (10, 40)
    assert (found.examples, found.tokens, found.left) == (32, 800, 15)
    assert found.best == (5, 0.5), "the untrained model is not the best one"
    assert dict(facts(found)) == {
        "run": "toy",
        "state": "running: train",
        "step": "10 of 40 (25%)",
        "loss": "0.1000  " + sparkline([1 / n for n in range(1, 11)]),
        "learning rate": "0.0001",
        "speed": "32.0 examples/s, 800 tokens/s",
        "time left": "15 s",
        "evaluation": "after step 9: mean 0.9000, Task 0.4000",
        "best": "Task 0.5000 after step 5",
        "memory": "3.00 GiB at most",
    }
    assert one_line(found).startswith("running: train; step 10 of 40 (25%); loss 0.1000; speed 32.0 examples/s")
    assert len(one_line(found).splitlines()) == 1


def test_files_that_grow_and_that_a_resumed_run_replaces(folder: Folder) -> None:
    folder.owner(os.getpid())
    watcher = Watcher(folder.path)
    assert watcher.look().step == 0
    folder.steps(1, 8)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert watcher.look().step == 8, "a line that is being written waits"
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('ss": 7.0}\n')
    found = watcher.look()
    assert (found.step, found.losses[-1], len(found.losses)) == (9, 7.0, 9)
    (folder.path / "metrics.jsonl").unlink()
    folder.steps(1, 4)
    assert [round(1 / loss) for loss in watcher.look().losses] == [1, 2, 3, 4]
    folder.steps(5, 6)
    assert watcher.look().step == 6


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (lambda f, dead: f.owner(dead), "not started"),
        (lambda f, dead: (f.owner(dead), f.steps(1, 5)), "stopped"),
        (lambda f, dead: f.checkpoint(0), "stopped"),
        (lambda f, dead: f.json("manifest.json", {"stages": {"train": {"fingerprint": "f", "steps": 40}}}), "finished"),
        (lambda f, dead: (f.done(), f.checkpoint(40)), "finished"),
        (lambda f, dead: (f.done(), f.checkpoint(20, "another")), "stopped"),
        (lambda f, dead: (f.path / ".lock").write_text("broken"), "not started"),
        (lambda f, dead: f.owner(dead, "another-host"), "running"),
    ],
)
def test_states(folder: Folder, dead: int, make: Callable[[Any, int], Any], state: str) -> None:
    folder.done = lambda: folder.json("manifest.json", {"stages": {"train": {"fingerprint": "f", "steps": 40}}})  # type: ignore[attr-defined]
    make(folder, dead)
    found = Watcher(folder.path).look()
    assert found.state == state
    assert found.left is None
    assert (found.host == "another-host") == (state == "running")


def test_early_end(folder: Folder) -> None:
    record = {"fingerprint": "f", "steps": 20, "stopped_early": True}
    folder.json("manifest.json", {"stages": {"train": record}})
    folder.checkpoint(20)
    folder.steps(1, 20)
    assert "early" in dict(facts(Watcher(folder.path).look()))["state"]


def test_damaged_files_do_not_end_the_watch(folder: Folder) -> None:
    for name in ("manifest.json", "plan/summary.json", "recipe.yaml", "evaluations.jsonl"):
        (folder.path / name).write_bytes(b"\xff{[\n[1]\n\n")
    folder.owner(os.getpid())
    (folder.path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "seconds": "x"}\nnull\n{"step": "a"}\n')
    found = Watcher(folder.path).look()
    assert (found.state, found.step, found.steps, found.name) == ("running", 1, None, "toy")
    assert facts(found)
    assert one_line(found)


def test_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, what in (("file", "this is a file"), ("nowhere", "does not exist"), ("folder", "is no run")):
        with pytest.raises(BadInputError, match=what):
            Watcher(tmp_path / name)


def test_words() -> None:
    assert [duration(s) for s in (0.4, 89, 91, 3600, 6000, 200_000)] == [
        "0 s", "89 s", "2 min", "60 min", "1 h 40 min", "2 d 7 h",
    ]  # fmt: skip
    assert sparkline([]) == sparkline([math.nan]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0, math.inf, 4, 7]) == "▁▅█"
    assert sparkline([float(n) for n in range(1000)]) == "".join(sorted(sparkline([float(n) for n in range(1000)])))
    assert len(sparkline([float(n) for n in range(1000)], width=30)) == 30
    assert dict(facts(Progress("a", "running", silent=120.0)))["last sign"] == "2 min ago"


def test_the_command(
    folder: Folder, dead: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", "watch", str(folder.path.parent / "nowhere")) == 2
    assert "this folder does not exist" in capsys.readouterr().err
    folder.owner(os.getpid())
    folder.steps(1, 3)
    assert run("run", "watch", "--once", str(folder.path)) == 0
    shown = capsys.readouterr().out
    assert "running: train" in shown
    assert "3 of 40" in shown
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        folder.steps(len(naps) * 10, len(naps) * 10)
        if len(naps) == 2:
            folder.owner(dead)

    monkeypatch.setattr("time.sleep", sleep)
    assert run("run", "watch", "--every", "7", str(folder.path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0].strip() for line in lines] == ["running: train", "running: train", "stopped"]
    assert naps == [7, 7]
    assert "step 20 of 40" in lines[-1]


def test_on_a_terminal(folder: Folder, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr("nearfield.console.stdout_console", lambda: console)
    folder.owner(os.getpid())
    folder.steps(1, 3)

    def sleep(seconds: float) -> None:
        assert seconds in (1.0, 0.05)
        folder.steps(40, 40)
        folder.owner(dead)

    monkeypatch.setattr("time.sleep", sleep)
    assert run("run", "watch", str(folder.path)) == 0
    assert "3 of 40" in screen.getvalue()
    assert "40 of 40 (100%)" in screen.getvalue()


def test_a_real_run(toy_recipe: Path, tmp_path: Path) -> None:
    """While it works, the run says at what; afterwards nobody works on it."""
    run, seen = tmp_path / "runs" / "toy", []

    def look(stage: str, state: str) -> None:
        found = Watcher(run).look()
        seen.append((stage, found.state, found.stage))

    run_stages(open_run(toy_recipe, (), run), "train", on_stage=look)
    assert seen == [(stage, "running", stage) for stage in ("data", "tokens", "plan", "train")]
    found = Watcher(run).look()
    assert (found.state, found.stage, found.step, found.steps) == ("finished", None, 12, 12)
    assert (run / ".lock").read_text() == ""
