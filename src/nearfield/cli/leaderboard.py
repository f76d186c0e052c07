"""``nearfield leaderboard``: rank models over tasks, and say which ranks the data allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.options import RESULTS, ResultsFolder, TaskNames
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.evaluation.leaderboard import Leaderboard, Value


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("leaderboard")(leaderboard_command)


def leaderboard_command(
    models: Annotated[
        list[str] | None, typer.Argument(help="Results folders or models; all models below --results by default.")
    ] = None,
    results: ResultsFolder = RESULTS,
    labels: Annotated[str | None, typer.Option("--labels", help="Names for the table, separated by commas.")] = None,
    tasks: TaskNames = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the whole table here.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table here, as Markdown.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Joint draws of all models.")] = 2_000,
    level: Annotated[float, typer.Option("--level", help="Level of intervals and rank sets.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
) -> None:
    """Rank models by Borda points and means, with intervals and the ranks that each may hold."""
    from nearfield.cli.compare import short_labels
    from nearfield.evaluation.leaderboard import leaderboard
    from nearfield.evaluation.results import all_results, find_results
    from nearfield.files import write_json, write_text

    folders = [find_results(model, results) for model in models] if models else all_results(results)
    if not folders:
        raise BadInputError("there are no results", where=str(results), hint="Score models with nearfield eval.")
    named = [label.strip() for label in labels.split(",")] if labels is not None else short_labels(folders)
    chosen = [task.strip() for task in tasks.split(",") if task.strip()] if tasks is not None else None
    board = leaderboard(folders, named, tasks=chosen, samples=samples, level=level, seed=seed)
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
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console

    console = stdout_console()
    table = Table(title=Text(f"{len(board.rows)} models on {len(board.tasks)} tasks"))
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold", justify="left" if heading == "model" else "right")
    for cells in _cells(board):
        table.add_row(*map(Text, cells))
    console.print(table)
    for line in _about(board):
        console.print(Text(line))
