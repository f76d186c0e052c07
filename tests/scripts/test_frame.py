"""The frame of the benchmarks on work that takes no time: order, ratios, processes, memory, exit codes; and two checkouts."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy import stats

SCRIPTS = Path(__file__).parents[2] / "scripts"
BENCHMARKS = sorted(path for path in SCRIPTS.glob("bench_*.py") if path.name != "bench_parts.py")


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture()
def frame(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load("frame")


def test_the_sides_take_turns(frame: ModuleType) -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, number: int) -> dict[str, float]:
        calls.append((name, number))
        return {"cpu_seconds": 2.0 if name == "peer" else 1.0}

    sides = {name: lambda number, name=name: side(name, number) for name in ("ours", "peer")}
    pairs = list(frame.in_turn(sides, 4, first=1))
    assert calls == [(name, number) for number in (1, 2, 3) for name in ("ours", "peer")]
    assert [list(pair) for pair in pairs] == [["ours", "peer"]] * 3


def pairs_of(ours: list[float], peer: list[float]) -> list[dict[str, dict[str, float]]]:
    return [{"ours": {"cpu_seconds": a}, "peer": {"cpu_seconds": b}} for a, b in zip(ours, peer, strict=True)]


def test_a_ratio_above_one_is_faster(frame: ModuleType) -> None:
    pairs = pairs_of([1.0, 2.0, 1.0, 4.0, 1.0], [2.0, 2.0, 3.0, 2.0, 1.5])
    made = frame.compare(pairs)
    assert made == {
        "ratio": 1.5, "interval": [0.5, 3.0], "spread": [0.5, 3.0], "pairs": 5, "ours": 1.0, "peer": 2.0,
        "unit": "CPU seconds",
    }  # fmt: skip
    # Of speeds, more is better.
    assert frame.compare(pairs, unit="rows a second", speed=True)["ratio"] == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("count", [6, 8, 10, 17, 30])
def test_the_interval_holds_the_median_in_95_percent(frame: ModuleType, count: int) -> None:
    low, high = frame.Ratio(tuple(float(value) for value in range(count))).interval
    place = int(low) + 1
    assert high == count - place
    # It fails where fewer than `place` values are on one side of the median.
    assert 1 - 2 * stats.binom.cdf(place - 1, count, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(place, count, 0.5) < 0.95


def twice(value: int) -> tuple[int, int]:
    return os.getpid(), 2 * value


def leave(code: int) -> None:
    os._exit(code)


def answer(pipe: Any, step: int) -> None:
    total = 0
    while (question := pipe.recv()) is not None:
        total += step * question
        pipe.send(total)
    pipe.send("done")


def test_a_measurement_has_a_process_of_its_own(frame: ModuleType) -> None:
    process, value = frame.alone(twice, 21)
    assert value == 42 and process != os.getpid()
    with pytest.raises(ChildProcessError, match="exit code 7"):
        frame.alone(leave, 7)


def test_a_worker_keeps_its_side(frame: ModuleType) -> None:
    with frame.Worker(answer, 10) as worker:
        assert [worker.ask(1), worker.ask(2)] == [10, 30]
        assert worker.ask(None) == "done"
    assert worker.process.exitcode == 0


def test_a_worker_that_is_left_ends(frame: ModuleType) -> None:
    with pytest.raises(KeyError), frame.Worker(answer, 1) as worker:
        raise KeyError
    assert not worker.process.is_alive()


def test_a_command_is_measured_from_outside(frame: ModuleType, tmp_path: Path) -> None:
    code = "import os, sys; held = bytearray(50_000_000); print(os.environ['MARK'], os.getcwd(), file=sys.stderr); sys.exit(3)"
    used = frame.run_command([sys.executable, "-c", code], folder=tmp_path, environment={"MARK": "here"})
    assert (used.code, used.output) == (3, f"here {tmp_path}\n")
    assert used.peak_bytes > 50_000_000
    assert used.cpu_seconds > 0 and used.wall_seconds > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="the peak is read from /proc")
def test_the_peak_counts_from_its_reset(frame: ModuleType) -> None:
    held = frame.reset_peak()
    block = bytearray(60_000_000)
    block[::4096] = b"1" * len(block[::4096])
    assert frame.peak_bytes() - held > 50_000_000
    del block
    assert frame.reset_peak() - held < 30_000_000


def test_a_clock_counts_ended_children(frame: ModuleType) -> None:
    with frame.Clock() as clock:
        subprocess.run([sys.executable, "-c", "sum(range(10**6))"], check=True)
    assert clock.cpu > 0 and clock.wall > 0


def test_a_failed_check_is_the_exit_code(frame: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "made.json"
    assert frame.finish({"ratio": 2.0}, [], path) == 0
    assert frame.finish({"ratio": 1.0}, ["floor"], path) == 1
    assert json.loads(path.read_text()) == {"ratio": 1.0}
    assert list(path.parent.iterdir()) == [path]
    assert capsys.readouterr().err == "FAILED: floor\n"


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_stands_in_the_frame(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "frame"
        for alias in node.names
    }
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {"finish", "make_parser"} <= names
    assert not modules & {"subprocess", "multiprocessing"}


# Two checkouts


@pytest.fixture()
def versions(frame: ModuleType) -> ModuleType:
    return load("bench_versions")


def sample(seconds: float, peak: int, loss: float) -> dict[str, Any]:
    part = {"cpu_seconds": seconds, "peak_bytes": peak}
    return {**part, "parts": {"train": part}, "results": {"train": [1.0, loss]}}


def failed(
    versions: ModuleType, ours: dict[str, Any], base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setattr(versions, "commit_of", lambda tree: "0")
    options = versions.argparse.Namespace(ours=0, base=0, steps=1, floor=0.95, memory=1.05, tolerance=1e-4)
    result = versions.summary([{"ours": ours, "base": base}] * 6, ["train"], options)
    return [failure.partition(":")[0] for failure in versions.failures(result, options)]


def test_two_versions_are_held_to_speed_memory_and_results(
    versions: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = sample(10.0, 1000, 0.5)
    assert failed(versions, sample(10.4, 1040, 0.50001), base, monkeypatch) == []
    assert failed(versions, sample(11.0, 1000, 0.5), base, monkeypatch) == ["all parts", "train"]
    assert failed(versions, sample(10.0, 1100, 0.5), base, monkeypatch) == ["all parts", "train"]
    assert failed(versions, sample(10.0, 1000, 0.6), base, monkeypatch) == ["train"]
    other = {**sample(10.0, 1000, 0.5), "results": {"train": [1.0]}}
    assert failed(versions, other, base, monkeypatch) == ["train"]


def test_a_folder_without_the_package_is_refused(versions: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_versions.py"), "--base", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no src/nearfield" in done.stderr


@pytest.mark.slow
def test_a_checkout_is_as_fast_as_itself_in_its_results(tmp_path: Path) -> None:
    out = tmp_path / "versions.json"
    command = [sys.executable, str(SCRIPTS / "bench_versions.py"), "--base", str(SCRIPTS.parent), "--json", str(out)]
    command += ["--pairs", "1", "--parts", "plan", "loss", "--steps", "4", "--floor", "0", "--memory", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(out.read_text())
    assert set(made) >= {"ratio", "interval", "spread", "pairs", "ours", "peer", "unit", "checks", "samples"}
    assert set(made["parts"]) == {"plan", "loss"}
    assert set(made["checks"]["largest difference of results"].values()) == {0.0}
