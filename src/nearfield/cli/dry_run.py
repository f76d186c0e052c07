"""How ``nearfield train --dry-run`` shows what it found."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfield.pipeline.dry_run import DryRun
    from nearfield.training.forecast import Forecast
    from nearfield.training.forecast_notices import Machine


def show_dry_run(result: DryRun) -> None:
    """Print the forecast as a table, then the notices, what blocks first; of several trainings, one after the other."""
    for earlier in result.before:
        show_dry_run(earlier)
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.training.forecast import say_bytes

    console = stdout_console()
    if result.stage is not None:
        console.print(f"stage {result.stage}", style="bold", markup=False, highlight=False)
    if result.built:
        console.print(f"built: {', '.join(result.built)} (in {result.folder})", markup=False, highlight=False)
    if result.forecast is not None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in _lines(result.forecast, result):
            table.add_row(name, Text(value))
        console.print(table)
    else:
        console.print(Text(f"devices: {'; '.join(result.devices)}"))
    for notice in result.notices:
        word, style = ("blocks", "bold red") if notice.blocks else ("note", "yellow")
        console.print(Text.assemble((f"{word}: ", style), notice.what))
        if notice.hint:
            console.print(Text(f"  -> {notice.hint}"))
    free = "" if result.machine is None else f" {say_bytes(result.machine.disk_free)} of disk are free."
    console.print(
        f"The run would start; nothing was trained.{free}" if result.would_start else "The run would not start.",
        markup=False,
        highlight=False,
    )


def _lines(forecast: Forecast, result: DryRun) -> list[tuple[str, str]]:
    from nearfield.training.forecast import say_bytes, say_seconds

    padding = forecast.encoded_tokens / max(1, forecast.tokens) - 1
    about = "about " if forecast.sampled else ""
    how = "packed" if forecast.packing != "padded" else "padded"
    kept = f"graph kept in {forecast.kept_graphs:.0%} of steps, " if forecast.kept_graphs else "gradients cached, "
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
        ("chunks", f"{forecast.micro_batch_tokens:,} tokens at a time; {kept}up to {forecast.graph_tokens:,} tokens"),
        ("memory", f"{say_bytes(forecast.memory.peak)} at the peak, on each process: {', '.join(parts)}"),
        ("available", f"{say_bytes(forecast.available)} beside what is held" if forecast.available else "not known"),
        ("time", f"{say_seconds(forecast.seconds)} for the steps ({basis}); evaluation and export come on top"),
        *(() if result.machine is None else (("disk", _disk(result.machine, each)),)),
    ]


def _disk(machine: Machine, each: str) -> str:
    from nearfield.training.forecast import say_bytes

    return f"{say_bytes(machine.disk_needed)}: {machine.checkpoints} checkpoints of {each}, and the model"
