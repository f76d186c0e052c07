"""``nearfield data``: build a store, count what it holds, show examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.options import Overrides
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.data.stats import CountTokens, Lengths, ShownExample, StoreStats
    from nearfield.data.store import Store
    from nearfield.data.summary import DataSummary, StepSummary

CACHE = Path("runs/.cache")
DataRecipe = Annotated[Path, typer.Argument(help="A data recipe, a YAML file.", metavar="RECIPE")]
StoreOrRecipe = Annotated[Path, typer.Argument(help="A built store (folder) or a data recipe.", metavar="STORE|RECIPE")]


def register(app: typer.Typer) -> None:
    """Add the commands to the tree."""
    from nearfield.cli.decontaminate import decontaminate

    data = typer.Typer(help="Build data stores, look into them, check them against benchmarks.", no_args_is_help=True)
    data.command("build")(build)
    data.command("stats")(stats)
    data.command("sample")(sample)
    data.command("decontaminate")(decontaminate)
    app.add_typer(data, name="data")


def build(
    recipe: DataRecipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the store; runs/.cache/data/FINGERPRINT by default.")
    ] = None,
) -> None:
    """Read a data recipe's files into a store: content-hashed items, examples, splits."""
    from nearfield.data.build import ensure_store, ensure_store_at
    from nearfield.data.config import DataConfig
    from nearfield.encoders.encode import text_encoder

    config = DataConfig.load(recipe, overrides or ())
    if out is None:
        print_summary(ensure_store(config, CACHE, encoders=text_encoder))
    else:
        print_summary(ensure_store_at(config, out, encoders=text_encoder))


def stats(
    store: StoreOrRecipe,
    overrides: Overrides = None,
    tokenizer: Annotated[str | None, typer.Option(help="Count lengths in this model's tokens, not in words.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Measure at most so many examples a source.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what is in a store: examples by source and split, lengths, duplicates, shared words."""
    from nearfield.data.stats import count_words, store_stats

    opened = open_store(store, overrides)
    count = count_words if tokenizer is None else _token_counter(tokenizer)
    unit = "words (no --tokenizer was named)" if tokenizer is None else f"tokens of {tokenizer}"
    result = store_stats(opened, count, unit, sample)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False))
    else:
        print_stats(result)


def sample(
    store: StoreOrRecipe,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many examples.")] = 5,
    source: Annotated[str | None, typer.Option(help="Of this source only.")] = None,
    split: Annotated[str | None, typer.Option(help="Of this split only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other examples.")] = 0,
) -> None:
    """Show a few examples."""
    from nearfield.data.stats import sample_examples

    for example in sample_examples(open_store(store, overrides), count, source, split, seed):
        print_example(example)


def open_store(path: Path, overrides: list[str] | None = None, cache: Path = CACHE) -> Store:
    """The store in a folder, or of a recipe (built if it is missing)."""
    from nearfield.data.build import prepare_store
    from nearfield.data.store import Store
    from nearfield.encoders.encode import text_encoder

    if path.is_dir():
        if overrides:
            raise BadInputError("overrides go with a recipe, not with a built store", where=str(path))
        return Store.open(path)
    return prepare_store(path, cache, overrides or (), encoders=text_encoder)


def _token_counter(name: str) -> CountTokens:
    from transformers import AutoTokenizer

    from nearfield.encoders.build import locate

    folder = locate(name).path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"no tokenizer can be loaded ({str(error).splitlines()[0][:200]})", where=str(folder)
        ) from error

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]

    return count


def print_summary(summary: DataSummary) -> None:
    """A built store as a table, its conflicts and its place."""
    from rich.markup import escape
    from rich.table import Table

    from nearfield.console import stdout_console

    console = stdout_console()
    state = "is there already" if summary.reused else "is built"
    console.print(
        f"The store [bold]{escape(summary.name)}[/] {state}: {summary.items:,} items, {summary.examples:,} examples"
    )
    table = Table("source", "kind", "rows", "examples", "duplicates", "quarantined", "groups", "splits")
    for source in summary.sources:
        splits = ", ".join(f"{escape(name)} {count:,}" for name, count in source.splits.items())
        bad = sum(source.quarantined.values())
        numbers = [f"{n:,}" for n in (source.rows, source.examples, source.duplicates, bad, source.groups)]
        table.add_row(source.name, source.kind, *numbers, splits)
    console.print(table)
    for source in summary.sources:
        for reason, count in source.quarantined.items():
            console.print(f"  {source.name}: {count:,} rows quarantined: {escape(reason)}")
    print_steps(summary.steps, summary.path)
    conflicts = summary.conflicts
    if conflicts.positive_and_negative:
        console.print(
            f"  {conflicts.positive_and_negative:,} texts were positive and negative of one query; they stay positive "
            f"({conflicts.examples_changed:,} examples changed)"
        )
    if conflicts.labels:
        console.print(f"  {conflicts.labels:,} items have more than one label")
    if conflicts.scores:
        console.print(f"  {conflicts.scores:,} pairs have more than one score")
    for conflict in conflicts.first:
        shown = " | ".join(f"{key}: {value[:100]}" for key, value in conflict.items() if key != "what")
        console.print(f"    {conflict['what']}: {shown}", markup=False, highlight=False)
    for splits, count in summary.shared_between_splits.items():
        console.print(f"  {count:,} texts are in examples of both splits {escape(splits.replace('+', ' and '))}")
    console.print(f"Place: {escape(str(summary.path))}")


