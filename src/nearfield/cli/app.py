"""The root of the tree of commands, and what they share: arguments and options, and how they show what they did."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

logger = logging.getLogger("nearfield")

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
Labels = Annotated[str | None, typer.Option("--labels", help="Names for the table, separated by commas.")]

app = typer.Typer(
    name="nearfield",
    help="Train and benchmark embedding models: planned batches, exact resume, scores with their uncertainty.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from nearfield import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and results only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    # Taken out before the commands see it, so that it may stand anywhere: see `nearfield.cli.main`.
    allow_local_code: Annotated[
        bool,
        typer.Option(
            "--allow-local-code",
            help="Let recipes name classes of the working folder (kind: module:Settings), not of installed packages alone.",
        ),
    ] = False,
    # The launcher `deepspeed` gives it to all programs; the environment says the same.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Options that every command shares."""
    from nearfield.console import set_up_logging

    # Under a launcher the first rank tells how it goes; the others speak when something is wrong.
    first = os.environ.get("RANK", "0") == "0"
    set_up_logging("INFO" if first and not quiet else "WARNING")
    if "RANK" not in os.environ:
        _end_in_order()


def _end_in_order() -> None:
    """Let SIGTERM end the process as an exit does, so that what was encoded is kept and half-written files are removed.

    Under a launcher, which also sends it to the ranks that others are waiting for, it ends a process at once.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """Takes arguments that begin with no command's name as those of ``run``: ``nearfield mine RECIPE`` beside ``nearfield mine
    audit RUN``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the command before the arguments where it is left out."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def names(value: str | None) -> list[str] | None:
    """The names in a text that separates them by commas; None where there is no text."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def announce_stage(stage: str, state: str) -> None:
    """Log that a stage runs, or that there is nothing to do."""
    logger.info("%s: %s", stage, "up to date" if state == "done" else "running")


def quiet_libraries() -> None:
    """Keep the bars and warnings of mteb, bm25s and transformers out of a command's output: ours say what matters.

    To be called before these are imported.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for name in ("mteb", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tell(words: object = "", style: str = "") -> None:
    """Print a line as it is, without markup, or a table."""
    from rich.text import Text

    from nearfield.console import stdout_console

    if isinstance(words, str):
        stdout_console().print(Text(words, style), soft_wrap=True)
    else:
        stdout_console().print(words)


def line_of(*parts: str | tuple[str, str]) -> Text:
    """A line of several parts, each words or (words, style)."""
    from rich.text import Text

    return Text.assemble(*parts)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, words: int = 0) -> Table:
    """A table whose cells are shown as they are, without markup.

    With a ``title`` it has a frame, and the columns behind the first ``words`` hold numbers, which stand to the right.
    """
    from rich.table import Table
    from rich.text import Text

    def cell(value: object) -> Text:
        return value if isinstance(value, Text) else Text(str(value))

    made = Table(box=None, pad_edge=False) if title is None else Table(title=Text(title))
    for number, head in enumerate(heads):
        if title is None:
            made.add_column(cell(head))
        else:
            made.add_column(cell(head), justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(cell, row))
    return made
