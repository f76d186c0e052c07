"""``nearfield run status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nearfield.cli.recipe import Overrides


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Look at runs.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command()(status)
    app.add_typer(group, name="run")


def status(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a recipe.", metavar="RUN")],
    overrides: Overrides = None,
) -> None:
    """Say which stages of a run are done, which are stale, and which comes next."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.pipeline import open_run
    from nearfield.pipeline import status as stage_status

    opened = open_run(run, overrides or ())
    stages = stage_status(opened)
    following = next((stage.name for stage in stages if stage.state != "done"), None)
    table = Table("stage", "state", "seconds", "", box=None, pad_edge=False)
    for stage in stages:
        state = stage.state + (" (next)" if stage.name == following else "")
        table.add_row(stage.name, state, "" if stage.seconds is None else f"{stage.seconds:.1f}", Text(stage.detail))
    console = stdout_console()
    console.print(table)
    console.print(f"run:    {opened.folder}", markup=False, highlight=False)
    if following:
        console.print(f"next:   nearfield train {run}", markup=False, highlight=False)
