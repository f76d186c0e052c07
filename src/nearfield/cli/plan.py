"""``nearfield plan``: write the batches of a recipe, without training."""

from __future__ import annotations

import typer

from nearfield.cli.recipe import Overrides, RecipeFile
from nearfield.cli.train import RunFolder


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


def plan(recipe: RecipeFile, overrides: Overrides = None, run: RunFolder = None) -> None:
    """Write which examples meet in which step, and print a summary."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.cli.printing import announce_stage
    from nearfield.console import stdout_console
    from nearfield.files import read_json
    from nearfield.pipeline import open_run, run_stages

    result = run_stages(open_run(recipe, overrides or (), run), "plan", on_stage=announce_stage)
    summary = read_json(result.folder / "plan" / "summary.json", "plan summary")
    table = Table("epoch", "batches", "examples", "tokens", "batches a source", "left out", box=None, pad_edge=False)
    for epoch in summary["epochs"]:
        by_source = ", ".join(f"{name} {count}" for name, count in epoch["batches_by_source"].items())
        dropped = ", ".join(f"{count} {reason}" for reason, count in epoch["dropped"].items()) or "none"
        figures = [f"{epoch[key]:,}" for key in ("epoch", "batches", "rows", "tokens")]
        table.add_row(*figures, Text(by_source), Text(dropped))
    console = stdout_console()
    console.print(table)
    console.print(f"{summary['steps']:,} steps, in {result.folder / 'plan'}", markup=False, highlight=False)
