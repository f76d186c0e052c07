"""A run: ``nearfield train`` makes it or says what it would take; ``nearfield run status|verify|watch`` and ``nearfield report``
look at it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.app import Overrides, RecipeFile, RunFolder, announce_stage, line_of, quiet_libraries, table, tell
from nearfield.cli.compare import show_comparison
from nearfield.errors import EXIT_BAD_INPUT, BadInputError

if TYPE_CHECKING:
    from nearfield.pipeline.dry_run import DryRun
    from nearfield.training.forecast import Forecast, Machine


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(train)
    group = typer.Typer(help="Look at runs.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command()(status)
    group.command()(verify)
    group.command()(watch)
    app.add_typer(group, name="run")
    app.command("report")(report)


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
    quiet_libraries()
    from nearfield.pipeline import open_run, run_stages
    from nearfield.training.launch import Launch

    opened = open_run(recipe, overrides or (), run)
    if dry:
        from nearfield.pipeline.dry_run import dry_run

        if until is not None or restart or resume:
            raise BadInputError("--dry-run goes with none of --until, --restart, --resume")
        forecast = dry_run(opened, on_stage=announce_stage, strict=strict)
        if forecast is not None:
            show_dry_run(forecast)
            if not forecast.would_start:
                raise typer.Exit(EXIT_BAD_INPUT)
        return
    result = run_stages(opened, until, restart=restart, resume=resume, on_stage=announce_stage, strict=strict)
    if not Launch.from_environment().is_main:
        return
    comparison = result.folder / "comparison.json"
    if comparison.is_file() and until is None:
        # Brings mteb, which takes seconds to import and which the training itself can do without.
        from nearfield.evaluation import ModelComparison

        show_comparison(ModelComparison.from_json(comparison))
    for name, path in (("run", result.folder), ("model", result.model), ("report", result.report)):
        if path is not None:
            tell(f"{name + ':':8}{path}")


def show_dry_run(result: DryRun) -> None:
    """Print the forecast as a table, then the notices, what blocks first; of several trainings, one after the other."""
    for earlier in result.before:
        show_dry_run(earlier)
    from nearfield.training.forecast import say_bytes

    if result.stage is not None:
        tell(f"stage {result.stage}", style="bold")
    if result.built:
        tell(f"built: {', '.join(result.built)} (in {result.folder})")
    if result.forecast is not None:
        for name, value in _lines(result.forecast, result):
            tell(f"{name:11}{value}")
    else:
        tell(f"devices: {'; '.join(result.devices)}")
    for notice in result.notices:
        word, style = ("blocks", "bold red") if notice.blocks else ("note", "yellow")
        tell(line_of((f"{word}: ", style), notice.what))
        if notice.hint:
            tell(f"  -> {notice.hint}")
    free = "" if result.machine is None else f" {say_bytes(result.machine.disk_free)} of disk are free."
    tell(f"The run would start; nothing was trained.{free}" if result.would_start else "The run would not start.")


def _lines(forecast: Forecast, result: DryRun) -> list[tuple[str, str]]:
    from nearfield.training.forecast import say_bytes, say_seconds

    padding = forecast.encoded_tokens / max(1, forecast.tokens) - 1
    about = "about " if forecast.sampled else ""
    how = "packed" if forecast.packing != "padded" else "padded"
    graphs = f"graph kept in {forecast.kept_graphs:.0%} of steps, " if forecast.kept_graphs else "gradients cached, "
    parts = [
        f"{name} {say_bytes(value)}" for name, value in dataclasses.asdict(forecast.memory).items() if value >= 500_000
    ]
    basis = f"from {result.trial_steps} trial steps" if forecast.measured == "steps" else "from single chunks"
    each = say_bytes(forecast.checkpoint_bytes)
    busy = f", busy {forecast.busy:.1%} of the time" if forecast.world_size > 1 else ""
    return [
        ("steps", f"{forecast.steps:,} ({forecast.examples:,} examples)"),
        ("tokens", f"{forecast.tokens:,} real; {about}{forecast.encoded_tokens:,} as encoded ({how}, +{padding:.1%})"),
        ("parameters", f"{forecast.parameters:,}, of which {forecast.trained:,} are trained"),
        ("backend", f"{forecast.backend}, {forecast.world_size} process(es), each on {forecast.device}{busy}"),
        ("devices", "; ".join(result.devices)),
        ("chunks", f"{forecast.micro_batch_tokens:,} tokens at a time; {graphs}up to {forecast.graph_tokens:,} tokens"),
        ("memory", f"{say_bytes(forecast.memory.peak)} at the peak, on each process: {', '.join(parts)}"),
        ("available", f"{say_bytes(forecast.available)} beside what is held" if forecast.available else "not known"),
        ("time", f"{say_seconds(forecast.seconds)} for the steps ({basis}); evaluation and export come on top"),
        *(() if result.machine is None else (("disk", _disk(result.machine, each)),)),
    ]


def _disk(machine: Machine, each: str) -> str:
    from nearfield.training.forecast import say_bytes

    return f"{say_bytes(machine.disk_needed)}: {machine.checkpoints} checkpoints of {each}, and the model"


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
    parts = verify_run(opened)
    rows = [
        (
            part.name,
            f"{part.bytes / 1e6:,.1f}",
            Text(part.damage or "every byte is what was written", style="red" if part.damage else ""),
        )
        for part in parts
    ]
    tell(table(["what", "MB", ""], rows))
    damaged = [part for part in parts if part.damage]
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
