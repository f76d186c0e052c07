"""``nearfield compare``: which model, or which way to train, is better, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.options import RESULTS, ResultsFolder, TaskNames
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.evaluation import ModelComparison
    from nearfield.evaluation.comparison import DifferenceRow, MethodComparison, ScoreRow, Standing


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare_command)


def compare_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Results folders (<org>__<model>/<revision>), models found below --results; or recipes (or folders of "
            "runs), to compare ways to train."
        ),
    ],
    results: ResultsFolder = RESULTS,
    runs: Annotated[Path, typer.Option("--runs", help="Where the runs of recipes are looked for.")] = Path("runs"),
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Compare with this one of the models instead of the first.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Published results: a folder of mteb's files, or 'mteb' for its repository."),
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Names for the table, separated by commas.")] = None,
    tasks: TaskNames = None,
    margin: Annotated[
        float | None, typer.Option("--margin", help="Test equivalence within this many points (of 100) too.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the whole comparison here.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Bootstrap resamples.")] = 10_000,
    permutations: Annotated[int, typer.Option("--permutations", help="Random permutations of a test.")] = 10_000,
    level: Annotated[float, typer.Option("--level", help="Level of the intervals; tests use one minus it.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of resamples and permutations.")] = 0,
) -> None:
    """Compare models on the tasks they share: scores with intervals, paired differences with tests, plain sentences.

    Recipes (or folders that hold runs) are compared as ways to train: paired by seed, with a verdict from five seeds on.
    """
    from nearfield.evaluation.comparison import check_settings
    from nearfield.files import write_json
    from nearfield.pipeline.methods import is_method

    check_settings(samples, permutations, level)
    named = [label.strip() for label in labels.split(",")] if labels is not None else None
    chosen = [task.strip() for task in tasks.split(",") if task.strip()] if tasks is not None else None
    made: ModelComparison | MethodComparison | Standing
    methods = [model for model in models if is_method(model)]
    if named is not None and len(named) != len(models):
        raise BadInputError(f"{len(models)} results but {len(named)} labels", where="labels")
    if methods:
        if len(methods) < len(models):
            other = next(model for model in models if model not in methods)
            raise BadInputError(
                f"{methods[0]} is a way to train and {other} a model: they cannot be compared", where="command line"
            )
        made = _methods(models, runs, named, baseline, chosen, level)
        show_methods(made)
    elif against is not None:
        made = _published(models, results, against, named, samples, level, seed)
        show_standing(made)
    else:
        made = _models(models, results, named, baseline, chosen, samples, permutations, level, seed, margin)
        show_comparison(made)
    if json_out is not None:
        write_json(json_out, made.to_json())


def _models(
    models: list[str],
    results: Path,
    named: list[str] | None,
    baseline: str | None,
    tasks: list[str] | None,
    samples: int,
    permutations: int,
    level: float,
    seed: int,
    margin: float | None,
) -> ModelComparison:
    from nearfield.evaluation import compare
    from nearfield.evaluation.results import find_results

    if len(models) < 2:
        raise BadInputError("a comparison needs two models or more", where="command line")
    folders = [find_results(model, results) for model in models]
    named = named or short_labels(folders)
    if baseline is not None and baseline not in named:
        baseline = named[_position(baseline, models, folders, results)]
    return compare(
        folders,
        named,
        baseline=baseline,
        tasks=tasks,
        samples=samples,
        permutations=permutations,
        level=level,
        seed=seed,
        margin=None if margin is None else margin / 100,
    )


def _methods(
    models: list[str], runs: Path, named: list[str] | None, baseline: str | None, tasks: list[str] | None, level: float
) -> MethodComparison:
    from nearfield.evaluation.comparison import compare_methods
    from nearfield.pipeline.methods import find_method

    if len(models) < 2:
        raise BadInputError("a comparison needs two methods or more", where="command line")
    methods = [find_method(name, runs, None if named is None else named[i]) for i, name in enumerate(models)]
    if baseline in models:
        baseline = methods[models.index(baseline)].label
    return compare_methods(methods, baseline=baseline, tasks=tasks, level=level)


def _published(
    models: list[str],
    results: Path,
    against: str,
    named: list[str] | None,
    samples: int,
    level: float,
    seed: int,
) -> Standing:
    from nearfield.evaluation.comparison import compare_published, published_folder
    from nearfield.evaluation.results import find_results

    if len(models) != 1:
        raise BadInputError("one model is set beside published results", where="command line", hint="Name one model.")
    folder = find_results(models[0], results)
    label = named[0] if named is not None else short_labels([folder])[0]
    return compare_published(folder, published_folder(against), label=label, samples=samples, level=level, seed=seed)


def short_labels(folders: list[Path]) -> list[str]:
    """Short names that tell models apart: the model's folder name, with the revision where that is not enough."""
    short = [folder.resolve().parent.name.replace("__", "/", 1) for folder in folders]
    if len(set(short)) == len(short):
        return short
    return [f"{name}@{folder.resolve().name[:8]}" for name, folder in zip(short, folders, strict=True)]


