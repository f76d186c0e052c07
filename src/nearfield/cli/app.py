"""The tree of commands."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from typing import Annotated

import typer

app = typer.Typer(
    name="nearfield",
    help="Train and benchmark embedding models: planned batches, exact resume, scores with their uncertainty.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from nearfield import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and results only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    # Taken out before the commands see it, so that it may stand anywhere: see `nearfield.cli.main`.
    allow_local_code: Annotated[
        bool,
        typer.Option(
            "--allow-local-code",
            help="Let recipes name classes of the working folder (kind: module:Settings), not of installed packages alone.",
        ),
    ] = False,
    # The launcher `deepspeed` gives it to all programs; the environment says the same.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """What every command shares."""
    from nearfield.console import set_up_logging

    # Under a launcher the first rank tells how it goes; the others speak when something is wrong.
    first = os.environ.get("RANK", "0") == "0"
    set_up_logging("INFO" if first and not quiet else "WARNING")
    if "RANK" not in os.environ:
        _end_in_order()


def _end_in_order() -> None:
    """Let SIGTERM end the process as an exit does, so that what was encoded is kept and half-written files are removed.

    Under a launcher, which also sends it to the ranks that others are waiting for, it ends a process at once.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


for module in ("project", "data", "mine", "plan", "train", "eval", "compare", "twins", "analyse", "run"):
    importlib.import_module(f"nearfield.cli.{module}").register(app)
