"""The command line, called as a user calls it."""

from __future__ import annotations

import pytest

from nearfield.cli import main


def run(*arguments: str) -> int:
    """Run ``nearfield`` with these arguments; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)
