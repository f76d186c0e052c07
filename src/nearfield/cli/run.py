"""``nearfield run status``, ``nearfield run verify`` and ``nearfield run watch``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from nearfield.cli.options import Overrides


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Look at runs.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command()(status)
    group.command()(verify)
    group.command()(watch)
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


def verify(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a recipe.", metavar="RUN")],
    overrides: Overrides = None,
) -> None:
    """Read every byte that a run's stages left behind and compare it with its checksum. Ends with 1 where one differs."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.errors import EXIT_FAULT
    from nearfield.pipeline import open_run
    from nearfield.pipeline.verifying import verify as verify_run

    opened = open_run(run, overrides or ())
    found = verify_run(opened)
    table = Table("what", "MB", "", box=None, pad_edge=False)
    for part in found:
        words = Text(part.damage or "every byte is what was written", style="red" if part.damage else "")
        table.add_row(Text(part.name), f"{part.bytes / 1e6:,.1f}", words)
    console = stdout_console()
    console.print(table)
    damaged = [part for part in found if part.damage]
    for hint in dict.fromkeys(part.mend for part in damaged):
        console.print(Text(f"mend:   {hint.format(run=run)}"))
    if damaged:
        raise typer.Exit(EXIT_FAULT)


def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")],
    every: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds between looks; 1 on a terminal, 10 elsewhere.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show the run as it stands, and end.")] = False,
) -> None:
    """Follow a run from another terminal: loss, speed, time left, evaluations. Ends when the run ends."""
    import time

    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.pipeline.watch import Progress, Watcher, facts, one_line

    def table(progress: Progress) -> Table:
        grid = Table.grid(padding=(0, 2))
        for name, words in facts(progress):
            grid.add_row(Text(name, style="dim"), Text(words))
        return grid

    watcher, console = Watcher(run), stdout_console()
    progress = watcher.look()
    if once or progress.state != "running":
        console.print(table(progress))
        return
    pause = every or (1.0 if console.is_terminal else 10.0)
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            with Live(table(progress), console=console, auto_refresh=False) as live:
                while progress.state == "running":
                    time.sleep(pause)
                    progress = watcher.look()
                    live.update(table(progress), refresh=True)
            return
        while True:
            console.print(Text(one_line(progress)))
            if progress.state != "running":
                return
            time.sleep(pause)
            progress = watcher.look()
