"""The frame of the benchmarks: clocks and memory, processes of their own, two sides in turn (A B A B), their ratio, the JSON.

A benchmark measures, and this file does the rest:

- ``Clock``, ``peak_bytes``, ``reset_peak``: CPU and wall seconds, and the memory of this process;
- ``alone`` runs one measurement in a fresh process, ``Worker`` keeps a side alive there between measurements, and
  ``run_command`` measures a command from outside;
- ``in_turn`` runs both sides A B A B, so that a machine that slows down slows both;
- ``compare`` makes of the samples what is written: the median ratio with its interval, and the medians of both sides;
- ``finish`` prints failed checks, writes the JSON and gives the exit code.

It imports nothing but the standard library: a process that only starts others stays small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Sample = dict[str, Any]
"""One measurement of one side."""
Pair = dict[str, Sample]
"""A measurement of each side, by the side's name."""


# Seconds and bytes.


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass
class Clock:
    """CPU seconds (of ended children too) and wall seconds of a ``with`` block."""

    cpu: float = 0.0
    wall: float = 0.0
    _began: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __enter__(self) -> Clock:
        self._began = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = cpu_seconds() - self._began[0], time.perf_counter() - self._began[1]


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise SystemExit("memory is read from /proc/self/status, which this system does not have") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def peak_bytes() -> int:
    """The largest resident set that this process has had (VmHWM) since it began, or since ``reset_peak``."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The resident set of this process as it is now."""
    return _status("VmRSS")


def reset_peak() -> int:
    """Let the peak count from here, where the system allows it; what is resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


# Processes.


class Worker:
    """A process of its own that holds one side of a benchmark: ``work(pipe, *arguments)`` answers what it is asked.

    The script that defines ``work`` is imported anew there, so nothing of this process's memory or threads is shared.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        # Bars of libraries would stand between the lines of the benchmark.
        os.environ.setdefault("TQDM_DISABLE", "1")
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *arguments))
        self.process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def receive(self) -> Any:
        """The next answer; ``ChildProcessError`` where the process ended without one."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise ChildProcessError(f"a measurement ended with exit code {self.process.exitcode}") from None

    def ask(self, question: Any) -> Any:
        """Send a question and wait for its answer."""
        self.pipe.send(question)
        return self.receive()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of a script, called in a fresh process."""
    with Worker(_answer, function, arguments) as worker:
        return worker.receive()


def _answer(pipe: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    pipe.send(function(*arguments))


@dataclass(frozen=True)
class CommandUse:
    """A command that was run: what it took, with its children, and what it printed."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    """The largest resident set of one of its processes; never less than that of the process that started it."""
    code: int
    output: str
    """Standard output and standard error."""


def run_command(
    command: Sequence[str | Path], *, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> CommandUse:
    """Run a command to its end; ``environment`` is added to this process's."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    process.stdout.close()
    # Unlike the sums for all children, this is of the one command, its own children included.
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return CommandUse(
        used.ru_utime + used.ru_stime,
        time.perf_counter() - began,
        used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        process.returncode,
        output,
    )


# Pairs.


def in_turn(sides: Mapping[str, Callable[[int], Sample]], pairs: int, first: int = 0) -> Iterator[Pair]:
    """Measure the sides A B A B: each is called with the number of the pair, from ``first`` to ``pairs`` - 1."""
    for number in range(first, pairs):
        yield {name: side(number) for name, side in sides.items()}


@dataclass(frozen=True)
class Ratio:
    """The ratios of some pairs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The ratio that a benchmark reports."""
        return statistics.median(self.values)

    @property
    def spread(self) -> list[float]:
        """The least and the largest."""
        return [min(self.values), max(self.values)]

    @property
    def interval(self) -> list[float]:
        """A 95 % interval of the median, from order statistics: it supposes nothing but that pairs are independent.

        With n pairs the k-th least and k-th largest hold the median in 1 - 2 P(B < k) of cases, B binomial (n, 1/2); k is
        the largest that gives 95 %. Fewer than 6 pairs cannot give that, and the interval is the spread (93.8 % with 5).
        """
        ordered, count = sorted(self.values), len(self.values)
        outside, place = 0.0, 0
        while place < count // 2:
            outside += 2 * math.comb(count, place) / 2**count
            if outside > 0.05:
                break
            place += 1
        place = max(place, 1)
        return [ordered[place - 1], ordered[-place]]

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.median:.2f} ({low:.2f} to {high:.2f}, {len(self.values)} pairs)"


def ratio_of(pairs: Sequence[Pair], value: str = "cpu_seconds", *, speed: bool = False) -> Ratio:
    """How many times faster the first side is, pair by pair: the peer's seconds over ours, or our speed over the peer's."""
    ours, peer = list(pairs[0])
    upper, lower = (ours, peer) if speed else (peer, ours)
    return Ratio(tuple(pair[upper][value] / pair[lower][value] for pair in pairs))


def compare(
    pairs: Sequence[Pair], value: str = "cpu_seconds", *, unit: str = "CPU seconds", speed: bool = False
) -> dict[str, Any]:
    """The figures of a comparison: ``ratio`` (median), ``interval``, ``spread``, ``pairs``, ``ours``, ``peer``, ``unit``.

    The benchmark adds ``checks`` (what shows that both sides did the same work) and ``samples`` (all that was measured).
    """
    ours, peer = list(pairs[0])
    ratio = ratio_of(pairs, value, speed=speed)
    return {
        "ratio": ratio.median,
        "interval": ratio.interval,
        "spread": ratio.spread,
        "pairs": len(pairs),
        "ours": statistics.median(pair[ours][value] for pair in pairs),
        "peer": statistics.median(pair[peer][value] for pair in pairs),
        "unit": unit,
    }


# The command line and the file.


def make_parser(
    description: str | None, *, pairs: int | None = 5, floor: float | None = None
) -> argparse.ArgumentParser:
    """A parser with ``--json``, and with ``--pairs`` and ``--floor`` where two sides are compared."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if pairs is not None:
        parser.add_argument("--pairs", type=int, default=pairs, help="how often both sides are run")
        parser.add_argument("--floor", type=float, default=floor, help="leave with 1 if a ratio is below")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    return parser


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write the figures, aside first, so that a benchmark that is stopped leaves the file of its last pair."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def finish(result: Mapping[str, Any], failed: Sequence[str], path: Path | None) -> int:
    """Write the figures, say what failed, and give the exit code: 1 where anything did."""
    write(path, result)
    for failure in failed:
        print(f"FAILED: {failure}", file=sys.stderr)
    return int(bool(failed))


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of some packages."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine() -> str:
    """The number of cores and the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{os.cpu_count()} x {model}"