def print_steps(steps: Sequence[StepSummary], store: Path) -> None:
    """What each cleaning step took out, if there is one."""
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console

    if not steps:
        return
    console = stdout_console()
    table = Table("step", "source", "before", "after", "taken out", "positives", "negatives", "reasons")
    for step in steps:
        reasons = "; ".join(f"{reason} {count:,}" for reason, count in list(step.reasons.items())[:5])
        for place, (name, before) in enumerate(step.before.items()):
            after = step.after[name]
            first = place == 0
            table.add_row(
                f"{step.number} {step.kind}" if first else "",
                name,
                *(f"{count:,}" for count in (before, after, before - after)),
                *(f"{count:,}" if first else "" for count in (step.positives, step.negatives)),
                Text(reasons if first else ""),
            )
    console.print(table)
    console.print(f"  What went, and why: {store / 'removed.jsonl'}", markup=False, highlight=False)


def print_stats(stats: StoreStats) -> None:
    """Statistics as tables and histograms."""
    from rich.markup import escape
    from rich.table import Table

    from nearfield.console import stdout_console

    console = stdout_console()
    console.print(f"[bold]{escape(stats.name)}[/]: {stats.items:,} items, {stats.examples:,} examples")
    table = Table("source", "kind", "task type", "splits", "positives", "negatives", "labels", "duplicates", "overlap")
    for source in stats.sources:
        splits = ", ".join(f"{escape(name)} {count:,}" for name, count in source.splits.items())
        overlap = "" if source.overlap is None else f"{source.overlap:.1%}"
        numbers = [f"{source.positives:.2f}", f"{source.negatives:.2f}", f"{source.labels:,}"]
        table.add_row(
            source.name, source.kind, source.task_type, splits, *numbers, f"{source.duplicate_share:.1%}", overlap
        )
    console.print(table)
    print_steps(stats.steps, Path(stats.path))
    for source in stats.sources:
        if source.pictures:
            console.print(f"{escape(source.name)}: {source.pictures:,} different pictures")
    console.print(f"Lengths in {escape(stats.unit)}:")
    for source in stats.sources:
        for lengths in source.lengths:
            console.print(_histogram(source.name, lengths))


def _histogram(source: str, lengths: Lengths) -> object:
    from rich.table import Table

    title = (
        f"{source}, {lengths.role}: {lengths.items:,} items, mean {lengths.mean:.1f}, median {lengths.median:.0f}, "
        f"95% up to {lengths.p95:.0f}, longest {lengths.longest:,}"
    )
    table = Table("up to", "items", "", title=title, title_justify="left", box=None)
    top = max(count for _, count in lengths.histogram)
    for bound, count in lengths.histogram:
        table.add_row(f"{bound:,}", f"{count:,}", "█" * round(40 * count / top))
    return table


def print_example(example: ShownExample) -> None:
    """An example in words; long texts are cut."""
    from rich.text import Text

    from nearfield.console import stdout_console

    console = stdout_console()
    console.print(Text(f"{example.source} / {example.split} / example {example.row}", style="bold"))
    lines = [("query" if example.positives else "item", "cyan", example.query)]
    lines += [("positive" if example.score is None else "second", "green", text) for text in example.positives]
    lines += [("negative", "red", text) for text in example.negatives]
    for name, colour, text in lines:
        cut = text if len(text) <= 500 else f"{text[:500]} ... ({len(text):,} characters)"
        console.print(Text.assemble(f"  {name:<9}", (cut, colour)))
    if example.score is not None:
        console.print(Text(f"  score    {example.score:g}"))
    if example.label is not None:
        console.print(Text(f"  label    {example.label}"))
