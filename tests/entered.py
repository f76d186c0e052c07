"""The files of the library that a piece of work enters: those of which a function is called."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import nearfield

ROOT = f"{Path(nearfield.__file__).parent}/"
FUNCTION = 0x1
"""A flag of the code of functions, which the bodies of modules and classes lack."""


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(ROOT):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def entered() -> Iterator[list[str]]:
    """The files below ``nearfield`` that are entered inside, in the order of their first call.

    Code that runs while a module is imported (a decorator, a table that is made) is no entry: nobody has to read it to follow
    the work.
    """
    found: list[str] = []
    before = sys.getprofile()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if before is not None:  # what is traced around this one enters them too
            before(frame, event, argument)
        code = frame.f_code
        if event != "call" or not code.co_flags & FUNCTION or not code.co_filename.startswith(ROOT):
            return
        name = code.co_filename.removeprefix(ROOT)
        if name not in found and not _is_importing(frame.f_back):
            found.append(name)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
