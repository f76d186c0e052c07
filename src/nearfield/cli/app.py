"""The tree of commands."""

from __future__ import annotations

import importlib

import typer

app = typer.Typer(
    name="nearfield",
    help="Train and benchmark embedding models: planned batches, exact resume, scores with their uncertainty.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for module in ("init", "recipe", "data", "plan", "train", "eval", "compare", "report", "run"):
    importlib.import_module(f"nearfield.cli.{module}").register(app)
