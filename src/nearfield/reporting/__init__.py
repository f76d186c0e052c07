"""One HTML page that tells a run: what was trained on what, how it went, and whether it is better.

Importing this package imports no template engine and no Arrow; the work starts in :func:`build_report`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReportResult", "build_report"]


@dataclass(frozen=True)
class ReportResult:
    """The written page: its path, its size in bytes, and its sections with the reason for each that is missing."""

    path: Path
    size: int
    sections: dict[str, str | None]


def build_report(run: Path, out: Path | None = None) -> ReportResult:
    """Write the report of a run folder to ``out`` (default: ``run/report.html``).

    A part of the run that is missing or damaged is said in its section. Raises :class:`BadInputError` if ``run`` is no
    run folder or ``out`` cannot be a file.
    """
    from nearfield.reporting.report import write_report

    return write_report(Path(run), None if out is None else Path(out))
