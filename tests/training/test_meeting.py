"""Ranks that do one thing after the other meet anew for each, whatever became of the one before."""

from __future__ import annotations

import itertools
import threading

import pytest
from torch.distributed import TCPStore

from nearfield.errors import BadInputError, NearfieldError
from nearfield.training import launch as launch_module
from nearfield.training.launch import Launch


def test_processes_meet_as_often_as_they_do_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks prepare one thing after the other, one of which fails: each has its own words, and a failure ends only it."""
    kept = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    # Opened here: threads would wait for each other where processes do not.
    for number, store in enumerate((kept, TCPStore("127.0.0.1", kept.port, 2, False, wait_for_workers=False))):
        place = ("127.0.0.1", str(kept.port), number, 2)
        monkeypatch.setitem(launch_module._OPENED, place, (store, itertools.count()))
    monkeypatch.setattr(launch_module, "_SPEAK_SECONDS", 0.0)
    found: dict[int, list[str]] = {0: [], 1: []}

    def work(name: str) -> str:
        if name == "broken":
            raise BadInputError("it cannot be made")
        return name

    def rank(number: int) -> None:
        for name in ("first", "broken", "second", "third"):
            try:
                Launch(number, 2, number).prepare(lambda say, name=name: work(name), found[number].append)  # type: ignore[misc]
            except NearfieldError as error:
                found[number].append(type(error).__name__)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {0: ["BadInputError"], 1: ["first", "PreparationFailedError", "second", "third"]}
