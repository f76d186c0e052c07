"""Data stores: ``nearfield data build|stats|sample``, and ``data decontaminate``, which compares them with benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.app import Overrides, line_of, names, quiet_libraries, table, tell
from nearfield.errors import EXIT_FAULT, BadInputError

if TYPE_CHECKING:
    from nearfield.data.decontaminate import ContaminationReport, DecontaminationConfig
    from nearfield.data.items import Example
    from nearfield.data.statistics import CountTokens, LengthStats, SampledExample, StoreStats
    from nearfield.data.store import DataSummary, StepSummary, Store

CACHE = Path("runs/.cache")
DataRecipe = Annotated[Path, typer.Argument(help="A data recipe, a YAML file.", metavar="RECIPE")]
StoreOrRecipe = Annotated[Path, typer.Argument(help="A built store (folder) or a data recipe.", metavar="STORE|RECIPE")]


def register(app: typer.Typer) -> None:
    """Add the commands to the tree."""
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
    from nearfield.data.statistics import count_words, store_stats

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
    from nearfield.data.statistics import sample_examples

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

    from nearfield.encoders.source import locate

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
    state = "is there already" if summary.reused else "is built"
    counts = f" {state}: {summary.items:,} items, {summary.examples:,} examples"
    tell(line_of("The store ", (summary.name, "bold"), counts))
    rows = [
        [
            source.name,
            source.kind,
            *(f"{n:,}" for n in (source.rows, source.examples, source.duplicates, sum(source.quarantined.values()))),
            f"{source.groups:,}",
            ", ".join(f"{name} {count:,}" for name, count in source.splits.items()),
        ]
        for source in summary.sources
    ]
    heads = ["source", "kind", "rows", "examples", "duplicates", "quarantined", "groups", "splits"]
    tell(table(heads, rows))
    for source in summary.sources:
        for reason, count in source.quarantined.items():
            tell(f"  {source.name}: {count:,} rows quarantined: {reason}")
    print_steps(summary.steps, summary.path)
    conflicts = summary.conflicts
    if conflicts.positive_and_negative:
        tell(
            f"  {conflicts.positive_and_negative:,} texts were positive and negative of one query; they stay positive "
            f"({conflicts.examples_changed:,} examples changed)"
        )
    if conflicts.labels:
        tell(f"  {conflicts.labels:,} items have more than one label")
    if conflicts.scores:
        tell(f"  {conflicts.scores:,} pairs have more than one score")
    for conflict in conflicts.first:
        shown = " | ".join(f"{key}: {value[:100]}" for key, value in conflict.items() if key != "what")
        tell(f"    {conflict['what']}: {shown}")
    for splits, count in summary.shared_between_splits.items():
        tell(f"  {count:,} texts are in examples of both splits {splits.replace('+', ' and ')}")
    tell(f"Place: {summary.path}")


def print_steps(steps: Sequence[StepSummary], store: Path) -> None:
    """Print what each cleaning step removed, if there is one."""
    if not steps:
        return
    rows = []
    for step in steps:
        reasons = "; ".join(f"{reason} {count:,}" for reason, count in list(step.reasons.items())[:5])
        for place, (name, before) in enumerate(step.before.items()):
            after = step.after[name]
            counts = [f"{count:,}" for count in (before, after, before - after)]
            whole = [f"{step.positives:,}", f"{step.negatives:,}", reasons] if place == 0 else ["", "", ""]
            rows.append([f"{step.number} {step.kind}" if place == 0 else "", name, *counts, *whole])
    tell(table(["step", "source", "before", "after", "taken out", "positives", "negatives", "reasons"], rows))
    tell(f"  What went, and why: {store / 'removed.jsonl'}")


def print_stats(stats: StoreStats) -> None:
    """Statistics as tables and histograms."""
    tell(line_of((stats.name, "bold"), f": {stats.items:,} items, {stats.examples:,} examples"))
    rows = [
        [
            *(source.name, source.kind, source.task_type),
            ", ".join(f"{name} {count:,}" for name, count in source.splits.items()),
            *(f"{source.positives:.2f}", f"{source.negatives:.2f}", f"{source.labels:,}"),
            f"{source.duplicate_share:.1%}",
            "" if source.overlap is None else f"{source.overlap:.1%}",
        ]
        for source in stats.sources
    ]
    heads = ["source", "kind", "task type", "splits", "positives", "negatives", "labels", "duplicates", "overlap"]
    tell(table(heads, rows))
    print_steps(stats.steps, Path(stats.path))
    for source in stats.sources:
        if source.images:
            tell(f"{source.name}: {source.images:,} different images")
    tell(f"Lengths in {stats.unit}:")
    for source in stats.sources:
        for lengths in source.lengths:
            _print_histogram(source.name, lengths)


def _print_histogram(source: str, lengths: LengthStats) -> None:
    tell(
        f"{source}, {lengths.role}: {lengths.items:,} items, mean {lengths.mean:.1f}, median {lengths.median:.0f}, "
        f"95% up to {lengths.p95:.0f}, longest {lengths.longest:,}",
        "italic",
    )
    top = max(count for _, count in lengths.histogram)
    bars = [(f"{bound:,}", f"{count:,}", "█" * round(40 * count / top)) for bound, count in lengths.histogram]
    tell(table(["up to", "items", ""], bars))


def print_example(example: SampledExample) -> None:
    """An example in words; long texts are cut."""
    tell(f"{example.source} / {example.split} / example {example.row}", "bold")
    colours = {"query": "cyan", "item": "cyan", "negative": "red", "score": "", "label": ""}
    for name, text in example_parts(example):
        cut = text if len(text) <= 500 else f"{text[:500]} ... ({len(text):,} characters)"
        tell(line_of(f"  {name:<9}", (cut, colours.get(name, "green"))))


def example_parts(example: SampledExample | Example) -> list[tuple[str, str]]:
    """An example as names and words."""
    parts = [("query" if example.positives else "item", str(example.query))]
    parts += [("positive" if example.score is None else "second", str(text)) for text in example.positives]
    parts += [("negative", str(text)) for text in example.negatives]
    parts += [("score", f"{example.score:g}")] if example.score is not None else []
    return parts + ([("label", str(example.label))] if example.label is not None else [])


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
    quiet_libraries()
    from nearfield.pipeline.suites import decontaminate_store

    opened, config = open_store(store, overrides, cache), _settings(settings or [])
    stored = decontaminate_store(opened, suite, cache, config, sources=names(sources), split=split, encoder=embed)
    if out is not None:
        stored.report.save(out)
    if remove is not None:
        stored.report.save_removals(remove)
    print_report(stored.report, stored.path, remove)
    if check and stored.report.contaminated:
        raise typer.Exit(EXIT_FAULT)


def _settings(texts: list[str]) -> DecontaminationConfig:
    from nearfield.config import KeyPath, apply_override, validate
    from nearfield.data.decontaminate import DecontaminationConfig

    data: dict[str, object] = {}
    origins: dict[KeyPath, str] = {}
    for text in texts:
        apply_override(data, text, origins)
    return validate(DecontaminationConfig, data, Path("--set"), origins, base=None)


def print_report(report: ContaminationReport, path: Path, remove: Path | None = None) -> None:
    """A report as tables; texts are printed as they are, without markup."""
    from rich.text import Text

    from nearfield.data.decontaminate import KINDS

    sides = ", ".join(f"{count:,} {role}" for role, count in report.training.items() if count)
    tell(
        f"{report.texts:,} training texts of {', '.join(report.sources)} ({report.split}; as {sides}) against the suite "
        f"{report.suite}"
    )
    rows: list[list[object]] = []
    for task in report.tasks:
        if task.problem is not None:
            rows.append([task.task, Text("not read", style="red")])
            continue
        for role, count in task.benchmark.items():
            kinds = task.matched.get(role, {})
            numbers = [f"{kinds[kind]:,}" if kind in kinds else "" for kind in KINDS]
            rows.append([task.task, role, f"{count:,}", *numbers, f"{sum(kinds.values()) / count:.2%}"])
    tell("Benchmark texts that training holds", "italic")
    tell(table(["task", "role", "texts", *KINDS, "found"], rows))
    for task in report.tasks:
        if task.problem is not None:
            tell(f"{task.task} was not read: {task.problem}")
        for example in task.examples:
            tell(f"  {task.task}: {example.kind} {example.similarity:.2f}")
            for side, role, text in (
                ("training", example.training_role, example.training),
                ("benchmark", example.benchmark_role, example.benchmark),
            ):
                tell(f"    {side} {role}: {json.dumps(text, ensure_ascii=False)}")
    tell(f"{report.contaminated:,} training texts match a benchmark text that is no distractor")
    tell(f"{report.unseen}.")
    if remove is not None:
        tell(f"To remove them, add to the data recipe: steps: [{{kind: removal_list, path: {remove}}}]")
    elif report.contaminated:
        tell("To remove them: --remove FILE, and a step {kind: removal_list, path: FILE}")
    tell(f"Report: {path}")
