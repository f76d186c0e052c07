"""Following a run from another process, by the files that it leaves behind: nothing is asked of the run itself."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nearfield.config import load_yaml
from nearfield.errors import BadInputError
from nearfield.files import EVALUATIONS, METRICS, parse_metrics
from nearfield.pipeline.run import LOCK, MANIFEST

_RECENT_STEPS = 50
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Progress:
    """A run as it stands; what is not known is None."""

    name: str
    state: str
    """``running``, ``finished``, ``stopped`` (its training can go on) or ``not started`` (nothing trained yet)."""
    stage: str | None = None
    """The stage that runs now."""
    host: str | None = None
    """The machine that it runs on, if another than this."""
    silent: float | None = None
    """Seconds since the last step or evaluation was told."""
    step: int = 0
    steps: int | None = None
    losses: Sequence[float] = ()
    rate: float | None = None
    """The learning rate."""
    examples: float | None = None
    """A second, over the last steps."""
    tokens: float | None = None
    """Real ones a second, over the last steps."""
    left: float | None = None
    """Seconds of training that are left, evaluations not counted."""
    evaluation: Mapping[str, Any] | None = None
    """The last line of the evaluations."""
    metric: str = "mean"
    best: tuple[int, float] | None = None
    """The step and score of the best evaluation of a trained model."""
    memory: float | None = None
    """Bytes at the most, on the first device."""
    early: bool = False
    """Whether evaluations without a gain ended the training."""


@dataclass
class _Tail:
    """The lines of a JSON lines file that grows, and is now and then replaced by a shorter one."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _file: int = 0

    def read(self) -> list[dict[str, Any]]:
        """All whole lines so far; a step that stands twice counts as it was told last."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._offset:
                    self.lines, self._offset, self._file = [], 0, status.st_ino
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self.lines, self._offset, self._file = [], 0, 0
            return self.lines
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self.lines += parse_metrics(whole)[0]
        return self.lines


class Watcher:
    """Looks at a run's folder as often as wanted; :class:`BadInputError` if it is none."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            what = "this is a file" if folder.is_file() else "this folder does not exist"
            raise BadInputError(f"{what}; a run is a folder", where=str(folder), hint="By default it is runs/NAME.")
        if not any((folder / name).exists() for name in (MANIFEST, LOCK)):
            raise BadInputError("this folder is no run (it has no manifest.json)", where=str(folder))
        self.folder = folder
        self._metrics = _Tail(folder / METRICS)
        self._evaluations = _Tail(folder / EVALUATIONS)

    def look(self) -> Progress:
        """The run as it stands now."""
        owner = self._owner()
        recipe = self._recipe()
        training = _mapping(recipe.get("training"))
        metric = str(_mapping(training.get("evaluation")).get("metric", "mean"))
        lines, evaluations = self._metrics.read(), self._evaluations.read()
        record = _mapping(_mapping(_read_json(self.folder / MANIFEST).get("stages")).get("train"))
        steps = self._steps(training)
        last = lines[-1] if lines else {}
        recent = lines[-_RECENT_STEPS:]
        seconds = _total(recent, "seconds")
        step = int(last.get("step", 0))
        if owner is not None:
            state = "running"
        elif record and self._ends_as(record):
            state = "finished"
        else:
            state = "stopped" if lines or self._checkpoints() else "not started"
        scored = [
            (line["step"], float(score))
            for line in evaluations
            if line["step"] > 0 and isinstance(score := _mapping(line.get("scores")).get(metric), int | float)
        ]
        best = max(scored, key=lambda entry: (entry[1], -entry[0]), default=None)
        left = None
        if state == "running" and steps is not None and recent and step < steps:
            left = (steps - step) * seconds / len(recent)
        return Progress(
            name=str(recipe.get("name") or self.folder.name),
            state=state,
            stage=None if owner is None else owner.get("stage"),
            host=None if owner is None or owner.get("host") == socket.gethostname() else str(owner.get("host")),
            silent=self._silent(),
            step=step,
            steps=steps,
            losses=[float(line["loss"]) for line in lines if isinstance(line.get("loss"), int | float)],
            rate=_number(last.get("learning_rate")),
            examples=_total(recent, "rows") / seconds if seconds else None,
            tokens=_total(recent, "tokens") / seconds if seconds else None,
            left=left,
            evaluation=evaluations[-1] if evaluations else None,
            metric=metric,
            best=best,
            memory=_number(last.get("memory_bytes")),
            early=state == "finished" and bool(record.get("stopped_early")),
        )

    def _owner(self) -> dict[str, Any] | None:
        """The process that works on the run, as it describes itself; None where there is none."""
        path = self.folder / LOCK
        for _ in range(2):
            owner = _read_json(path)
            if owner:
                break
            time.sleep(0.05)  # perhaps it is being written at this moment
        if not owner or not isinstance(owner.get("pid"), int):
            return None
        if owner.get("host") == socket.gethostname():
            try:
                os.kill(owner["pid"], 0)
            except ProcessLookupError:
                return None
            except PermissionError:
                pass
        return owner

    def _recipe(self) -> dict[str, Any]:
        try:
            return _mapping(load_yaml((self.folder / "recipe.yaml").read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}

    def _steps(self, training: Mapping[str, Any]) -> int | None:
        planned = _read_json(self.folder / "plan" / "summary.json").get("steps")
        limit = training.get("max_steps")
        known = [number for number in (planned, limit) if isinstance(number, int)]
        return min(known) if isinstance(planned, int) else None

    def _ends_as(self, record: Mapping[str, Any]) -> bool:
        """Whether the newest checkpoint is the end of the training that the manifest tells of, not a newer one's middle."""
        paths = self._checkpoints()
        if not paths:
            return True
        state = _read_json(paths[-1] / "state.json")
        return state.get("fingerprint") == record.get("fingerprint") and state.get("step") == record.get("steps")

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-" + "[0-9]" * 8))

    def _silent(self) -> float | None:
        times = []
        for name in (METRICS, EVALUATIONS):
            with contextlib.suppress(OSError):
                times.append((self.folder / name).stat().st_mtime)
        return max(0.0, time.time() - max(times)) if times else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _total(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return math.fsum(number for line in lines if (number := _number(line.get(key))) is not None)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The values as a row of at most ``width`` bars, each the mean of a stretch."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    if not count:
        return ""
    means = []
    for index in range(count):
        stretch = finite[index * len(finite) // count : (index + 1) * len(finite) // count]
        means.append(math.fsum(stretch) / len(stretch))
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def duration(seconds: float) -> str:
    """``48 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def facts(progress: Progress) -> list[tuple[str, str]]:
    """Everything known of the run, as names and words."""
    p = progress
    state = p.state
    if p.stage:
        state += f": {p.stage}"
    if p.host:
        state += f" on {p.host}"
    if p.early:
        state += ", early: no gain for as many evaluations as patience allows"
    lines = [("run", p.name), ("state", state)]
    if p.step or p.steps is not None:
        of = f" of {p.steps:,} ({p.step / p.steps:.0%})" if p.steps else ""
        lines.append(("step", f"{p.step:,}{of}"))
    if p.losses:
        lines.append(("loss", f"{p.losses[-1]:.4f}  {sparkline(p.losses)}"))
    if p.rate is not None:
        lines.append(("learning rate", f"{p.rate:.3g}"))
    if p.examples is not None and p.tokens is not None:
        lines.append(("speed", f"{p.examples:,.1f} examples/s, {p.tokens:,.0f} tokens/s"))
    if p.left is not None:
        lines.append(("time left", duration(p.left)))
    if p.evaluation is not None:
        scores = _mapping(p.evaluation.get("scores"))
        told = ", ".join(f"{name} {score:.4f}" for name, score in scores.items() if isinstance(score, int | float))
        lines.append(("evaluation", f"after step {p.evaluation['step']:,}: {told or 'no score is a number'}"))
    if p.best is not None:
        lines.append(("best", f"{p.metric} {p.best[1]:.4f} after step {p.best[0]:,}"))
    if p.memory is not None:
        lines.append(("memory", f"{p.memory / 2**30:.2f} GiB at most"))
    if p.silent is not None and p.state == "running" and p.silent > 60:
        lines.append(("last sign", f"{duration(p.silent)} ago"))
    return lines


def one_line(progress: Progress) -> str:
    """The same in one line, for logs."""
    told = dict(facts(progress))
    told.pop("run")
    if progress.losses:
        told["loss"] = f"{progress.losses[-1]:.4f}"
    parts = [told.pop("state")]
    parts += [f"{name} {words}" for name, words in told.items() if name != "learning rate"]
    return "; ".join(parts)
