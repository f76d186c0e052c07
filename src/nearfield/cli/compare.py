"""``nearfield compare`` and ``nearfield leaderboard``: which model, or which way to train, is better, and how sure that is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.app import RESULTS, Labels, ResultsFolder, TaskNames, names, table, tell
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.evaluation import ModelComparison
    from nearfield.evaluation.comparison import DifferenceRow, MethodComparison, ScoreRow, Standing
    from nearfield.evaluation.leaderboard import Leaderboard, Value


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("compare")(compare_command)
    app.command("leaderboard")(leaderboard_command)


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
    labels: Labels = None,
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
    from nearfield.evaluation import compare, label_results
    from nearfield.evaluation.comparison import check_settings
    from nearfield.files import write_json
    from nearfield.pipeline.run import is_method

    check_settings(samples, permutations, level)
    named, chosen = names(labels), names(tasks)
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
        folders, named, baseline = _models(models, results, named, baseline)
        made = compare(
            label_results(folders, named),
            baseline=baseline,
            tasks=chosen,
            samples=samples,
            permutations=permutations,
            level=level,
            seed=seed,
            margin=None if margin is None else margin / 100,
        )
        show_comparison(made)
    if json_out is not None:
        write_json(json_out, made.to_json())


def _models(
    models: list[str], results: Path, named: list[str] | None, baseline: str | None
) -> tuple[list[Path], list[str], str | None]:
    """The results of models, their names in the table, and the name of the baseline."""
    from nearfield.evaluation.results import find_results

    if len(models) < 2:
        raise BadInputError("a comparison needs two models or more", where="command line")
    folders = [find_results(model, results) for model in models]
    named = named or short_labels(folders)
    if baseline is not None and baseline not in named:
        baseline = named[_position(baseline, models, folders, results)]
    return folders, named, baseline


def _methods(
    models: list[str], runs: Path, named: list[str] | None, baseline: str | None, tasks: list[str] | None, level: float
) -> MethodComparison:
    from nearfield.evaluation.comparison import compare_methods
    from nearfield.pipeline.run import find_method

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
    from nearfield.evaluation.scores import MARK, noticed

    level = f"{comparison.settings['level']:.0%}".rstrip()
    differences = {(d.task, d.subset, d.split, d.model): d for d in comparison.differences}
    marked, rows = noticed(comparison.notices), []
    for row in comparison.scores:
        difference = differences.get((row.task, row.subset, row.split, row.model))
        title = row.task + (f" {row.subset}" if row.subset != "default" else "")
        score, *numbers = _numbers(row, difference)
        rows.append([title, row.model, score + (MARK if (row.model, row.task) in marked else ""), *numbers])
    interval = f"{level} interval"
    heads = ["task", "model", "score", interval, "difference", interval, "p", "effect", "units"]
    tell(table(heads, rows, f"Scores with {level} intervals; differences to {comparison.baseline}", words=2))
    for difference in comparison.differences:
        tell(difference.sentence)
    for row in comparison.scores:
        if row.model == comparison.baseline:
            tell(f"{row.title}: no interval, because {row.reason}." if row.reason else f"{row.title}: {row.resampled}.")
        elif row.reason is not None and row.score != row.score:
            tell(f"{row.title}: {row.model} has no score, because {row.reason}.")
        if row.caution is not None:
            tell(f"{row.title}, {row.model}: {row.caution}.")
    for note in (*comparison.notes, *(notice.sentence for notice in comparison.notices)):
        tell(note)


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
    for row in comparison.rows:
        tell(row.sentence)
    for note in comparison.notes:
        tell(note)


def show_standing(standing: Standing) -> None:
    """Print where a model stands against published results."""
    for title, (place, models) in standing.places.items():
        tell(f"{title}: place {place} of {models}")
    for row in standing.rows:
        tell(row.sentence)
    for note in standing.notes:
        tell(note)


def leaderboard_command(
    models: Annotated[
        list[str] | None, typer.Argument(help="Results folders or models; all models below --results by default.")
    ] = None,
    results: ResultsFolder = RESULTS,
    labels: Labels = None,
    tasks: TaskNames = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the whole table here.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table here, as Markdown.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Joint draws of all models.")] = 2_000,
    level: Annotated[float, typer.Option("--level", help="Level of intervals and rank sets.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
) -> None:
    """Rank models by Borda points and means, with intervals and the ranks that each may hold."""
    from nearfield.evaluation.leaderboard import leaderboard
    from nearfield.evaluation.results import all_results, find_results
    from nearfield.files import write_json, write_text

    folders = [find_results(model, results) for model in models] if models else all_results(results)
    if not folders:
        raise BadInputError("there are no results", where=str(results), hint="Score models with nearfield eval.")
    named = names(labels) or short_labels(folders)
    board = leaderboard(folders, named, tasks=names(tasks), samples=samples, level=level, seed=seed)
    if json_out is not None:
        write_json(json_out, board.to_json())
    if markdown is not None:
        write_text(markdown, as_markdown(board))
    _show(board)


HEADINGS = ("place", "model", "mean of tasks", "ranks", "mean of types", "Borda", "mean rank")


def _cells(board: Leaderboard) -> list[list[str]]:
    from nearfield.evaluation.scores import MARK

    rows, marked = [], {notice.model for notice in board.notices}
    for row in board.rows:
        ranks = "" if row.rank_low is None else _range(row.rank_low, row.rank_high)
        rows.append(
            [
                str(row.place),
                row.label + (MARK if row.label in marked else ""),
                _words(row.mean_task, 4),
                ranks,
                _words(row.mean_type, 4),
                _words(row.borda, 1),
                _words(row.mean_rank, 2),
            ]
        )
    return rows


def _range(low: int, high: int | None) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _words(value: Value, digits: int) -> str:
    if value.value is None:
        return "tasks missing"
    ends = "" if value.low is None or value.high is None else f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value.value:.{digits}f}{ends}"


def _about(board: Leaderboard) -> list[str]:
    level = f"{100 * board.settings['level']:g} %"
    return [
        f"{len(board.tasks)} {'task' if len(board.tasks) == 1 else 'tasks'}. Ranks: by the mean of tasks, sets that hold all true ranks at once with {level}. That two "
        "models cannot be told apart is not transitive, so models with overlapping sets form no group. Borda points depend "
        "on which models are in the table.",
        *board.notes,
        *(notice.sentence for notice in board.notices),
    ]


def as_markdown(board: Leaderboard) -> str:
    """The table, the scores of each task and the notes as Markdown."""
    from nearfield.evaluation.scores import MARK, noticed

    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(_escape(cell) for cell in cells) + " |" for cells in _cells(board)]
    lines += ["", "| model | " + " | ".join(task.name for task in board.tasks) + " |"]
    lines += ["| --- |" + " ---: |" * len(board.tasks)]
    marked = noticed(board.notices)
    for row in board.rows:
        scores = [
            f"{row.scores[task.name]:.4f}{MARK if (row.label, task.name) in marked else ''}"
            if task.name in row.scores
            else ""
            for task in board.tasks
        ]
        lines.append(f"| {_escape(row.label)} | " + " | ".join(scores) + " |")
    # A line that begins with an asterisk would be a list's.
    return "\n".join([*lines, "", *(re.sub(r"^\*", r"\\*", line) for line in _about(board))]) + "\n"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def _show(board: Leaderboard) -> None:
    tell(table(HEADINGS, _cells(board), f"{len(board.rows)} models on {len(board.tasks)} tasks", words=2))
    for line in _about(board):
        tell(line)
