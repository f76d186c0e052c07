"""``nearfield train``: run all stages of a recipe that are missing or stale."""

from __future__ import annotations

from typing import Annotated

import typer

from nearfield.cli.options import Overrides, RecipeFile, RunFolder
from nearfield.errors import EXIT_BAD_INPUT, BadInputError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    run: RunFolder = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage (data, tokens, plan, train ...).")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Train from the start; old checkpoints are kept aside.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; an error if there is none.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Make errors of what a user should know, before the training begins.")
    ] = False,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what the run will take and what is wrong with it; train nothing."),
    ] = False,
) -> None:
    """Build, plan, train, evaluate, compare and report: whatever of it is missing or stale.

    An interrupted training goes on from its newest checkpoint. Under `torchrun`, `accelerate launch` or `deepspeed` all
    processes train together; the first does the rest.
    """
    from nearfield.cli.printing import announce_stage, quiet_libraries

    quiet_libraries()
    from nearfield.cli.compare import show_comparison
    from nearfield.console import stdout_console
    from nearfield.pipeline import open_run, run_stages
    from nearfield.training.launch import Launch

    opened = open_run(recipe, overrides or (), run)
    if dry:
        from nearfield.cli.dry_run import show_dry_run
        from nearfield.pipeline.dry_run import dry_run

        if until is not None or restart or resume:
            raise BadInputError("--dry-run goes with none of --until, --restart, --resume")
        found = dry_run(opened, on_stage=announce_stage, strict=strict)
        if found is not None:
            show_dry_run(found)
            if not found.would_start:
                raise typer.Exit(EXIT_BAD_INPUT)
        return
    result = run_stages(opened, until, restart=restart, resume=resume, on_stage=announce_stage, strict=strict)
    if not Launch.from_environment().is_main:
        return
    console = stdout_console()
    comparison = result.folder / "comparison.json"
    if comparison.is_file() and until is None:
        # Brings mteb, which takes seconds to import and which the training itself can do without.
        from nearfield.evaluation import ModelComparison

        show_comparison(ModelComparison.from_json(comparison))
    for name, path in (("run", result.folder), ("model", result.model), ("report", result.report)):
        if path is not None:
            console.print(f"{name + ':':8}{path}", markup=False, highlight=False)
