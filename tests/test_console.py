"""Progress and logging where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from nearfield import console


def test_track_yields_all_and_tells_every_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "nearfield"):
        assert list(console.track(iter("abcdef"), "Working", total=6)) == list("abcdef")
    assert [record.message for record in caplog.records] == ["Working: 3 of 6, 12 s left", "Working: 6 of 6, 0 s left"]


def test_track_is_silent_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nearfield"):
        assert list(console.track([1, 2, 3], "Working")) == [1, 2, 3]
    assert not caplog.records


def test_logging_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up_logging()
    logging.getLogger("nearfield.part").info("a message [with brackets]")
    logging.getLogger("nearfield.part").debug("not shown")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("INFO a message [with brackets]\n")
    console.set_up_logging("WARNING")
    logging.getLogger("nearfield.part").info("not shown")
    assert capsys.readouterr().err == ""
