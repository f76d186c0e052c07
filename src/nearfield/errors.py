"""Errors that speak to the user, and the exit codes of the command line.

Nothing here imports anything: every part of the package may raise these.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
EXIT_NON_FINITE = 4
EXIT_OUT_OF_MEMORY = 75
"""As ``EX_TEMPFAIL``: the same command may succeed."""


class NearfieldError(Exception):
    """Something went wrong that the user can act on.

    ``what`` is one sentence that says what is wrong, ``where`` the place (file, line, key, row) and ``hint`` what to
    do about it. The command line prints the three and leaves with ``exit_code``, without a traceback.
    """

    exit_code = EXIT_FAULT

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.hint:
            lines.append(f"  -> {self.hint}")
        return "\n".join(lines)


class BadInputError(NearfieldError):
    """The input (a recipe, a data file, a model folder, a checkpoint, an argument) cannot be used as it is."""

    exit_code = EXIT_BAD_INPUT


class StoppedError(NearfieldError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint to go on from."""

    exit_code = EXIT_STOPPED


class NonFiniteError(NearfieldError):
    """The loss or a gradient is not a finite number; the last good state is in a checkpoint."""

    exit_code = EXIT_NON_FINITE


class OutOfMemoryStopError(NearfieldError):
    """Memory ran out on a backend that cannot repeat a step; the last checkpoint holds a smaller budget to go on with."""

    exit_code = EXIT_OUT_OF_MEMORY
