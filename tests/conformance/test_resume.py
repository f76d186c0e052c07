"""A run that was interrupted ends with the very bits of one that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nearfield.errors import StoppedError
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages
from nearfield.training import step as step_module

pytestmark = pytest.mark.conformance

TIMES = ("seconds",)


def figures(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run / "metrics.jsonl")]


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture()
def whole(toy_recipe: Path, tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "whole"
    run_stages(open_run(toy_recipe, (), run), "train")
    return run


@pytest.mark.parametrize("stop_after", [1, 6, 11])
def test_stopped_by_a_signal(
    toy_recipe: Path, tmp_path: Path, whole: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "stopped"
    run_step = step_module.run_step

    def interrupted(*args: object, **kwargs: object) -> object:
        if kwargs["step"] == stop_after - 1:
            signal.raise_signal(signal.SIGTERM if stop_after % 2 else signal.SIGINT)
        return run_step(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "run_step", interrupted)
    with pytest.raises(StoppedError, match=f"after step {stop_after} of 12"):
        run_stages(open_run(toy_recipe, (), run), "train")
    assert [line["step"] for line in figures(run)] == list(range(1, stop_after + 1))
    monkeypatch.setattr(step_module, "run_step", run_step)
    run_stages(open_run(toy_recipe, (), run), "train")
    assert json.loads((run / "manifest.json").read_text())["stages"]["train"]["resumed_from"] == stop_after
    assert figures(run) == figures(whole)
    assert all(np.array_equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


@pytest.mark.parametrize(
    "settings",
    [["training.gradient_cache=always", "training.micro_batch_tokens=40"], ["training.micro_batch_tokens=40"]],
    ids=["cached", "small chunks"],
)
def test_crash_between_checkpoints(
    toy_recipe: Path, tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash at step 7 goes on from the checkpoint of step 4, with a torn line in the metrics."""
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "crashed"
    run_stages(open_run(toy_recipe, settings, whole), "train")
    run_step = step_module.run_step

    def crashing(*args: object, **kwargs: object) -> object:
        if kwargs["step"] == 7:
            raise MemoryError
        return run_step(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "run_step", crashing)
    with pytest.raises(MemoryError):
        run_stages(open_run(toy_recipe, settings, run), "train")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    monkeypatch.setattr(step_module, "run_step", run_step)
    run_stages(open_run(toy_recipe, settings, run), "train")
    assert json.loads((run / "manifest.json").read_text())["stages"]["train"]["resumed_from"] == 4
    assert figures(run) == figures(whole)
    assert all(np.array_equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def test_a_damaged_checkpoint_is_passed_over(
    toy_recipe: Path, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "damaged"
    run_step = step_module.run_step

    def crashing(*args: object, **kwargs: object) -> object:
        if kwargs["step"] == 9:
            raise MemoryError
        return run_step(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "run_step", crashing)
    with pytest.raises(MemoryError):
        run_stages(open_run(toy_recipe, (), run), "train")
    newest = run / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    monkeypatch.setattr(step_module, "run_step", run_step)
    run_stages(open_run(toy_recipe, (), run), "train")
    assert "step-00000008 is passed over" in caplog.text
    assert json.loads((run / "manifest.json").read_text())["stages"]["train"]["resumed_from"] == 4
    assert all(np.array_equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())
