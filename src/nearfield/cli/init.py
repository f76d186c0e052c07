"""``nearfield init``: a project folder with the shipped recipes, or with recipes for one's own data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nearfield.data.guess import Guess


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(init)


def init(
    folder: Annotated[
        Path, typer.Argument(help="The project's folder; it is made if it does not exist.", metavar="DIR")
    ],
    data: Annotated[
        Path | None, typer.Option(help="A data file (JSONL, CSV, TSV, Parquet) to write recipes for.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name of the data; the file's name by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ.")] = False,
) -> None:
    """Write the recipes, suites and data recipes to begin with."""
    if data is None:
        if name is not None:
            raise typer.BadParameter("--name goes with --data")
        _copy(folder, force)
    else:
        _own_data(folder, data, name, force)


def _copy(folder: Path, force: bool) -> None:
    from nearfield.console import stdout_console
    from nearfield.shipped import copy_shipped

    console = stdout_console()
    copied = copy_shipped(folder, force)
    for file in copied.written:
        console.print(f"wrote {folder / file}", markup=False, highlight=False)
    if copied.unchanged:
        console.print(f"{len(copied.unchanged)} files were there already")
    console.print("Next:", highlight=False)
    console.print(f"  cd {folder} && nearfield train training/recipes/wordnet.yaml", markup=False, highlight=False)


def _own_data(folder: Path, data: Path, name: str | None, force: bool) -> None:
    from nearfield.console import stdout_console
    from nearfield.data.guess import guess_columns, safe_name
    from nearfield.data.project import write_project

    console = stdout_console()
    guess = guess_columns(data, safe_name(Path(name)) if name else None)
    print_guess(guess)
    project = write_project(guess, folder, force)
    for file in (project.data, project.suite, project.recipe):
        console.print(f"wrote {folder / file}", markup=False, highlight=False)
    console.print("Next:", highlight=False)
    console.print(f"  cd {folder}", markup=False, highlight=False)
    for step in (f"nearfield recipe check {project.recipe}", f"nearfield train {project.recipe}"):
        console.print(f"  {step}", markup=False, highlight=False)


def print_guess(guess: Guess) -> None:
    """What the columns were taken for, and the first examples."""
    from rich.text import Text

    from nearfield.console import stdout_console

    console = stdout_console()
    kind = guess.source.examples.kind
    console.print(
        Text(f"{guess.path.name}: {guess.rows:,} rows, read as {kind} examples in {guess.groups:,} groups", "bold")
    )
    for role, column in guess.columns.items():
        console.print(Text(f"  {role}: {column if isinstance(column, str) else ', '.join(column)}"))
    for note in guess.notes:
        console.print(Text(f"  note: {note}"))
    for number, example in enumerate(guess.examples, start=1):
        console.print(Text(f"example {number}", "bold"))
        parts = [("query" if example.positives else "item", example.query)]
        parts += [("positive" if example.score is None else "second", text) for text in example.positives]
        parts += [("negative", text) for text in example.negatives]
        for name, text in parts:
            console.print(Text(f"  {name:<9}{str(text)[:200]}"))
        if example.score is not None:
            console.print(Text(f"  score    {example.score:g}"))
        if example.label is not None:
            console.print(Text(f"  label    {example.label}"))
