"""A package of its own brings a loss, a planner and a reader; with no edit here they work from the data to the report."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nearfield.conformance.tiny_models import WORDS
from nearfield.files import read_json

PLUGIN = Path(__file__).parent / "plugin"
# Commands one after the other, each with its exit code. In the third batch that the loss of the package sees while it
# trains, the training is stopped as by a signal.
COMMANDS = """
import json, signal, sys
from nearfield.cli import main
import demo_kinds
forward, seen = demo_kinds.Hinge.forward, []
def stopping(self, batch):
    if getattr(signal.getsignal(signal.SIGTERM), "__name__", "") == "_receive":
        seen.append(batch)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)
    return forward(self, batch)
demo_kinds.Hinge.forward = stopping
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        print("ended with", ended.code)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the package installed from a wheel, beside all that this one has."""
    folder = tmp_path_factory.mktemp("plugin")
    about = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    wheel = folder / f"demo_kinds-{about['version']}-py3-none-any.whl"
    info = f"demo_kinds-{about['version']}.dist-info"
    entries = "".join(
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in names.items())
        for group, names in about["entry-points"].items()
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(PLUGIN / "demo_kinds.py", "demo_kinds.py")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", entries)
        archive.writestr(f"{info}/RECORD", "")
    place = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = str(place / "bin" / "python")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (packages / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    return python


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe of the package's kinds: the loss by its import path, the others by the names that it registers."""
    folder = tmp_path_factory.mktemp("plugged")
    choose = random.Random(1)
    lines = []
    for number in range(60):
        words = choose.sample(WORDS, 10)
        lines.append(f"{' '.join(words[:3])} word{number}\t{' '.join(words)} word{number}")
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text(
        "name: demo\n"
        "sources:\n"
        "  - name: pairs\n"
        "    task_type: Retrieval\n"
        f"    reader: {{kind: demo-tabbed, path: {folder / 'pairs.txt'}}}\n"
        "    examples: {kind: retrieval, query: query, positives: positive}\n"
        "    split: {kind: hash, fractions: {train: 0.7, test: 0.3}, seed: 0}\n"
    )
    (folder / "suite.yaml").write_text(
        "name: demo\ntasks:\n  - {kind: heldout, name: DemoTest, data: data.yaml, source: pairs, split: test}\n"
    )
    path = folder / "recipe.yaml"
    path.write_text(
        "name: demo\n"
        f"encoder: {{model: {tiny_model}}}\n"
        "data: data.yaml\n"
        "objective: {kind: 'demo_kinds:HingeLoss', margin: 0.25}\n"
        "batches: {kind: demo-in-order, batch_size: 8}\n"
        "training: {epochs: 1, learning_rate: 0.05, optimizer: {kind: sgd}, dropout: false, device: cpu, trackers: []}\n"
        "evaluation: {suite: suite.yaml, before: true, baselines: []}\n"
    )
    return path


def call(python: str, *arguments: str | Path) -> str:
    """The output of a command, standard error too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(python).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_package_of_its_own_from_data_to_report(python: str, recipe: Path, tmp_path: Path) -> None:
    """Its code is named; a training that was stopped, and one of two ranks, come to the same model; scores and report follow."""
    one, two = tmp_path / "one", tmp_path / "two"
    train = ["train", str(recipe), "--run-folder", str(one)]
    status = ["run", "status", str(one)]
    commands = [["recipe", "check", str(recipe)], train, train, status, [*status, "objective.margin=0.5"]]
    said = call(python, "-c", COMMANDS, json.dumps(commands)).split("ended with ")
    assert [part[0] for part in said[1:]] == ["0", "3", "0", "0", "0"], said
    assert "demo_kinds:HingeLoss runs code of " in said[0]
    log = said[-1]
    for kind in ("demo_kinds:HingeLoss", "demo-in-order", "demo-tabbed"):
        assert f"the kind {kind!r} runs code of " in " ".join(log.split())
    assert ("stale" in said[3], "stale" in said[4]) == (False, True)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nearfield"]
    call(python, *ranks, "train", recipe, "--run-folder", two, "--until", "train")
    ours, theirs = (dict(load_file(run / "model" / "model.safetensors")) for run in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=1e-3, atol=1e-6)
    manifest = read_json(one / "manifest.json", "manifest")
    told = [notice["what"] for notice in manifest["notices"] if notice["code"] == "outside-code"]
    assert len(told) == 3
    assert all("demo-kinds 1.2" in what for what in told)
    assert 0 < manifest["stages"]["train"]["resumed_from"] < manifest["stages"]["train"]["steps"]
    assert (one / "report.html").is_file()
    assert len(json.loads((one / "comparison.json").read_text())["models"]) == 2
