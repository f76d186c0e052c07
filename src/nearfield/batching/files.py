"""Where plans are: a file, the folder of a plan, or a run."""

from __future__ import annotations

from pathlib import Path

from nearfield.errors import BadInputError


def plan_files(path: Path) -> list[Path]:
    """The plan files, one an epoch, of a file, a ``plan`` folder or a run's folder."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise BadInputError("there is no plan", where=str(path), hint="Name a run's folder, its plan folder or a file.")
    found = sorted(path.glob("epoch-*.parquet")) or sorted((path / "plan").glob("epoch-*.parquet"))
    if not found:
        raise BadInputError(
            "this folder has no plan: neither epoch-*.parquet nor plan/epoch-*.parquet",
            where=str(path),
            hint="Write one: nearfield plan RECIPE.",
        )
    return found
