"""The command ``nearfield``: one thin module a group of commands, over the same functions that Python users call.

Nothing heavy (pydantic, torch, mteb) is imported before a command runs, so that ``nearfield --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys

from nearfield.cli import analyse, compare, data, eval, mine, plan, project, run
from nearfield.cli.app import app
from nearfield.errors import EXIT_FAULT, NearfieldError

for _commands in (project, data, mine, plan, run, eval, compare, analyse):
    _commands.register(app)

_NO_ROOM = {
    errno.ENOSPC: "Make room, then run the same command again: what was whole is kept.",
    errno.EDQUOT: "Make room below the quota, then run the same command again: what was whole is kept.",
    errno.EFBIG: "Raise the limit of the size of files (ulimit -f), then run the same command again: what was whole is kept.",
    errno.EROFS: "Name a place that can be written to.",
    errno.EACCES: "Name a place that can be read and written, or change its rights.",
}


LOCAL_CODE = "--allow-local-code"


def _local_code_allowed(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """Import paths in recipes may name modules of the working folder, where the user says so."""
    if not allowed:
        return contextlib.nullcontext()
    from nearfield.config import allow_local_code

    return allow_local_code()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can act on is one message and its own exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    # It may stand anywhere, as all commands that read a recipe know it.
    local_code = LOCAL_CODE in given
    given = [argument for argument in given if argument != LOCAL_CODE]
    try:
        with _local_code_allowed(local_code):
            app(given)
    except NearfieldError as error:
        print(f"nearfield: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_FAULT)
    except Exception as error:
        number = _number_of(error)
        if number not in _NO_ROOM:
            raise
        name = getattr(error, "filename", None)
        place = f"{name}: " if name else ""
        reason = getattr(error, "strerror", None) or os.strerror(number)
        print(f"nearfield: {place}{reason}\n  -> {_NO_ROOM[number]}", file=sys.stderr)
        sys.exit(EXIT_FAULT)


def _number_of(error: Exception) -> int:
    """The number of the system's error behind one of a library; 0 where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if type(error).__name__ == "SafetensorError":
        said = re.search(r"\(os error (\d+)\)", str(error))
        return int(said[1]) if said else 0
    # numpy says how much it could write, and not why that was not all.
    short = isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error))
    return errno.ENOSPC if short else 0
