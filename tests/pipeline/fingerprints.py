"""The fingerprints that the stages of a run should have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nearfield.pipeline import open_run
from nearfield.pipeline.stages import Stages


def fingerprints(recipe: Path, overrides: Sequence[str] = (), folder: Path | None = None) -> dict[str, str]:
    """Stage -> fingerprint, of the stages that the recipe asks for."""
    return {stage.name: stage.fingerprint for stage in Stages.of(open_run(recipe, overrides, folder)).wanted()}
