"""``nearfield report``: one HTML file that tells a run."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    run: Path = typer.Argument(..., metavar="RUN", help="The run's folder, such as runs/NAME."),
    out: Path | None = typer.Option(
        None, "--out", metavar="FILE", help="Where to write the page; RUN/report.html by default."
    ),
) -> None:
    """Write a run's report: one HTML file that needs no network."""
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.reporting import build_report
    from nearfield.reporting.text import size

    result = build_report(run, out)
    console = stdout_console()
    console.print(Text(f"{result.path} ({size(result.size)})"))
    for name, reason in result.sections.items():
        if reason is not None:
            console.print(Text(f"  {name}: {reason}"))
