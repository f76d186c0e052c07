"""The stages of a run as functions of Python; the command line is a thin layer over the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nearfield.files import read_json
from nearfield.pipeline import RunResult, open_run, run_stages

if TYPE_CHECKING:
    from nearfield.data.config import DataConfig
    from nearfield.data.store import Store
    from nearfield.mining.negatives import Negatives
    from nearfield.pipeline.dry_run import DryRun
    from nearfield.recipe import Recipe
    from nearfield.reporting import ReportResult


@dataclass(frozen=True)
class PlanResult:
    """Where a plan is, and how long it is."""

    folder: Path
    steps: int
    batch_size: int
    tokens: int
    """Real tokens of all epochs."""
    dropped: dict[str, int]
    """Examples left out over all epochs, by reason."""


def build_data(
    data: DataConfig | str | Path, cache: str | Path = "runs/.cache", overrides: Sequence[str] = ()
) -> Store:
    """The store of a data recipe, built if it is missing."""
    from nearfield.data.build import prepare_store
    from nearfield.encoders.encode import text_encoder

    return prepare_store(data, Path(cache), overrides, encoders=text_encoder)


def plan(recipe: str | Path | Recipe, overrides: Sequence[str] = (), run: str | Path | None = None) -> PlanResult:
    """Write which examples meet in which step of a recipe's run."""
    folder = run_stages(open_run(recipe, overrides, run), "plan").folder / "plan"
    summary = read_json(folder / "summary.json", "plan summary")
    dropped: dict[str, int] = {}
    for epoch in summary["epochs"]:
        for reason, count in epoch["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    return PlanResult(
        folder, summary["steps"], summary["batch_size"], sum(e["tokens"] for e in summary["epochs"]), dropped
    )


def mine(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    engine: Literal["local", "ray"] = "local",
) -> Negatives:
    """The hard negatives of a recipe, mined if they are missing; ``ray`` spreads the work over a cluster."""
    from nearfield.pipeline.audit import mine_run

    return mine_run(open_run(recipe, overrides, run), engine=engine)


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    *,
    until: str | None = None,
    restart: bool = False,
    strict: bool = False,
) -> RunResult:
    """Run all stages of a recipe that are missing or stale, up to ``until``; ``strict`` makes errors of its notices."""
    return run_stages(open_run(recipe, overrides, run), until, restart=restart, strict=strict)


def dry_run(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    *,
    strict: bool = False,
) -> DryRun | None:
    """Say what a recipe's run will take and what is wrong with it; train nothing.

    Data, tokens and plan are built if they are missing. With ``strict`` its notices block the run, as they would end it. Under a launcher all ranks call this, and the first alone gets
    the result.
    """
    from nearfield.pipeline.dry_run import dry_run as run_dry

    return run_dry(open_run(recipe, overrides, run), strict=strict)


def report(run: str | Path, out: str | Path | None = None) -> ReportResult:
    """Write the HTML report of a run."""
    from nearfield.reporting import build_report

    return build_report(Path(run), None if out is None else Path(out))
