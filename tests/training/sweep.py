"""A sweep as a user writes it, run under a launcher: trainings one after the other, one of which cannot be prepared."""

from __future__ import annotations

import sys
from pathlib import Path

import nearfield
from nearfield.errors import NearfieldError


def main() -> None:
    """Arguments: a recipe, the folder of the runs, a recipe whose data are broken, and overrides of both trainings."""
    recipe, runs, broken, *overrides = sys.argv[1:]
    for rate in ("1.0e-3", "5.0e-4"):
        nearfield.train(recipe, [*overrides, f"training.learning_rate={rate}"], Path(runs) / rate, until="train")
        try:
            nearfield.train(broken, overrides, Path(runs) / "broken", until="train")
        except NearfieldError as error:
            print(f"caught: {type(error).__name__}", flush=True)
    nearfield.dry_run(recipe, overrides, Path(runs) / "looked-at")


if __name__ == "__main__":
    main()
