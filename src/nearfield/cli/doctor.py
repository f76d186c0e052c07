"""``nearfield doctor``: what this machine has, and whether gradients are right on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nearfield.conformance.runner import Outcome

logger = logging.getLogger("nearfield")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


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
    from nearfield.cli.printing import quiet_libraries

    quiet_libraries()
    from nearfield.console import stdout_console
    from nearfield.provenance import device, versions

    console = stdout_console()
    for name, version in versions().items():
        console.print(f"{name:24}{version}", markup=False, highlight=False)
    for name, value in device().items():
        console.print(f"{name:24}{value}", markup=False, highlight=False)
    if not conformance:
        return
    from nearfield.conformance.runner import run_all
    from nearfield.errors import EXIT_FAULT
    from nearfield.files import write_json

    outcomes = run_all(
        backend or (), lambda name, ranks: logger.info("Checking %s on %d process%s", name, ranks, "es" * (ranks > 1))
    )
    console.print("")
    for text in table(outcomes):
        console.print(text, markup=False, highlight=False)
    if json_file is not None:
        lines = [{**line.to_json(), "passed": line.passed} for outcome in outcomes for line in outcome.lines]
        write_json(json_file, lines)
    if not all(outcome.passed or outcome.skipped for outcome in outcomes):
        raise typer.Exit(EXIT_FAULT)


def table(outcomes: list[Outcome]) -> list[str]:
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
