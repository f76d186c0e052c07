"""Ctrl-C and SIGTERM ask the loop to stop after the step in hand."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """Inside the ``with`` block a first signal sets ``received``; a second one acts as it would outside.

    A launcher of several ranks sends SIGTERM on its own, also again, once a rank has ended: with ``launched`` a rank that
    is about to end for a reason of its own says that reason by its exit code. A launcher also hands Ctrl-C on to ranks
    that the terminal has sent it to already: there a second one acts only if it comes two seconds after the first.
    """

    def __init__(self, launched: bool = False) -> None:
        self.launched = launched
        self.received: str | None = None
        self._previous: dict[int, Any] = {}
        self._first: float | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self.launched:
            signal.signal(number, self._previous[number])
        elif number == signal.SIGINT:
            now = time.monotonic()
            self._first = now if self._first is None else self._first
            if now - self._first >= 2:
                signal.signal(number, self._previous[number])
                signal.raise_signal(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            ending = self.launched and error is not None and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ending else previous)
