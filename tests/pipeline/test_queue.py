"""A queue of earlier positives in a run: part of its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nearfield.errors import BadInputError
from nearfield.pipeline import open_run, run_stages

QUEUE = ("objective.queue=20", "training.max_steps=4", "batches.batch_size=8", "training.checkpoints.every_steps=2")


def test_resumed_is_uninterrupted_with_a_queue(toy_recipe: Path, tmp_path: Path) -> None:
    run_stages(open_run(toy_recipe, QUEUE, tmp_path / "run"), "train")
    checkpoints = tmp_path / "run" / "checkpoints"
    first, last = checkpoints / "step-00000002", checkpoints / "step-00000004"
    files = ("model.safetensors", "optimizer.safetensors", "extra.safetensors")
    straight = {name: load_file(last / name) for name in files}
    held = straight["extra.safetensors"]
    assert int(held["queue.pushed"]) == 32 and held["queue.ids"].shape == (20,)
    assert int(load_file(first / "extra.safetensors")["queue.pushed"]) == 16
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "run" / "model")
    run_stages(open_run(toy_recipe, QUEUE, tmp_path / "run"), "train")
    for name, tensors in straight.items():
        again = load_file(last / name)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors), name


def test_a_queue_takes_in_whole_batches(toy_recipe: Path, tmp_path: Path) -> None:
    run = open_run(toy_recipe, [*QUEUE, "training.averaged_batches=2"], tmp_path / "run")
    with pytest.raises(BadInputError, match="whole batches"):
        run_stages(run, "train")
