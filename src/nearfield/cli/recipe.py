"""``nearfield recipe check|show|schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nearfield.cli.options import Overrides, RecipeFile


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Check a recipe, show it with all defaults, write its JSON schema, list what it can name.",
        no_args_is_help=True,
    )
    group.command()(check)
    group.command()(show)
    group.command()(schema)
    group.command()(kinds)
    app.add_typer(group, name="recipe")


def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe and the files that it names."""
    from nearfield.console import stdout_console
    from nearfield.kinds import outside_sources
    from nearfield.recipe import check_recipe, load_recipe

    checked = check_recipe(load_recipe(recipe, overrides or ()))
    names = ", ".join(source.name for source in checked.sources)
    console = stdout_console()
    console.print(f"{recipe}: valid. Trains on {names}.", markup=False, highlight=False)
    for source in outside_sources([checked.recipe, checked.data, checked.suite, checked.training_suite]):
        console.print(f"{source}.", markup=False, highlight=False, soft_wrap=True)


def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print every setting of a recipe with the place that it came from."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.recipe import load_recipe, resolve

    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for value in resolve(load_recipe(recipe, overrides or ())):
        shown = "null" if value.value is None else str(value.value)
        table.add_row(
            Text(value.key), Text(shown), Text(value.origin, style="dim" if value.origin == "default" else "")
        )
    stdout_console().print(table)


def schema(out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None) -> None:
    """Write the JSON schema of recipes, which editors complete and check with."""
    import json

    from nearfield.files import write_text
    from nearfield.recipe import recipe_schema

    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)


def kinds(
    part: Annotated[str | None, typer.Argument(help="One part alone, such as objectives.", metavar="[PART]")] = None,
) -> None:
    """List the kinds that recipes can name, a line about each; those of installed packages too."""
    from rich.table import Table
    from rich.text import Text

    import nearfield.recipe  # noqa: F401 (brings the tables of all parts)
    from nearfield.console import stdout_console
    from nearfield.errors import BadInputError
    from nearfield.kinds import PARTS

    if part is not None and part not in PARTS:
        raise BadInputError(f"there is no part {part!r}", hint=f"Parts: {', '.join(sorted(PARTS))}.")
    table = Table("part", "kind", "what it is", box=None, pad_edge=False)
    for name, found in sorted(PARTS.items()):
        for kind in found.names() if part in (None, name) else ():
            table.add_row(name, Text(kind), Text(found.help(kind)))
    stdout_console().print(table)
