"""``nearfield twins``: a domain's suite beside its general twin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nearfield.cli.app import RESULTS, ResultsFolder, quiet_libraries, table, tell
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.methods.twins import Twins


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("twins")(twins_command)


def twins_command(
    models: Annotated[list[str], typer.Argument(help="Results folders, or models found below --results.")],
    general: Annotated[Path, typer.Option("--general", help="The general suite, or a folder of local tasks.")],
    domain: Annotated[Path, typer.Option("--domain", help="The domain's suite: tasks of the same types.")],
    results: ResultsFolder = RESULTS,
    measures: Annotated[
        Path | None,
        typer.Option("--measures", help="JSON {measure: {task: value}}: an LLM's errors, dependency distances, ..."),
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", help="Measure the complexity of so many texts a task; 0 leaves that out.")
    ] = 1_000,
    samples: Annotated[int, typer.Option("--samples", help="Draws of the intervals.")] = 2_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Is a domain harder for these models than its general twin, do they keep their order, and is it the texts' complexity?"""
    quiet_libraries()
    from nearfield.evaluation.config import open_suite
    from nearfield.evaluation.results import find_results
    from nearfield.files import write_json
    from nearfield.methods.twins import twins

    sides = [open_suite(general), open_suite(domain)]
    complexity = _given(measures)
    if texts:
        for measure, values in _measured([task for side in sides for task in side], texts, seed).items():
            complexity.setdefault(measure, values)
    made = twins(
        [find_results(model, results) for model in models],
        [task.name for task in sides[0]],
        [task.name for task in sides[1]],
        complexity=complexity,
        samples=samples,
        seed=seed,
    )
    if json_out is not None:
        write_json(json_out, made.to_json())
    _show(made)


def _given(path: Path | None) -> dict[str, dict[str, float]]:
    from nearfield.files import read_json

    if path is None:
        return {}
    value = read_json(path, "file of measures")
    try:
        return {str(name): {str(task): float(of) for task, of in tasks.items()} for name, tasks in value.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInputError("measures are an object of objects of numbers", where=str(path)) from error


def _measured(tasks: list[Any], most: int, seed: int) -> dict[str, dict[str, float]]:
    """Measure -> task -> value. English is measured by fog too; other languages are left out there, not guessed."""
    from nearfield.evaluation.texts import labelled_texts
    from nearfield.methods.twins import text_measures
    from nearfield.pipeline.embeddings import drawn

    found: dict[str, dict[str, float]] = {}
    for task in tasks:
        distinct = list(dict.fromkeys(text for text, _ in labelled_texts(task.task) if text.strip()))
        english = {str(one).split("-")[0] for one in task.task.metadata.languages} <= {"eng"}
        for measure, value in text_measures(drawn(distinct, most, seed, task.name), english).items():
            found.setdefault(measure, {})[task.name] = value
    return found


def _show(made: Twins) -> None:
    rows = []
    for gap in made.gaps:
        ends = "none" if gap.low is None or gap.high is None else f"{gap.low:+.4f} to {gap.high:+.4f}"
        cells = [gap.model, gap.type, f"{gap.general:.4f}", f"{gap.domain:.4f}", f"{gap.gap:+.4f}", ends]
        rows.append(cells)
    tell(table(["model", "type", "general", "domain", "gap", "95 % interval"], rows, "domain minus general", words=2))
    for measure, thirds in made.thirds.items():
        parts = [
            f"{one['name']} {one['gap']:+.4f} ({one['general']} general, {one['domain']} domain)"
            if one["gap"] is not None
            else f"{one['name']} has one side only"
            for one in thirds
        ]
        tell(f"Gap within thirds of {measure}: {'; '.join(parts)}.")
    tell("A gap in all thirds alike is the domain's; one that is gone within thirds was that of the texts.")
    if made.spearman is None:
        tell("Whether models keep their order takes three models or more.")
    else:
        tell(
            f"Order of the models on both sides: Spearman {made.spearman:+.2f}, p = {made.p:.3g} ({len(made.models)} models). "
            "With few models a lack of evidence is no evidence of another order."
        )
    tell("Intervals are over queries and items of these tasks; other tasks of the domain may differ more.")
    for note in made.notes:
        tell(note)
