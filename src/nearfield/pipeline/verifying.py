"""Full verification on request: every byte of what a run's stages left behind against the checksums written with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nearfield.checksums import damage
from nearfield.encoders.build import folder_revision
from nearfield.errors import BadInputError
from nearfield.pipeline.freshness import Freshness
from nearfield.pipeline.run import Run

AGAIN = "nearfield train {run}"


@dataclass(frozen=True)
class Verified:
    """A folder that was read whole."""

    name: str
    bytes: int
    damage: str | None
    """What is wrong with it; None where nothing is."""
    mend: str
    """The command that mends it, with ``{run}`` for the run."""


def verify(run: Run) -> list[Verified]:
    """All artifacts of a run (and of the trainings before it) that are there, in the order of the stages."""
    found: list[Verified] = []
    for each in (*run.before, run):
        prefix = "" if each is run else f"{each.stage}/"
        found += [replace(one, name=f"{prefix}{one.name}") for one in _of(each)]
    return found


def _of(run: Run) -> Iterator[Verified]:
    stages = Freshness(run.preview())
    for stage in stages.wanted(None):
        for folder in stages.sealed(stage):
            if folder.is_dir():
                yield Verified(f"{stage} ({folder.name})", _size(folder), damage(folder), AGAIN)
    yield from _checkpoints(run.folder / "checkpoints")
    model, wanted = run.folder / "model", run.record("train").get("model")
    if model.is_dir() and wanted is not None:
        changed = None if folder_revision(model) == wanted else "its files are not those that training wrote"
        yield Verified("model", _size(model), changed, f"rm -r {model} && {AGAIN}")


def _checkpoints(folder: Path) -> Iterator[Verified]:
    from nearfield.training.checkpoint import checkpoint_paths, open_checkpoint

    for path in checkpoint_paths(folder):
        try:
            open_checkpoint(path)
            wrong = None
        except BadInputError as error:
            wrong = str(error).splitlines()[0]
        # A run passes over a damaged checkpoint by itself, and goes on from the one before it.
        yield Verified(f"checkpoint {path.name}", _size(path), wrong, AGAIN)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
