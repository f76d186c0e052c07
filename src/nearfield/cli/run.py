"""Looking at runs: ``nearfield run status|verify|watch`` and ``nearfield report``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from nearfield.cli.app import Overrides, table, tell


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Look at runs.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command()(status)
    group.command()(verify)
    group.command()(watch)
    app.add_typer(group, name="run")
    app.command("report")(report)


def status(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a recipe.", metavar="RUN")],
    overrides: Overrides = None,
) -> None:
    """Say which stages of a run are done, which are stale, and which comes next."""
    from nearfield.pipeline import open_run
    from nearfield.pipeline import status as stage_status

    opened = open_run(run, overrides or ())
    stages = stage_status(opened)
    following = next((stage.name for stage in stages if stage.state != "done"), None)
    rows = [
        (
            stage.name,
            stage.state + (" (next)" if stage.name == following else ""),
            "" if stage.seconds is None else f"{stage.seconds:.1f}",
            stage.detail,
        )
        for stage in stages
    ]
    tell(table(["stage", "state", "seconds", ""], rows))
    tell(f"run:    {opened.folder}")
    if following:
        tell(f"next:   nearfield train {run}")


def verify(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a recipe.", metavar="RUN")],
    overrides: Overrides = None,
) -> None:
    """Read every byte that a run's stages left behind and compare it with its checksum. Ends with 1 where one differs."""
    from rich.text import Text

    from nearfield.errors import EXIT_FAULT
    from nearfield.pipeline import open_run
    from nearfield.pipeline.stages import verify as verify_run

    opened = open_run(run, overrides or ())
    found = verify_run(opened)
    rows = [
        (
            part.name,
            f"{part.bytes / 1e6:,.1f}",
            Text(part.damage or "every byte is what was written", style="red" if part.damage else ""),
        )
        for part in found
    ]
    tell(table(["what", "MB", ""], rows))
    damaged = [part for part in found if part.damage]
    for hint in dict.fromkeys(part.mend for part in damaged):
        tell(f"mend:   {hint.format(run=run)}")
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

    def grid(progress: Progress) -> Table:
        made = Table.grid(padding=(0, 2))
        for name, words in facts(progress):
            made.add_row(Text(name, style="dim"), Text(words))
        return made

    watcher, console = Watcher(run), stdout_console()
    progress = watcher.look()
    if once or progress.state != "running":
        tell(grid(progress))
        return
    pause = every or (1.0 if console.is_terminal else 10.0)
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            with Live(grid(progress), console=console, auto_refresh=False) as live:
                while progress.state == "running":
                    time.sleep(pause)
                    progress = watcher.look()
                    live.update(grid(progress), refresh=True)
            return
        while True:
            tell(one_line(progress))
            if progress.state != "running":
                return
            time.sleep(pause)
            progress = watcher.look()


def report(
    run: Path = typer.Argument(..., metavar="RUN", help="The run's folder, such as runs/NAME."),
    out: Path | None = typer.Option(
        None, "--out", metavar="FILE", help="Where to write the page; RUN/report.html by default."
    ),
) -> None:
    """Write a run's report: one HTML file that needs no network."""
    from nearfield.reporting import build_report
    from nearfield.reporting.text import size

    result = build_report(run, out)
    tell(f"{result.path} ({size(result.size)})")
    for name, reason in result.sections.items():
        if reason is not None:
            tell(f"  {name}: {reason}")
