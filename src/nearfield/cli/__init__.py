"""The command ``nearfield``: one thin module a command, over the same functions that Python users call.

Nothing heavy (pydantic, torch, mteb) is imported before a command runs, so that ``nearfield --help`` answers at once.
"""

from __future__ import annotations

import sys

from nearfield.errors import EXIT_FAULT, NearfieldError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can act on is one message and its own exit code."""
    from nearfield.cli.app import app

    try:
        app(arguments)
    except NearfieldError as error:
        print(f"nearfield: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_FAULT)
