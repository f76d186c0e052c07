"""The commands train, plan and run status, as a user sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nearfield
from tests.cli.command import run


def test_from_recipe_to_model(
    toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("plan", str(toy_recipe)) == 0
    printed = capsys.readouterr()
    assert "pairs" in printed.out
    summary = json.loads((tmp_path / "runs" / "toy" / "plan" / "summary.json").read_text())
    assert f"{summary['steps']:,} steps, in {tmp_path / 'runs' / 'toy' / 'plan'}" in printed.out
    assert run("run", "status", str(toy_recipe)) == 0
    status = capsys.readouterr().out
    assert "missing (next)" in status
    assert f"nearfield train {toy_recipe}" in status
    assert run("train", str(toy_recipe)) == 0
    printed = capsys.readouterr()
    assert f"model:  {tmp_path / 'runs' / 'toy' / 'model'}" in printed.out
    assert f"report: {tmp_path / 'runs' / 'toy' / 'report.html'}" in printed.out
    assert "train: running" in printed.err
    assert run("train", str(toy_recipe)) == 0
    assert "train: up to date" in capsys.readouterr().err
    assert run("run", "status", "runs/toy") == 0
    assert "next" not in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == nearfield.__version__


def test_python_api(toy_recipe: Path, toy_data: Path, tmp_path: Path) -> None:
    store = nearfield.build_data(toy_data, tmp_path / "runs" / ".cache")
    assert store.examples.num_rows == 200
    recipe = nearfield.Recipe.load(toy_recipe, ["seed=1"])
    assert recipe.seed == 1
    planned = nearfield.plan(toy_recipe, ["seed=1"], tmp_path / "runs" / "toy")
    assert planned.batch_size == 16
    assert planned.steps > 0
    assert nearfield.plan(recipe, run=tmp_path / "runs" / "toy") == planned
    with pytest.raises(nearfield.BadInputError, match="overrides go with a recipe file"):
        nearfield.train(recipe, ["seed=2"])
    result = nearfield.train(recipe, run=tmp_path / "runs" / "toy", until="train")
    assert result.ran == ("train",)
    assert nearfield.report(tmp_path / "runs" / "toy", tmp_path / "out.html").path == tmp_path / "out.html"
    with pytest.raises(AttributeError, match="nonsense"):
        nearfield.nonsense  # noqa: B018
