"""The launch scripts with real trainings: two machines that are one, and a batch job that is stopped and queued again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nearfield.pipeline import open_run, run_stages
from nearfield.training.checkpoint import checkpoint_paths
from tests.patience import PATIENCE
from tests.scripts.test_scripts import MULTINODE, SBATCH, write_program
from tests.training.launching import SGD, environment, train_record, wait_for_steps
from tests.training.test_launching import check_model

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


@pytest.fixture()
def single(toy_recipe: Path, tmp_path: Path) -> Path:
    """The model of one process."""
    run_stages(open_run(toy_recipe, SGD, tmp_path / "single"), "train")
    return tmp_path / "single" / "model"


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_two_machines(toy_recipe: Path, tmp_path: Path, single: Path, tiny_model: Path, backend: str) -> None:
    """Each in a folder of its own, with data that it built itself."""
    port, processes = str(free_port()), []
    for rank in (1, 0):
        here = tmp_path / f"machine{rank}"
        here.mkdir()
        variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NNODES": "2", "NODE_RANK": str(rank)}
        command = ["bash", str(MULTINODE), str(toy_recipe), *SGD, f"training.backend={backend}", "--until", "train"]
        processes.append(
            subprocess.Popen(
                command,
                env=environment(**variables, NPROC="1", SHARED="no", PYTHON=sys.executable),
                cwd=here,
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    run = tmp_path / "machine0" / "runs" / "toy"
    assert (train_record(run)["backend"], train_record(run)["world_size"]) == (backend, 2)
    check_model(run / "model", single, tiny_model)
    assert not (tmp_path / "machine1" / "runs" / "toy" / "model").exists()


@pytest.mark.parametrize("name", SBATCH)
def test_a_batch_job(toy_recipe: Path, tmp_path: Path, name: str) -> None:
    """Stopped in the middle by its time limit, it goes on in a second job to the end."""
    # As many launchers as there are machines, each told which by nothing but the rendezvous.
    count = 2 if name == "many_nodes" else 1
    srun = "while [[ $1 == --* ]]; do shift; done\npids=(); trap 'kill -TERM \"${pids[@]}\"' TERM\n"
    srun += f"for _ in $(seq {count}); do " + '"$@" & pids+=($!); done\ncode=0\n'
    srun += 'for pid in "${pids[@]}"; do while :; do wait "$pid"; c=$?; kill -0 "$pid" 2>/dev/null || break; done\n'
    srun += "[[ $c -eq 0 ]] || code=$c; done; exit $code\n"
    write_program(tmp_path / "bin" / "srun", srun)
    write_program(
        tmp_path / "bin" / "scontrol",
        f'case "$1" in show) echo localhost ;; *) echo "$*" >> {tmp_path}/scontrol.log ;; esac\n',
    )
    variables = environment(
        PYTHON=sys.executable,
        SLURM_JOB_ID="4711",
        SLURM_JOB_NODELIST="localhost",
        SLURM_JOB_NUM_NODES=str(count),
        NPROC=str(2 // count),
        PORT=str(free_port()),
        RUN=str(tmp_path / "runs" / "job"),
    )
    variables["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"
    run = tmp_path / "runs" / "job"

    def job(*settings: str) -> subprocess.Popen[str]:
        command = ["bash", str(SBATCH[name]), str(toy_recipe), "training.epochs=20", *settings, "--until", "train"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=variables, stderr=pipe, stdout=pipe, text=True, cwd=tmp_path)

    long = ["training.max_steps=140", "training.checkpoints.every_steps=100", "training.backend=fsdp2"]
    first = job(*long)
    wait_for_steps(first, run, 5)
    first.send_signal(signal.SIGUSR1)
    errors = first.communicate(timeout=PATIENCE)[1]
    assert "stopped by SIGTERM" in errors or "stopped by another rank" in errors, errors
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n", errors
    (last,) = checkpoint_paths(run / "checkpoints")[-1:]
    assert 5 <= int(last.name.removeprefix("step-")) < 140
    second = job(*long)
    errors = second.communicate(timeout=PATIENCE)[1]
    assert second.returncode == 0, errors
    manifest = json.loads((run / "manifest.json").read_text())["stages"]["train"]
    assert (manifest["steps"], manifest["world_size"]) == (140, 2)
    assert manifest["resumed_from"] == int(last.name.removeprefix("step-"))
