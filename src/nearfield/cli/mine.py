"""``nearfield mine``: find hard negatives for a recipe's examples, and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nearfield.cli.default_command import DEFAULT, DefaultGroup
from nearfield.cli.options import Overrides, RecipeFile, RunFolder

if TYPE_CHECKING:
    from nearfield.mining.audit import Audit

mine_app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    help="Find hard negatives: nearfield mine RECIPE. Look at them: nearfield mine audit RUN.",
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(mine_app, name="mine")


@mine_app.command(DEFAULT)
def run_mining(
    recipe: RecipeFile,
    overrides: Overrides = None,
    run: RunFolder = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="`ray` encodes and searches on a Ray cluster (RAY_ADDRESS), or here."),
    ] = "local",
) -> None:
    """Mine the negatives of a recipe (its key `mining`) and print what each rule did. `run` may be left out."""
    from rich.table import Table

    from nearfield.cli.printing import announce_stage
    from nearfield.console import stdout_console
    from nearfield.pipeline import open_run
    from nearfield.pipeline.auditing import mine_run

    negatives = mine_run(open_run(recipe, overrides or (), run), on_stage=announce_stage, engine=engine)
    summary = negatives.summary
    table = Table("source", "rule", "removed", "dropped", "left", "short", box=None, pad_edge=False)
    for name, source in summary["sources"].items():
        table.add_row(name, "(found)", "", "", f"{source['candidates']:,}", "")
        for rule in source["rules"]:
            table.add_row(name, rule["kind"], *(f"{rule[key]:,}" for key in ("removed", "dropped", "left", "short")))
    console = stdout_console()
    console.print(table)
    total = sum(source["negatives"] for source in summary["sources"].values())
    console.print(f"{total:,} negatives for {summary['examples']:,} examples, in {negatives.path}", highlight=False)
    if summary["short"]:
        where = negatives.path / "short.jsonl"
        console.print(
            f"{summary['short']:,} examples have fewer negatives than wanted; they are listed in {where}",
            highlight=False,
        )
    for name, one in summary["recall"].items():
        console.print(f"{name}: the search found {one['recall']:.1%} of the true best {one['depth']}", highlight=False)


@mine_app.command("audit")
def audit_mining(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, such as runs/NAME.")],
    judge: Annotated[
        str | None,
        typer.Option(help="The second teacher: bm25, or a model's folder or hub id. BM25, unless that mined."),
    ] = None,
    cross_encoder: Annotated[
        str | None, typer.Option(help="A cross-encoder's folder or hub id, as the second teacher.")
    ] = None,
    shown: Annotated[int, typer.Option(min=0, help="Examples to show.")] = 5,
    judged: Annotated[int, typer.Option(min=1, help="Negatives a source that the second teacher judges.")] = 500,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; RUN/mining.html by default.")] = None,
) -> None:
    """Show mined negatives with scores, the score gaps, and the false negatives that a second teacher sees."""
    from nearfield.pipeline import open_run
    from nearfield.pipeline.auditing import audit_run, choose_judge
    from nearfield.reporting.mining import write_audit

    opened = open_run(run)
    found = audit_run(opened, choose_judge(opened.recipe, judge, cross_encoder), shown=shown, judged=judged)
    page = write_audit(found, opened.recipe.name, out or opened.folder / "mining.html")
    print_audit(found, page)


def print_audit(found: Audit, page: Path) -> None:
    """The audit in words."""
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    from nearfield.console import stdout_console
    from nearfield.reporting.mining import rate_words, rule_rows
    from nearfield.reporting.text import clip

    console = stdout_console()

    def line(*parts: Any) -> None:
        console.print(Text.assemble(*parts))

    for example in found.sample:
        line((clip(example.query, 160), "bold"), f"  ({example.source}, example {example.example})")
        for words, score in example.positives:
            line(f"  {score:7.3f}  ", (clip(words, 120), "green"))
        for negative in example.negatives:
            line(f"  {negative.score:7.3f}  ", (clip(negative.text, 120), "red"), f"  rank {negative.rank}")
    table = Table("source", "rule", "removed", "dropped", "left", "short", box=None, pad_edge=False)
    for row in rule_rows(found):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    if len(found.gaps):
        cuts = ", ".join(f"{cut} %: {value:.3f}" for cut, value in zip((5, 25, 50, 75, 95), np.percentile(found.gaps, [5, 25, 50, 75, 95]), strict=True))  # fmt: skip
        line(f"score of the positive less that of the negative: {cuts}; {(found.gaps <= 0).mean():.1%} are 0 or less")
    for source, rate in found.false_negatives.items():
        value, interval, counts = rate_words(rate)
        line(f"{source}: false negatives by {found.judge}: {value} (95 %: {interval}; {counts} judged)")
    line(f"page: {page}")
