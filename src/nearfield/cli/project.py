"""A project and its machine: ``nearfield init``, ``nearfield recipe check|show|schema|kinds``, ``nearfield doctor``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.app import Overrides, RecipeFile, quiet_libraries, table, tell
from nearfield.cli.data import example_parts

if TYPE_CHECKING:
    from nearfield.conformance.runner import Outcome
    from nearfield.data.infer import InferredSource

logger = logging.getLogger("nearfield")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(init)
    group = typer.Typer(
        help="Check a recipe, show it with all defaults, write its JSON schema, list what it can name.",
        no_args_is_help=True,
    )
    group.command()(check)
    group.command()(show)
    group.command()(schema)
    group.command()(kinds)
    app.add_typer(group, name="recipe")
    app.command()(doctor)


def init(
    folder: Annotated[
        Path, typer.Argument(help="The project's folder; it is made if it does not exist.", metavar="DIR")
    ],
    data: Annotated[
        Path | None, typer.Option(help="A data file (JSONL, CSV, TSV, Parquet) to write recipes for.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name of the data; the file's name by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ.")] = False,
) -> None:
    """Write the recipes, suites and data recipes to begin with."""
    if data is None:
        if name is not None:
            raise typer.BadParameter("--name goes with --data")
        _copy(folder, force)
    else:
        _own_data(folder, data, name, force)


def _copy(folder: Path, force: bool) -> None:
    from nearfield.shipped import copy_shipped

    copied = copy_shipped(folder, force)
    for file in copied.written:
        tell(f"wrote {folder / file}")
    if copied.unchanged:
        tell(f"{len(copied.unchanged)} files were there already")
    tell("Next:")
    tell(f"  cd {folder} && nearfield train training/recipes/wordnet.yaml")


def _own_data(folder: Path, data: Path, name: str | None, force: bool) -> None:
    from nearfield.data.infer import infer_source, safe_name, write_project

    inferred = infer_source(data, safe_name(Path(name)) if name else None)
    print_inferred(inferred)
    project = write_project(inferred, folder, force)
    for file in (project.data, project.suite, project.recipe):
        tell(f"wrote {folder / file}")
    tell("Next:")
    tell(f"  cd {folder}")
    for step in (f"nearfield recipe check {project.recipe}", f"nearfield train {project.recipe}"):
        tell(f"  {step}")


def print_inferred(inferred: InferredSource) -> None:
    """Print the roles that the columns were given, and the first examples."""
    kind = inferred.source.examples.form
    tell(f"{inferred.path.name}: {inferred.rows:,} rows, read as {kind} examples in {inferred.groups:,} groups", "bold")
    for role, column in inferred.columns.items():
        tell(f"  {role}: {column if isinstance(column, str) else ', '.join(column)}")
    for note in inferred.notes:
        tell(f"  note: {note}")
    for number, example in enumerate(inferred.examples, start=1):
        tell(f"example {number}", "bold")
        for name, text in example_parts(example):
            tell(f"  {name:<9}{text[:200]}")


def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe and the files that it names."""
    from nearfield.config import outside_sources
    from nearfield.recipe import check_recipe, load_recipe

    checked = check_recipe(load_recipe(recipe, overrides or ()))
    tell(f"{recipe}: valid. Trains on {', '.join(source.name for source in checked.sources)}.")
    for source in outside_sources([checked.recipe, checked.data, checked.suite, checked.training_suite]):
        tell(f"{source}.")


def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print every setting of a recipe with the place that it came from."""
    from rich.text import Text

    from nearfield.recipe import load_recipe, resolve

    rows = [
        (
            setting.key,
            "null" if setting.value is None else setting.value,
            Text(setting.origin, "dim" if setting.origin == "default" else ""),
        )
        for setting in resolve(load_recipe(recipe, overrides or ()))
    ]
    tell(table(["setting", "value", "from"], rows))


def schema(out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None) -> None:
    """Write the JSON schema of recipes, which editors complete and check with."""
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
    import nearfield.recipe  # noqa: F401 (brings the tables of all parts)
    from nearfield.config import PARTS
    from nearfield.errors import BadInputError

    if part is not None and part not in PARTS:
        raise BadInputError(f"there is no part {part!r}", hint=f"Parts: {', '.join(sorted(PARTS))}.")
    rows = [
        (name, kind, part_kinds.help(kind))
        for name, part_kinds in sorted(PARTS.items())
        for kind in (part_kinds.names() if part in (None, name) else ())
    ]
    tell(table(["part", "kind", "what it is"], rows))


def doctor(
    conformance: Annotated[
        bool, typer.Option("--conformance", help="Check that gradients are right on every backend; minutes.")
    ] = False,
    backend: Annotated[list[str] | None, typer.Option(help="Check this backend only; may be given again.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the lines of the table to this file.")] = None,
) -> None:
    """Show versions and devices; with --conformance, run the equalities that every backend must satisfy.

    The table can be pasted into a bug report. The equalities run on CPUs, several processes where ranks matter.
    """
    quiet_libraries()
    from nearfield.provenance import device, versions

    for name, value in {**versions(), **device()}.items():
        tell(f"{name:24}{value}")
    if not conformance:
        return
    from nearfield.conformance.runner import run_all
    from nearfield.errors import EXIT_FAULT
    from nearfield.files import write_json

    outcomes = run_all(
        backend or (), lambda name, ranks: logger.info("Checking %s on %d process%s", name, ranks, "es" * (ranks > 1))
    )
    tell()
    for text in equalities(outcomes):
        tell(text)
    if json_file is not None:
        lines = [{**line.to_json(), "passed": line.passed} for outcome in outcomes for line in outcome.lines]
        write_json(json_file, lines)
    if not all(outcome.passed or outcome.skipped for outcome in outcomes):
        raise typer.Exit(EXIT_FAULT)


def equalities(outcomes: Sequence[Outcome]) -> list[str]:
    """The lines of the table: backend, ranks, verdict, what was found against its limit, the equality."""
    texts = [f"{'backend':8} {'ranks':5} {'':4} {'found':>9}    {'limit':>9}  equality"]
    for outcome in outcomes:
        head = f"{outcome.backend:8} {outcome.ranks:<5} "
        for line in outcome.lines:
            verdict = "ok" if line.passed else "FAIL"
            sign = ">=" if line.at_least else "<="
            texts.append(f"{head}{verdict:4} {line.value:9.2e} {sign} {line.limit:9.2e}  {line.check}")
        if outcome.error:
            texts.append(f"{head}FAIL {outcome.error}")
        if outcome.skipped:
            texts.append(f"{head}skip {outcome.skipped}")
    lines = [line for outcome in outcomes for line in outcome.lines]
    skipped = sum(outcome.skipped is not None for outcome in outcomes)
    broken = sum(outcome.error is not None for outcome in outcomes)
    passed = sum(line.passed for line in lines)
    texts.append(f"{passed} of {len(lines)} equalities hold; {broken} launches ended early, {skipped} were left out")
    return texts
