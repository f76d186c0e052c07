"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.", metavar="[KEY=VALUE]...")]
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
# Not `--run`: torchrun would take that for a beginning of its own `--run-path`.
RunFolder = Annotated[Path | None, typer.Option("--run-folder", help="The run's folder; runs/NAME by default.")]
ResultsFolder = Annotated[Path, typer.Option("--results", help="The folder that nearfield eval filed results in.")]
RESULTS = Path("results")
Strict = Annotated[bool, typer.Option("--strict", help="Notices (what a reader must know of the scores) are errors.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Where the base of an adapter lies that was saved alone, if not where it says."),
]
TaskNames = Annotated[str | None, typer.Option("--tasks", help="Only these tasks, separated by commas.")]
