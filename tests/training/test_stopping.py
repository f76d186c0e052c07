"""The first signal asks, the second acts."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace

import pytest

from nearfield.training.launch import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    seen: list[int] = []
    previous = signal.signal(number, lambda n, frame: seen.append(n))
    ours = signal.getsignal(number)
    try:
        with StopRequest() as stop:
            assert stop.received is None
            assert signal.getsignal(number) is not ours
            signal.raise_signal(number)
            assert stop.received == number.name
            assert seen == []
            signal.raise_signal(number)
            assert seen == [number]
        assert signal.getsignal(number) is ours
    finally:
        signal.signal(number, previous)
    assert {n: signal.getsignal(n) for n in before} == before


def test_handlers_are_put_back_without_a_signal() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert {signal.getsignal(n) for n in before} == {stop._receive}
    assert {n: signal.getsignal(n) for n in before} == before


def test_other_threads_cannot_take_signals_and_do_not_try() -> None:
    received: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            received.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert received == [None]


@pytest.mark.parametrize(
    ("number", "later", "acts"), [("SIGINT", 0.1, False), ("SIGINT", 3, True), ("SIGTERM", 3, False)]
)
def test_a_launcher_hands_signals_on_a_second_time(
    number: str, later: float, acts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    wanted = signal.Signals[number]
    previous = signal.signal(wanted, lambda n, frame: seen.append(n))
    try:
        with StopRequest(launched=True) as stop:
            clock = iter([100.0, 100.0 + later])
            monkeypatch.setattr("nearfield.training.launch.time", SimpleNamespace(monotonic=lambda: next(clock)))
            signal.raise_signal(wanted)
            assert (stop.received, seen) == (number, [])
            signal.raise_signal(wanted)
            assert seen == ([wanted] if acts else [])
    finally:
        signal.signal(wanted, previous)
