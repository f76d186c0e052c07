"""Ranks that die, hang or are asked to stop in the middle of a training, under torchrun itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nearfield.training.checkpoint import checkpoint_paths
from tests.conftest import write_toy_recipe
from tests.patience import PATIENCE
from tests.training.launching import (
    PYTHONPATH,
    ROOT,
    TORCHRUN,
    environment,
    launch,
    rank_processes,
    train_record,
    wait_for_steps,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, toy_data: Path) -> Path:
    """A folder with the toy recipe; its runs share their data."""
    folder = tmp_path_factory.mktemp("ending")
    write_toy_recipe(folder, tiny_model, toy_data)
    return folder


def start_long(
    folder: Path, name: str, *settings: str, script: tuple[str, ...] = (), anew: bool = True
) -> subprocess.Popen[str]:
    """A training of many steps on two ranks; standard error of both in a pipe."""
    if anew:
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    target = script or ("-m", "nearfield")
    long = ["training.epochs=60", "training.max_steps=500", "training.checkpoints.every_steps=5", *settings]
    command = [*TORCHRUN, *target, "train", str(folder / "toy.yaml"), *long, "--until", "train"]
    command += ["--run-folder", str(folder / "runs" / name)]
    return subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder
    )


def exit_codes(errors: str) -> list[int]:
    """The codes that torchrun says its ranks ended with."""
    return [int(code) for code in re.findall(r"exitcode\s+: (-?\d+)", errors)]


@pytest.mark.parametrize(
    ("rank", "settings"),
    [
        (1, ()),
        pytest.param(0, ("training.backend=fsdp2",), marks=pytest.mark.slow),
        pytest.param(1, ("training.backend=zero3",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_killed_rank_ends_the_others_by_name(folder: Path, rank: int, settings: tuple[str, ...]) -> None:
    process = start_long(folder, "killed", *settings)
    wait_for_steps(process, folder / "runs" / "killed", 6)
    victim = rank_processes(process.pid)[rank]
    os.kill(victim, signal.SIGKILL)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode != 0
    name = f"rank {rank} of 2 (on {os.uname().nodename}, process {victim})"
    assert f"nearfield: rank {1 - rank}: {name} was killed: its process is gone; the other ranks end too" in errors
    assert sorted(exit_codes(errors)) == [-9, 1]
    assert 'File "' + str(ROOT / "src") not in errors, "no traceback of ours"
    assert checkpoint_paths(folder / "runs" / "killed" / "checkpoints")


@pytest.mark.slow
def test_a_rank_that_leaves_without_a_word(folder: Path) -> None:
    """``os._exit``, as a library may do: no exception, no clean-up, code 0."""
    script = (str(Path(__file__).with_name("vanishing_rank.py")), "1", "6")
    process = start_long(folder, "vanished", script=script)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert "rank 1 of 2" in errors and "its process is gone; the other ranks end too" in errors
    assert process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_a_rank_that_hangs_is_found_by_its_silence(folder: Path, backend: str) -> None:
    """A stopped process answers nothing and closes nothing: the others would wait in a collective for ever."""
    process = start_long(folder, "hanging", f"training.backend={backend}")
    wait_for_steps(process, folder / "runs" / "hanging", 6)
    ranks = rank_processes(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{ranks[0]}").exists():
        assert time.monotonic() < deadline, "the other rank waits for ever"
        time.sleep(0.2)
    errors = process.communicate(timeout=PATIENCE)[1]
    name = re.escape(f"rank 1 of 2 (on {os.uname().nodename}, process {ranks[1]})")
    assert re.search(rf"{name} has been silent for \d+ s", errors), errors
    assert 'File "' + str(ROOT / "src") not in errors


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank 0", "rank 1", "launcher", "Ctrl-C"])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_goes_on(folder: Path, who: str) -> None:
    name = f"asked-{who.replace(' ', '-')}"
    run = folder / "runs" / name
    # Seven steps an epoch.
    settings = ("training.backend=fsdp2", "training.epochs=20")
    process = start_long(folder, name, *settings)
    wait_for_steps(process, run, 6)
    ranks = rank_processes(process.pid)
    if who == "Ctrl-C":
        # A terminal sends it to all of its processes; the launcher hands it on as well.
        for pid in (*ranks.values(), process.pid):
            os.kill(pid, signal.SIGINT)
    else:
        os.kill(process.pid if who == "launcher" else ranks[int(who[-1])], signal.SIGTERM)
    errors = process.communicate(timeout=PATIENCE)[1]
    last = checkpoint_paths(run / "checkpoints")[-1]
    assert len(re.findall(rf"nearfield: {re.escape(str(last))}: stopped by .* of 140", errors)) == 2, errors
    if who.startswith("rank"):
        assert exit_codes(errors) == [3, 3]
    resumed = start_long(folder, name, *settings, anew=False)
    errors = resumed.communicate(timeout=PATIENCE)[1]
    assert resumed.returncode == 0, errors
    record = train_record(run)
    assert (record["steps"], record["resumed_from"]) == (140, int(last.name.removeprefix("step-")))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def farthest(one: Path, other: Path) -> float:
    """The largest difference of two runs' weights."""
    first, second = weights(one), weights(other)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    """Begun on two ranks, stopped, and gone on with by one process and by three: chunks and dropout masks are those of two."""
    steps = ["training.optimizer={kind: sgd}", "training.learning_rate=0.1", "training.max_steps=10"]
    settings = [*steps, "training.micro_batch_tokens=96", "training.graph_tokens=96", "training.dropout=true"]
    runs = folder / "runs"

    def arguments(name: str) -> list[str]:
        return ["train", str(folder / "toy.yaml"), *settings, "--until", "train", "--run-folder", str(runs / name)]

    def train(name: str, ranks: int) -> str:
        start = [*TORCHRUN[:-1], f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
        done = launch([*start, "-m", "nearfield", *arguments(name)], cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    case = {"name": "elastic", "arguments": arguments("one"), "faults": {"0": {"terminated": [4]}}}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    script = str(Path(__file__).with_name("ranks_launched.py"))
    stopped = launch([*TORCHRUN, script, str(tmp_path / "cases.json"), str(tmp_path)], PYTHONPATH=PYTHONPATH)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    (left,) = checkpoint_paths(runs / "one" / "checkpoints")
    shutil.copytree(runs / "one", runs / "three")
    train("whole", 2)
    for name, ranks in (("one", 1), ("three", 3)):
        said, record = train(name, ranks), train_record(runs / name)
        assert (record["world_size"], record["steps"]) == (ranks, 10)
        assert record["resumed_from"] == int(left.name.removeprefix("step-"))
        assert ("Ranks are busy" in said) == (ranks > 1)
        assert farthest(runs / name, runs / "whole") < 1e-6
    train("begun-alone", 1)
    assert farthest(runs / "begun-alone", runs / "whole") > 1e-4, "a run that begins on one rank draws other masks"
