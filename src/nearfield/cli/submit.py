"""``nearfield submit`` and ``nearfield card``: results on their way to a leaderboard and into a model's card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nearfield.cli.options import RESULTS, Base, ResultsFolder, Strict
from nearfield.errors import EXIT_FAULT, BadInputError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("submit")(submit_command)
    app.command("card")(card_command)


def submit_command(
    model: Annotated[str, typer.Argument(help="A results folder, or a model found below --results.")],
    results: ResultsFolder = RESULTS,
    benchmark: Annotated[
        str | None,
        typer.Option("--benchmark", help="The benchmark whose tasks must be complete, e.g. 'MTEB(eng, v2)'."),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option("--facts", help="YAML with fields of mteb's ModelMeta: license, training_datasets, ..."),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--model", help="The model's folder, for its card.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The submission's folder; replaced if it is there.")] = Path(
        "submission"
    ),
    hub: Annotated[
        str | None,
        typer.Option("--hub", help="Push the folder of --model, with its card, to this ORGANISATION/NAME of the hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that --hub makes is private.")] = False,
    strict: Strict = False,
    base: Base = None,
) -> None:
    """Check what the leaderboard asks for, lay out the submission, and say what is left to do.

    Leaves with 1 if something that is required is missing, with 2 under --strict if the scores have notices; the folder is
    written all the same.
    """
    from nearfield.cli.printing import quiet_libraries

    quiet_libraries()
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.evaluation.results import find_results
    from nearfield.evaluation.submission import submit
    from nearfield.notices import refuse

    found = find_results(model, results)
    console = stdout_console()
    if hub is not None and folder is None:
        raise BadInputError("--hub pushes a model's folder", where="--hub", hint="Name the folder with --model.")
    # What cannot be read is said before anything is pushed.
    made = submit(found, out, benchmark=benchmark, facts=facts, model=folder, base=base)
    if strict:
        refuse(made.notices, where=str(found))
    if hub is not None and folder is not None:
        from nearfield.evaluation.hub import push

        pushed = push(folder, hub, found, private=private)
        console.print(Text(f"pushed {len(pushed.files)} files to {pushed.repository}, commit {pushed.commit}"))
        if found.name != pushed.commit:
            console.print(Text("The leaderboard wants the results of that commit: score it once more, by name."))
    for check in made.checks:
        mark = "ok      " if check.ok else "missing " if check.required else "advised "
        console.print(Text(f"{mark}{check.name}: {check.detail}"))
    if made.unstated:
        console.print(Text("A file for --facts states what is true of this model, in this form:"))
        for line in made.unstated:
            console.print(Text(f"  {line}"))
    console.print(Text(f"submission: {made.folder}"))
    if not made.complete:
        console.print(Text("It is not complete yet: see 'missing' above. Then:"))
    for number, step in enumerate(made.steps, start=1):
        console.print(Text(f"{number}. {step}"))
    if not made.complete:
        raise typer.Exit(EXIT_FAULT)


def card_command(
    model: Annotated[Path, typer.Argument(help="The model's folder; its README.md is changed.")],
    scored: Annotated[
        str | None, typer.Option("--scores", help="A results folder or a model's name; by default the model's own.")
    ] = None,
    results: ResultsFolder = RESULTS,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the intervals' resamples.")] = 0,
    base: Base = None,
) -> None:
    """Write a model's scores with their intervals, prompts and versions into its card; the rest of it stays.

    --base says in the folder of an adapter that its base lies elsewhere now.
    """
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.evaluation.card import update_card
    from nearfield.evaluation.results import find_results

    if base is not None:
        from nearfield.encoders.build import relink

        relink(model, base)
    path = update_card(model, find_results(scored or str(model), results), seed=seed)
    stdout_console().print(Text(f"{path} has the scores"))
