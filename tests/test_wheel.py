"""The built wheel, installed alone outside the repository, trains the quickstart's recipe, on one process and on two."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_alone_trains(tmp_path: Path) -> None:
    """Build, install into a fresh environment, init, train a few steps. Minutes: it installs everything anew."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)], check=True
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-c", constraints, f"nearfield[offline] @ file://{wheel}"],
        check=True,
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    nearfield = str(tmp_path / "env" / "bin" / "nearfield")
    subprocess.run([nearfield, "init", "project"], cwd=tmp_path, check=True, env=environment)
    command = [nearfield, "train", "training/recipes/wordnet.yaml", "training.max_steps=3", "--until", "train"]
    subprocess.run(command, cwd=tmp_path / "project", check=True, env=environment)
    launch = [str(tmp_path / "env" / "bin" / "accelerate"), "launch", "--config_file", "training/accelerate/fsdp2.yaml"]
    launch += ["-m", "nearfield", *command[1:3], "training.max_steps=2", "name=launched", "--until", "train"]
    two = {**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, cwd=tmp_path / "project", check=True, env=two, capture_output=True, text=True)
    assert "Backend fsdp2 in effect on 2 process(es)" in done.stderr, "the files of the wheel launch two ranks"
    model = tmp_path / "project" / "runs" / "wordnet" / "model"
    code = f"from sentence_transformers import SentenceTransformer as S; print(S({str(model)!r}, device='cpu').encode('a word').shape)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True, env=environment
    )
    assert "(384,)" in done.stdout
