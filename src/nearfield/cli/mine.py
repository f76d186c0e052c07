"""``nearfield mine``: find hard negatives for a recipe's examples, and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nearfield.cli.app import (
    DEFAULT,
    DefaultGroup,
    Overrides,
    RecipeFile,
    RunFolder,
    announce_stage,
    line_of,
    table,
    tell,
)

if TYPE_CHECKING:
    from nearfield.mining.negatives import Audit

RULES = ("source", "rule", "removed", "dropped", "left", "short")

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
    from nearfield.pipeline import open_run
    from nearfield.pipeline.audit import mine_run
    from nearfield.reporting.batches import rule_rows

    negatives = mine_run(open_run(recipe, overrides or (), run), on_stage=announce_stage, engine=engine)
    summary = negatives.summary
    tell(table(RULES, rule_rows(summary)))
    total = sum(source["negatives"] for source in summary["sources"].values())
    tell(f"{total:,} negatives for {summary['examples']:,} examples, in {negatives.path}")
    if summary["short"]:
        where = negatives.path / "short.jsonl"
        tell(f"{summary['short']:,} examples have fewer negatives than wanted; they are listed in {where}")
    for name, one in summary["recall"].items():
        tell(f"{name}: the search found {one['recall']:.1%} of the true best {one['depth']}")


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
    from nearfield.pipeline.audit import audit_run, choose_judge
    from nearfield.reporting.batches import write_audit

    opened = open_run(run)
    audit = audit_run(opened, choose_judge(opened.recipe, judge, cross_encoder), shown=shown, judged=judged)
    page = write_audit(audit, opened.recipe.name, out or opened.folder / "mining.html")
    print_audit(audit, page)


def print_audit(audit: Audit, page: Path) -> None:
    """The audit in words."""
    import numpy as np

    from nearfield.reporting.batches import rate_words, rule_rows
    from nearfield.reporting.text import clip

    for example in audit.sample:
        tell(line_of((clip(example.query, 160), "bold"), f"  ({example.source}, example {example.example})"))
        for words, score in example.positives:
            tell(line_of(f"  {score:7.3f}  ", (clip(words, 120), "green")))
        for negative in example.negatives:
            tell(line_of(f"  {negative.score:7.3f}  ", (clip(negative.text, 120), "red"), f"  rank {negative.rank}"))
    tell(table(RULES, rule_rows(audit.summary)))
    if len(audit.gaps):
        shares = (5, 25, 50, 75, 95)
        cuts = ", ".join(
            f"{cut} %: {value:.3f}" for cut, value in zip(shares, np.percentile(audit.gaps, shares), strict=True)
        )
        tell(f"score of the positive less that of the negative: {cuts}; {(audit.gaps <= 0).mean():.1%} are 0 or less")
    for source, rate in audit.false_negatives.items():
        value, interval, counts = rate_words(rate)
        tell(f"{source}: false negatives by {audit.judge}: {value} (95 %: {interval}; {counts} judged)")
    tell(f"page: {page}")