def _position(baseline: str, models: list[str], folders: list[Path], results: Path) -> int:
    from nearfield.evaluation.results import find_results

    if baseline in models:
        return models.index(baseline)
    folder = find_results(baseline, results)
    if folder not in folders:
        raise BadInputError(
            f"the baseline {baseline!r} is not among the models", where="--baseline", hint="Name one of the arguments."
        )
    return folders.index(folder)


def show_comparison(comparison: ModelComparison) -> None:
    """Print scores, differences and what they say."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.evaluation.scores import MARK, noticed

    console = stdout_console()
    level = f"{comparison.settings['level']:.0%}".rstrip()
    table = Table(title=Text(f"Scores with {level} intervals; differences to {comparison.baseline}"))
    for heading in ("task", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("score", f"{level} interval", "difference", f"{level} interval", "p", "effect", "units"):
        table.add_column(heading, justify="right")
    differences = {(d.task, d.subset, d.split, d.model): d for d in comparison.differences}
    marked = noticed(comparison.notices)
    for row in comparison.scores:
        difference = differences.get((row.task, row.subset, row.split, row.model))
        title = row.task + (f" {row.subset}" if row.subset != "default" else "")
        score, *numbers = _numbers(row, difference)
        table.add_row(Text(title), Text(row.model), score + (MARK if (row.model, row.task) in marked else ""), *numbers)
    console.print(table)
    for difference in comparison.differences:
        console.print(Text(difference.sentence))
    for row in comparison.scores:
        if row.reason is not None and row.model == comparison.baseline:
            console.print(Text(f"{row.task} {row.subset}: no interval, because {row.reason}."))
    for note in (*comparison.notes, *(notice.sentence for notice in comparison.notices)):
        console.print(Text(note))


def _numbers(row: ScoreRow, difference: DifferenceRow | None) -> list[str]:
    interval = f"[{row.low:.4f}, {row.high:.4f}]" if row.low is not None and row.high is not None else "none"
    units = "" if row.units is None else str(row.units)
    if row.clusters is not None and row.clusters != row.units:
        units += f" in {row.clusters} clusters"
    if difference is None:
        return [f"{row.score:.4f}", interval, "", "", "", "", units]
    between = ""
    if difference.low is not None and difference.high is not None:
        between = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
    p = "" if difference.p_adjusted is None else f"{difference.p_adjusted:.4f}"
    effect = "" if difference.effect is None else f"{difference.effect:+.2f}"
    return [f"{row.score:.4f}", interval, f"{difference.difference:+.4f}", between, p, effect, units]


def show_methods(comparison: MethodComparison) -> None:
    """Print what is said of ways to train."""
    from rich.text import Text

    from nearfield.console import stdout_console

    console = stdout_console()
    for row in comparison.rows:
        console.print(Text(row.sentence))
    for note in comparison.notes:
        console.print(Text(note))


def show_standing(standing: Standing) -> None:
    """Print where a model stands against published results."""
    from rich.text import Text

    from nearfield.console import stdout_console

    console = stdout_console()
    for title, (place, models) in standing.places.items():
        console.print(Text(f"{title}: place {place} of {models}"))
    for row in standing.rows:
        console.print(Text(row.sentence))
    for note in standing.notes:
        console.print(Text(note))
