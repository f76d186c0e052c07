"""``nearfield plan``: write the batches of a recipe, look at them, compare two plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nearfield.cli.app import DEFAULT, DefaultGroup, Overrides, RecipeFile, RunFolder, announce_stage, table, tell
from nearfield.errors import BadInputError

plan_app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    help="Write which examples meet in which step: nearfield plan RECIPE. Look at it: nearfield plan show RUN.",
)
PlanPath = Annotated[
    Path, typer.Argument(metavar="RUN_OR_PLAN", help="A run's folder, its plan folder or a plan file.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(plan_app, name="plan")


@plan_app.command(DEFAULT)
def run_planning(recipe: RecipeFile, overrides: Overrides = None, run: RunFolder = None) -> None:
    """Write which examples meet in which step, and print a summary. `run` may be left out."""
    from nearfield.files import read_json
    from nearfield.pipeline import open_run, run_stages

    result = run_stages(open_run(recipe, overrides or (), run), "plan", on_stage=announce_stage)
    summary = read_json(result.folder / "plan" / "summary.json", "plan summary")
    _print_epochs(summary["epochs"])
    tell(f"{summary['steps']:,} steps, in {result.folder / 'plan'}. Look at them: nearfield plan show {result.folder}")


@plan_app.command("show")
def show_plan(
    path: PlanPath,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write the page; plan.html beside the plan.")
    ] = None,
) -> None:
    """Print what a plan holds, how hard its batches are and what was left out; write a page with the charts."""
    from nearfield.batching.plan import Plan, plan_files
    from nearfield.reporting.batches import write_plan_page

    plans = [Plan(file) for file in plan_files(path)]
    epochs = [{"epoch": plan.metadata.get("epoch"), **plan.metadata["summary"]} for plan in plans]
    settings = plans[0].metadata.get("batches", {})
    kind = f"{settings.get('kind', 'unknown kind')}, batches of {settings.get('batch_size', '?')}"
    tell(f"{path}: {kind}, seed {plans[0].metadata.get('seed', '?')}")
    _print_epochs(epochs)
    _print_hardness(epochs)
    _print_strata(epochs[0].get("planner", {}))
    folder = path if path.is_dir() else path.parent
    page = write_plan_page(plans, out or (folder / "plan.html" if path.is_dir() else path.with_suffix(".html")))
    tell(f"charts: {page}")


@plan_app.command("shares")
def find_shares(
    recipe: RecipeFile,
    overrides: Overrides = None,
    run: RunFolder = None,
    towards: Annotated[
        list[str] | None, typer.Option("--towards", metavar="SOURCE", help="Be like this source; may be given again.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of those sources.")] = "validation",
    samples: Annotated[int, typer.Option(min=2, help="Queries of each source.")] = 10_000,
    clusters: Annotated[int, typer.Option(min=1, help="Of each source's queries.")] = 32,
    temperature: Annotated[float, typer.Option(min=1e-6, help="High: all alike. Low: the most similar alone.")] = 0.05,
) -> None:
    """Say how often to draw each source so that training is like what it is to be good at, by optimal transport (SAIL)."""

    from nearfield.pipeline import open_run
    from nearfield.pipeline.audit import find_shares as find

    advice = find(
        open_run(recipe, overrides or (), run),
        towards or (),
        split=split,
        samples=samples,
        clusters=clusters,
        temperature=temperature,
    )
    others = list(next(iter(advice.scores.values())))
    rows = [
        [name, f"{advice.sizes[name]:,}", *(f"{scores[other]:.4f}" for other in others), f"{advice.shares[name]:.4f}"]
        for name, scores in advice.scores.items()
    ]
    tell(table(["source", "examples", *(f"like {name}" for name in others), "share"], rows))
    shares = ", ".join(f"{name}: {share:.4f}" for name, share in advice.shares.items())
    setting = f"{{kind: shares, exhausted: repeat, shares: {{{shares}}}}}"
    tell(f"In the recipe, under batches (kind: single_source): sampling: {setting}")


@plan_app.command("diff")
def diff_plans(
    first: PlanPath,
    second: PlanPath,
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch of runs and plan folders.")] = 0,
) -> None:
    """Compare two plans: batches in both, examples that moved, pairs that meet in both, figures side by side."""
    from nearfield.batching.plan import Plan, compare_plans

    difference = compare_plans(Plan(_epoch_of(first, epoch)), Plan(_epoch_of(second, epoch)))
    if difference.identical:
        tell("The plans are identical: the same examples in the same slots of the same steps.")
    elif not difference.in_both:
        tell("The plans have no example in common: are they over the same data?")
    tell(
        f"{difference.in_both:,} examples are in both (of {difference.examples[0]:,} and {difference.examples[1]:,}); "
        f"{difference.moved:,} of them are in another step\n"
        f"{difference.same_step:,} steps have the same examples (of {difference.steps[0]:,} and {difference.steps[1]:,}); "
        f"{difference.shared_batches:,} batches are in both in any step\n"
        f"{difference.shared_pairs:,} pairs of examples meet in both (of {difference.pairs[0]:,} and {difference.pairs[1]:,}), "
        f"overlap {difference.overlap:.1%}"
    )
    rows = [(name, _figure(one), _figure(other)) for name, one, other in difference.figures]
    tell(table(["", "first", "second"], rows))
    if difference.settings:
        tell(table(["what differs", "first", "second"], difference.settings))


def _epoch_of(path: Path, epoch: int) -> Path:
    from nearfield.batching.plan import plan_files

    files = plan_files(path)
    if path.is_file():
        return path
    if epoch >= len(files):
        raise BadInputError(
            f"there is no epoch {epoch}: {len(files)} are planned, counted from 0",
            where=str(path),
            hint=f"--epoch 0 to {len(files) - 1}.",
        )
    return files[epoch]


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _print_epochs(epochs: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for epoch in epochs:
        by_source = ", ".join(f"{name} {count:,}" for name, count in epoch["batches_by_source"].items())
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in epoch["dropped"].items()) or "none"
        number = "–" if epoch["epoch"] is None else str(epoch["epoch"])
        figures = [f"{epoch[key]:,}" for key in ("batches", "rows", "tokens")]
        rows.append([number, *figures, by_source, dropped])
    tell(table(["epoch", "batches", "examples", "tokens", "batches a source", "left out"], rows))
    for epoch in epochs:
        exceptions = epoch.get("exceptions", {})
        said = [
            f"{exceptions[key]:,} {words}"
            for key, words in (
                ("repeated_items", "times an item stands twice in a batch"),
                ("known_positives", "times an item is a known positive of another query of its batch"),
            )
            if exceptions.get(key)
        ]
        if epoch.get("planner", {}).get("repeated"):
            said.append(f"{epoch['planner']['repeated']:,} examples come again, as the sampling of sources asks")
        if said:
            tell(f"epoch {epoch['epoch']}: {'; '.join(said)}")


def _print_hardness(epochs: Sequence[Mapping[str, Any]]) -> None:
    measured = [epoch for epoch in epochs if epoch.get("hardness")]
    if not measured:
        tell("How hard the batches are is not known: the recipe names no teacher.")
        return

    def with_margin(hardness: Mapping[str, Any], name: str, scale: float = 1, unit: str = "") -> str:
        margin = hardness[f"{name}_margin"]
        shown = f"{scale * hardness[name]:.3f}{unit}"
        return shown if margin is None else f"{shown} ± {scale * margin:.3f}"

    rows = [
        [
            epoch["epoch"],
            *(with_margin(epoch["hardness"], f"{side}_similarity") for side in ("planned", "random")),
            *(with_margin(epoch["hardness"], f"{side}_false_negatives", 100, " %") for side in ("planned", "random")),
        ]
        for epoch in measured
    ]
    tell(table(["epoch", "similarity", "at random", "false negatives", "at random"], rows))
    first = measured[0]["hardness"]
    tell(
        f"By the teacher, on {first['batches']:,} batches an epoch ({first['pairs']:,} pairs of a query with another "
        "example's positive). False negatives score above the query's own positive. ± is 95 %, over batches."
    )


def _print_strata(planner: Mapping[str, Any]) -> None:
    for part in [planner, *planner.get("parts", [])]:
        for name, about in part.get("strata", {}).items():
            if about["kind"] == "kmeans":
                sizes = about["sizes"]
                text = (
                    f"{name}: {about['clusters']:,} clusters of {sizes[-1]:,} to {sizes[0]:,} examples "
                    f"({about['wanted']:,} asked for, {about['merged']:,} small ones merged)"
                )
            else:
                recall = "" if about["recall"] is None else f", recall of the search {about['recall']:.1%}"
                text = (
                    f"{name}: {about['communities']:,} communities of {about['size']:,}, {about['left']:,} examples in none; "
                    f"{about['cut']:.1%} of {about['edges']:,} edges cut{recall}"
                )
            tell(text)
