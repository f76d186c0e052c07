"""``nearfield data decontaminate``: training texts against the texts of a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nearfield.data.contamination import ContaminationReport
    from nearfield.data.decontamination_config import DecontaminationConfig


def decontaminate(
    store: Annotated[Path, typer.Argument(help="A data recipe, or a built store (folder).", metavar="RECIPE|STORE")],
    suite: Annotated[Path, typer.Option("--suite", help="A suite YAML, or a folder of local tasks.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the data recipe as key.path=value.", metavar="[KEY=VALUE]..."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split that is trained on.")] = "train",
    sources: Annotated[str | None, typer.Option(help="Only these sources, separated by commas.")] = None,
    embed: Annotated[
        str | None, typer.Option("--embed", help="Find near-duplicates by this model's embeddings, too.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the comparison, e.g. ngram=8 or cosine=0.9.")
    ] = None,
    remove: Annotated[
        Path | None, typer.Option("--remove", help="Write the texts to remove here, for a step removal_list.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the report here, too.")] = None,
    cache: Annotated[Path, typer.Option(help="Where stores and reports are kept.")] = Path("runs/.cache"),
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a training text matches.")] = False,
) -> None:
    """Compare the training texts of a data recipe with the texts of a suite, and keep the report for the model card."""
    from nearfield.cli.printing import quiet_libraries

    quiet_libraries()
    from nearfield.cli.data import open_store
    from nearfield.errors import EXIT_FAULT
    from nearfield.pipeline.decontamination import decontaminate_store

    config = _settings(settings or [])
    names = None if sources is None else [name.strip() for name in sources.split(",") if name.strip()]
    stored = decontaminate_store(
        open_store(store, overrides, cache), suite, cache, config, sources=names, split=split, encoder=embed
    )
    if out is not None:
        stored.report.save(out)
    if remove is not None:
        stored.report.save_removals(remove)
    print_report(stored.report, stored.path, remove)
    if check and stored.report.contaminated:
        raise typer.Exit(EXIT_FAULT)


def _settings(texts: list[str]) -> DecontaminationConfig:
    from nearfield.config import KeyPath, apply_override, validate
    from nearfield.data.decontamination_config import DecontaminationConfig

    data: dict[str, object] = {}
    origins: dict[KeyPath, str] = {}
    for text in texts:
        apply_override(data, text, origins)
    return validate(DecontaminationConfig, data, Path("--set"), origins, base=None)


def print_report(report: ContaminationReport, path: Path, remove: Path | None = None) -> None:
    """A report as tables; texts are printed as they are, without markup."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.data.contamination import KINDS

    console = stdout_console()
    sides = ", ".join(f"{count:,} {role}" for role, count in report.training.items() if count)
    console.print(
        f"{report.texts:,} training texts of {', '.join(report.sources)} ({report.split}; as {sides}) against the suite "
        f"{report.suite}",
        markup=False,
        highlight=False,
    )
    table = Table("task", "role", "texts", *KINDS, "found", title="Benchmark texts that training holds", box=None)
    for task in report.tasks:
        if task.problem is not None:
            table.add_row(Text(task.task), Text("not read", style="red"))
            continue
        for role, count in task.benchmark.items():
            kinds = task.matched.get(role, {})
            numbers = [f"{kinds[kind]:,}" if kind in kinds else "" for kind in KINDS]
            table.add_row(Text(task.task), role, f"{count:,}", *numbers, f"{sum(kinds.values()) / count:.2%}")
    console.print(table)
    for task in report.tasks:
        if task.problem is not None:
            console.print(f"{task.task} was not read: {task.problem}", markup=False, highlight=False)
        for example in task.examples:
            head = f"{task.task}: {example.kind} {example.similarity:.2f}"
            console.print(f"  {head}", markup=False, highlight=False)
            for side, role, text in (
                ("training", example.training_role, example.training),
                ("benchmark", example.benchmark_role, example.benchmark),
            ):
                console.print(
                    f"    {side} {role}: {json.dumps(text, ensure_ascii=False)}", markup=False, highlight=False
                )
    console.print(
        f"{report.contaminated:,} training texts match a benchmark text that is no distractor", highlight=False
    )
    console.print(f"{report.unseen}.", markup=False, highlight=False)
    if remove is not None:
        console.print(
            f"To remove them, add to the data recipe: steps: [{{kind: removal_list, path: {remove}}}]", markup=False
        )
    elif report.contaminated:
        console.print("To remove them: --remove FILE, and a step {kind: removal_list, path: FILE}", markup=False)
    console.print(f"Report: {path}", markup=False, highlight=False)
