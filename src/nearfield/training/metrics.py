"""What a run tells of itself while it goes on: the files that others read, and a progress display."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from nearfield.console import stderr_console

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

logger = logging.getLogger("nearfield.training")

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""Files in a run's folder: a line a step, and a line an evaluation."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of either file, empty where there is none; those that cannot be read are left out and their number is said.

    A kill may cut off the last line.
    """
    return parse_metrics(path.read_bytes(), path) if path.is_file() else []


def parse_metrics(data: bytes, path: Path) -> list[dict[str, Any]]:
    """The same of the bytes of a file."""
    lines, unread = [], 0
    for text in data.split(b"\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            unread += 1
    if unread:
        logger.warning("%d lines of %s cannot be read and are left out", unread, path)
    return lines


def used_memory(device: torch.device) -> dict[str, int]:
    """The most memory that tensors took on a GPU so far, in bytes; nothing on a CPU, where no one counts it."""
    if device.type != "cuda":
        return {}
    import torch

    return {"memory_bytes": torch.cuda.max_memory_allocated(device)}


class TrainingProgress:
    """Loss, rate and time left: a bar on a terminal, a log line every ten seconds elsewhere."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self.first_step = first_step
        self.total_steps = total_steps
        self._start = self._shown = time.monotonic()
        self._rows = 0
        self._bar: Progress | None = None
        console = stderr_console()
        if console.is_terminal and logger.isEnabledFor(logging.INFO):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("Training", total=total_steps, completed=first_step)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, rows: int) -> None:
        """Tell that ``step`` steps are done."""
        self._rows += rows
        now = time.monotonic()
        rate = self._rows / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, description=f"Training  loss {loss:.4f}  {rate:.1f} examples/s"
            )
        elif now - self._shown >= 10:
            self._shown = now
            left = (now - self._start) / (step - self.first_step) * (self.total_steps - step)
            logger.info(
                "Training: step %d of %d, loss %.4f, %.1f examples/s, %.0f s left",
                step,
                self.total_steps,
                loss,
                rate,
                left,
            )
