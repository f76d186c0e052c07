"""``nearfield compare``: which model is better, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.evaluation import Comparison
    from nearfield.evaluation.comparison import DifferenceRow, ScoreRow


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare_command)


def compare_command(
    models: Annotated[
        list[str], typer.Argument(help="Results folders (<org>__<model>/<revision>), or models found below --results.")
    ],
    results: Annotated[Path, typer.Option("--results", help="The folder that nearfield eval filed results in.")] = Path(
        "results"
    ),
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Compare with this one of the models instead of the first.")
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Names for the table, separated by commas.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Only these tasks, separated by commas.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the whole comparison here.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Bootstrap resamples.")] = 10_000,
    permutations: Annotated[int, typer.Option("--permutations", help="Random permutations of a test.")] = 10_000,
    level: Annotated[float, typer.Option("--level", help="Level of the intervals; tests use one minus it.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of resamples and permutations.")] = 0,
) -> None:
    """Compare models on the tasks they share: scores with intervals, paired differences with tests, plain sentences."""
    from nearfield.evaluation import compare
    from nearfield.evaluation.find import find_results
    from nearfield.files import write_json

    if len(models) < 2:
        raise BadInputError("a comparison needs two models or more", where="command line")
    folders = [find_results(model, results) for model in models]
    named = [label.strip() for label in labels.split(",")] if labels is not None else None
    chosen = [task.strip() for task in tasks.split(",") if task.strip()] if tasks is not None else None
    base = baseline
    if named is None:
        named = _labels(models, folders)
    if base is not None and base not in named:
        base = named[_position(base, models, folders, results)]
    comparison = compare(
        folders,
        named,
        baseline=base,
        tasks=chosen,
        samples=samples,
        permutations=permutations,
        level=level,
        seed=seed,
    )
    if json_out is not None:
        write_json(json_out, comparison.to_json())
    show_comparison(comparison)


def _labels(models: list[str], folders: list[Path]) -> list[str]:
    """Short names that tell the models apart: the model's folder name, with the revision where that is not enough."""
    short = [folder.resolve().parent.name.replace("__", "/", 1) for folder in folders]
    if len(set(short)) == len(short):
        return short
    return [f"{name}@{folder.resolve().name[:8]}" for name, folder in zip(short, folders, strict=True)]


def _position(baseline: str, models: list[str], folders: list[Path], results: Path) -> int:
    from nearfield.evaluation.find import find_results

    if baseline in models:
        return models.index(baseline)
    folder = find_results(baseline, results)
    if folder not in folders:
        raise BadInputError(
            f"the baseline {baseline!r} is not among the models", where="--baseline", hint="Name one of the arguments."
        )
    return folders.index(folder)


def show_comparison(comparison: Comparison) -> None:
    """Print scores, differences and what they say."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console

    console = stdout_console()
    level = f"{comparison.settings['level']:.0%}".rstrip()
    table = Table(title=Text(f"Scores with {level} intervals; differences to {comparison.baseline}"))
    for heading in ("task", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("score", f"{level} interval", "difference", f"{level} interval", "p", "units"):
        table.add_column(heading, justify="right")
    differences = {(d.task, d.subset, d.split, d.model): d for d in comparison.differences}
    for row in comparison.scores:
        difference = differences.get((row.task, row.subset, row.split, row.model))
        title = row.task + (f" {row.subset}" if row.subset != "default" else "")
        table.add_row(Text(title), Text(row.model), *_numbers(row, difference))
    console.print(table)
    for difference in comparison.differences:
        console.print(Text(difference.sentence))
    for row in comparison.scores:
        if row.reason is not None and row.model == comparison.baseline:
            console.print(Text(f"{row.task} {row.subset}: no interval, because {row.reason}."))
    for note in comparison.notes:
        console.print(Text(note))


def _numbers(row: ScoreRow, difference: DifferenceRow | None) -> list[str]:
    interval = f"[{row.low:.4f}, {row.high:.4f}]" if row.low is not None and row.high is not None else "none"
    units = "" if row.units is None else str(row.units)
    if row.clusters is not None and row.clusters != row.units:
        units += f" in {row.clusters} clusters"
    if difference is None:
        return [f"{row.score:.4f}", interval, "", "", "", units]
    between = ""
    if difference.low is not None and difference.high is not None:
        between = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
    p = "" if difference.p_adjusted is None else f"{difference.p_adjusted:.4f}"
    return [f"{row.score:.4f}", interval, f"{difference.difference:+.4f}", between, p, units]
