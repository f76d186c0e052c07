"""The tree of commands."""

from __future__ import annotations

import importlib
import os
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
    # The launcher `deepspeed` gives it to all programs; the environment says the same.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """What every command shares."""
    from nearfield.console import set_up_logging

    # Under a launcher the first rank tells how it goes; the others speak when something is wrong.
    first = os.environ.get("RANK", "0") == "0"
    set_up_logging("INFO" if first and not quiet else "WARNING")


for module in (
    "init",
    "recipe",
    "data",
    "mine",
    "plan",
    "train",
    "eval",
    "compare",
    "leaderboard",
    "twins",
    "analyse",
    "submit",
    "report",
    "run",
    "doctor",
):
    importlib.import_module(f"nearfield.cli.{module}").register(app)
