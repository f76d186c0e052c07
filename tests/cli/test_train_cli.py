"""nearfield train --dry-run, as a user sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nearfield
from nearfield.training.forecast import Machine, forecast_notices
from tests.cli.command import run
from tests.patience import PATIENCE


def test_a_run_that_would_start(toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "toy"
    command = ["train", str(toy_recipe), "--run-folder", str(folder), "--dry-run"]
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "plan (in" in printed.splitlines()[0]
    summary = json.loads((folder / "plan" / "summary.json").read_text())
    steps = min(12, summary["steps"])
    assert f"{steps} ({steps * 16} examples)" in printed
    for word in ("real;", "are trained", "single, 1 process", "at the peak", "trial steps", "checkpoints of"):
        assert word in printed
    left_out = sum(sum(epoch["dropped"].values()) for epoch in summary["epochs"])
    assert f"note: over all epochs {left_out} examples" in printed
    assert "The run would start; nothing was trained." in printed
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model").exists()
    assert json.loads((folder / "forecast.json").read_text())["measured"] == "steps"
    assert run(*command) == 0
    assert "built:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("batches.batch_size=999", "not one batch of 999"),
        ("training.freeze=['*.nothing.*']", "matches no parameter"),
        ("encoder.max_length=100000", "more than the model's"),
        ("split=nowhere", "no examples in the split"),
        ("training.backend=fsdp2", "there is one"),
    ],
)
def test_a_run_that_would_not_start(
    toy_recipe: Path, tmp_path: Path, setting: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", str(toy_recipe), setting, "--run-folder", str(tmp_path / "run"), "--dry-run") == 2
    printed = capsys.readouterr().out
    assert "blocks: " in printed
    assert reason in printed
    assert "The run would not start." in printed


def test_it_goes_with_no_other_option(toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", str(toy_recipe), "--run-folder", str(tmp_path / "run"), "--dry-run", "--restart") == 2
    assert "--dry-run goes with none of" in capsys.readouterr().err


def test_notices_of_data_batches_and_settings(toy_recipe: Path, tmp_path: Path) -> None:
    settings = ["encoder.max_length=8", "batches.drop_last=false", "training.schedule.warmup=500"]
    text = toy_recipe.read_text().replace("  max_steps: 12\n", "  max_steps: 5000\n")
    toy_recipe.write_text(text + "prompts: {fallback: {query: 'Query:'}}\n")
    found = nearfield.dry_run(toy_recipe, settings, tmp_path / "run")
    assert found is not None
    assert found.would_start
    said = "\n".join(notice.what for notice in found.notices)
    assert "are cut at 8 tokens" in said
    assert "batches have fewer than 16 examples" in said
    assert "the warm-up of 500 steps is as long as the run" in said
    assert "max_steps is 5,000" in said
    assert not any(notice.blocks for notice in found.notices)


def test_too_little_disk_and_memory_block(toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfield.training import forecast, memory

    monkeypatch.setattr(forecast, "free_disk", lambda folder: 10)
    found = nearfield.dry_run(toy_recipe, run=tmp_path / "disk")
    assert found is not None
    assert not found.would_start
    assert found.notices[0].blocks
    assert "on the disk, and" in found.notices[0].what
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    found = nearfield.dry_run(toy_recipe, run=tmp_path / "memory")
    assert found is not None
    assert not found.would_start
    assert found.trial_steps == 0
    assert "more memory on each device" in found.notices[0].what


def test_missing_data_of_the_suite_blocks(toy_recipe: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: s\ntasks:\n  - {kind: folder, path: nowhere}\n")
    toy_recipe.write_text(toy_recipe.read_text() + f"evaluation: {{suite: {suite}}}\n")
    found = nearfield.dry_run(toy_recipe, run=tmp_path / "run")
    assert found is not None
    assert [c.what for c in found.notices if c.blocks] == [
        f"{suite}: the data of a task is missing: {tmp_path / 'nowhere'}"
    ]


def test_what_a_forecast_makes_of_a_machine(toy_recipe: Path, tmp_path: Path) -> None:
    import dataclasses

    found = nearfield.dry_run(toy_recipe, run=tmp_path / "run")
    assert found is not None
    assert found.forecast is not None
    zero = dataclasses.replace(found.forecast, backend="zero2", reductions=7, reduced_a_step=7_000_000)
    machine = Machine(checkpoints=1, disk_needed=1, disk_free=2, gpus=0, processes=1)
    [warned] = forecast_notices(zero, machine)
    assert "once a chunk, up to 7 times a step: 7 MB" in warned.what
    [unused] = forecast_notices(found.forecast, dataclasses.replace(machine, gpus=2))
    assert "a GPU is here" in unused.what


@pytest.mark.slow
def test_under_a_launcher_rank_0_prints(toy_recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "nearfield", "train"]
    command += [str(toy_recipe), "training.backend=fsdp2", "--run-folder", str(tmp_path / "run"), "--dry-run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The run would start") == 1
    assert "fsdp2, 2 process(es)" in done.stdout
