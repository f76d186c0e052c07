"""The lines that note themselves are those that a tracer sees."""

from __future__ import annotations

import ast
import sys
from types import FrameType
from typing import Any

from coverage.python import PythonParser

from tests.lines import NAME, NoteLines

SAMPLE = '''\
"""A module with every statement that holds others."""

from __future__ import annotations
from __future__ import division

import contextlib


class Thing:
    """A class."""

    size: int = 3
    """An attribute."""

    @property
    def double(self) -> int:
        """Twice the size."""
        return self.size * 2


def chosen(value):
    if value > 2:
        return "much"
    elif value == 2:
        return "two"
    else:
        match value:
            case 1:
                return "one"
            case _:
                return "none"


def tried(fails):
    try:
        if fails:
            raise ValueError(
                "several lines"
            )
    except KeyError:
        return 1
    except ValueError:
        return 2
    else:
        return 3
    finally:
        with contextlib.suppress(OSError):
            while True:
                break


for number in (2, 1):
    found = (chosen(number),
             tried(number == 1),
             [each for each in (
                 1, 2)])
else:
    Thing().double
'''


def test_notes_are_what_a_tracer_sees() -> None:
    parser = PythonParser(text=SAMPLE, filename="sample")
    parser.parse_source()
    traced = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != "sample":
            return None
        traced.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        exec(compile(SAMPLE, "sample", "exec", dont_inherit=True), {"__name__": "plain"})
    finally:
        sys.settrace(before)
    notes = bytearray(SAMPLE.count("\n") + 2)
    tree = NoteLines().visit(ast.parse(SAMPLE))
    exec(compile(tree, "sample", "exec", dont_inherit=True), {"__name__": "noted", NAME: notes})
    noted = {line for line, ran in enumerate(notes) if ran}
    lines = SAMPLE.splitlines()
    # A tracer is told of a clause that does not catch, and of a case that does not match; a note is not.
    passed = {number for number, line in enumerate(lines, 1) if line.strip() in ("except KeyError:",)}
    assert passed <= traced - noted
    wanted = parser.first_lines(traced) & parser.statements
    assert parser.first_lines(noted) & parser.statements == wanted - passed
    assert 0 < len(wanted) < len(parser.statements)
