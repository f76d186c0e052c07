"""Logging through rich, and progress bars for all that lasts.

The library logs and never prints; the command line calls :func:`set_up_logging`. A progress bar goes to standard
error; where that is no terminal, a line is logged every ten seconds instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
logger = logging.getLogger("nearfield")


def stderr_console() -> Console:
    """The console that logs, progress bars and error messages share."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def stdout_console() -> Console:
    """The console for a command's results: as wide as needed where the output is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160, soft_wrap=True)


def set_up_logging(level: str = "INFO") -> None:
    """Send nearfield's log records to standard error, through rich on a terminal. Called by the command line only."""
    console = stderr_console()
    handler: logging.Handler
    if console.is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="[%H:%M:%S]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, showing a progress bar on a terminal and a log line every ten seconds elsewhere."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not logger.isEnabledFor(logging.INFO):
        yield from items
        return
    console = stderr_console()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, total=total, description=description)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= 10:
            shown = now
            left = f", {(now - start) / done * (total - done):.0f} s left" if total else ""
            logger.info("%s: %d%s%s", description, done, f" of {total}" if total else "", left)
