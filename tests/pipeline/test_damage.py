"""A flipped bit in any artifact of a run: made again where it can be, else one message with the command that mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from nearfield import files
from nearfield.batching.plan import Plan
from nearfield.cli.app import app
from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.data import Store
from nearfield.data.tokens import TokenCache
from nearfield.data.vectors import ItemVectors
from nearfield.errors import BadInputError
from nearfield.files import SUMS, DamagedError
from nearfield.mining.negatives import Negatives
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.stages import Stages
from tests.pipeline.pairs import write_pairs

STAGES = ("data", "vectors", "mine", "tokens", "plan")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its plan, with all kinds of artifacts before training."""
    folder = tmp_path_factory.mktemp("damage")
    save_tiny_bert(folder / "base")
    write_pairs(folder)
    recipe: dict[str, Any] = {
        "name": "toy",
        "data": "data.yaml",
        "encoder": {"model": "base"},
        "mining": {"negatives": 2, "depth": 4},
        "batches": {"kind": "single_source", "batch_size": 8},
        "training": {"epochs": 1, "max_steps": 2, "trackers": [], "checkpoints": {"every_steps": 1}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_stages(open_run(folder / "recipe.yaml", folder=folder / "runs" / "toy"), "plan")
    return folder


def flip(file: Path, place: float = 0.5, bit: int = 4) -> None:
    """One bit, as a disk would: the times stay. The next process is played by forgetting what this one has read."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[min(int(len(content) * place), len(content) - 1)] ^= bit
    file.write_bytes(bytes(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    files._checked.clear()


def artifacts(folder: Path) -> dict[str, Path]:
    stages = Stages.of(open_run(folder / "recipe.yaml", folder=folder / "runs" / "toy"))
    return {stage.name: path for stage in stages.wanted("plan") for path in stage.sealed()}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        f"{stage}/{file.relative_to(path)}": file.read_bytes()
        for stage, path in artifacts(folder).items()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def read_all(stage: str, path: Path) -> None:
    """Everything that a training would read of an artifact."""
    if stage == "data":
        store = Store.open(path)
        store.texts(range(store.items.num_rows))
        store.examples.to_pylist()
        store.items["id"].to_pylist()
    elif stage == "vectors":
        vectors = ItemVectors.open(path)
        for role, table in vectors.tables.items():
            vectors.of(role, np.asarray(table.keys))
    elif stage == "mine":
        Negatives(path)
    elif stage == "tokens":
        for table in TokenCache(path).tables:
            for row in table.rows:
                table.of(int(row))
    else:
        for file in sorted(path.glob("*.parquet")):
            Plan(file).batch(0)


READ_BY_NOBODY_ELSE = {"summary.json", "quarantine.jsonl", "short.jsonl"}
"""Counts for people: `run verify` and the next start look at them."""


@pytest.mark.parametrize("stage", STAGES)
def test_every_reader_finds_a_flipped_bit_in_every_file(planned: Path, tmp_path: Path, stage: str) -> None:
    path = Path(shutil.copytree(artifacts(planned)[stage], tmp_path / artifacts(planned)[stage].name))
    files._checked.clear()
    read_all(stage, path)
    for file in sorted(path.rglob("*")):
        if file.name in READ_BY_NOBODY_ELSE or not file.is_file() or not file.stat().st_size:
            continue
        for place in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            flip(file, place)
            with pytest.raises(BadInputError) as error:
                read_all(stage, path)
            assert error.value.hint, (file.name, place)
            assert isinstance(error.value, DamagedError), (file.name, place, error.value)
            flip(file, place)
    read_all(stage, path)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_damaged_is_made_again_as_it_was(
    planned: Path, tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "project"))
    run = open_run(folder / "recipe.yaml", folder=folder / "runs" / "toy")
    run_stages(run, "plan")
    known = contents(folder)
    for file in sorted(artifacts(folder)[stage].rglob("*")):
        if file.is_file() and file.stat().st_size:
            flip(file)
            assert contents(folder) != known
            caplog.clear()
            ran = run_stages(run, "plan").ran
            assert ran == (stage,) and "runs again" in caplog.text
            assert contents(folder) == known, file.name
    (artifacts(folder)[stage] / SUMS).unlink()  # as an earlier version left it
    caplog.clear()
    assert run_stages(run, "plan").ran == (stage,) and "an earlier version" in caplog.text
    assert run_stages(run, "plan").ran == ()


def test_the_hint_for_a_damaged_plan_mends_it(planned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "project"))
    file = folder / "runs" / "toy" / "plan" / "epoch-000.parquet"
    file = file if file.is_file() else next(file.parent.glob("*.parquet"))
    known = file.read_bytes()
    flip(file)
    with pytest.raises(DamagedError) as error:
        Plan(file)
    assert error.value.hint is not None and "nearfield plan RECIPE" in error.value.hint
    arguments = ["-q", "plan", str(folder / "recipe.yaml"), "--run-folder", str(folder / "runs" / "toy")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert file.read_bytes() == known
    files._checked.clear()
    Plan(file)


def test_verification_on_request_reads_everything_and_says_what_mends_it(planned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "project"))
    run = open_run(folder / "recipe.yaml", folder=folder / "runs" / "toy")
    run_stages(run, "train")
    place = str(run.folder)

    def verify() -> tuple[int, str]:
        result = CliRunner().invoke(app, ["-q", "run", "verify", place], catch_exceptions=False)
        return result.exit_code, result.output

    code, output = verify()
    assert code == 0 and "tokens" in output and "checkpoint step-00000002" in output and "model" in output
    last = run.folder / "checkpoints" / "step-00000002" / "model.safetensors"
    damaged = [*artifacts(folder).values(), last.parent, run.folder / "model"]
    for path, name in zip(damaged, [*STAGES, "step-00000002", "model"], strict=True):
        file = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        flip(file, 0.9)
        code, output = verify()
        assert code == 1 and sum("mend:" in line for line in output.splitlines()) == 1, name
        told = [line for line in output.splitlines() if name in line.partition("/")[0] and "every byte" not in line]
        assert len([line for line in told if "mend" not in line]) == 1, (name, output)
        flip(file, 0.9)
    assert verify()[0] == 0


def test_every_process_checks_for_itself(planned: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(artifacts(planned)["tokens"], tmp_path / "tokens"))
    code = "import sys; from pathlib import Path; from nearfield.data.tokens import TokenCache\n"
    code += "for table in TokenCache(Path(sys.argv[1])).tables: [table.of(int(row)) for row in table.rows]"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
    flip(next(path.glob("*.ids.bin")))
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert result.returncode and "does not have the checksum" in result.stderr


def test_a_training_goes_on_after_its_plan_was_damaged(planned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "project"))
    whole = open_run(folder / "recipe.yaml", folder=folder / "runs" / "whole")
    run_stages(whole, "train")
    run = open_run(folder / "recipe.yaml", folder=folder / "runs" / "toy")
    run_stages(run, "train")
    shutil.rmtree(run.folder / "model")
    shutil.rmtree(run.folder / "checkpoints" / "step-00000002")
    flip(next((run.folder / "plan").glob("*.parquet")))
    assert run_stages(run, "train").ran == ("plan", "train")
    assert run.record("train")["resumed_from"] == 1
    weights = [each.folder / "model" / "model.safetensors" for each in (whole, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_damaged_model_is_not_scored(planned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "project"))
    run = open_run(folder / "recipe.yaml", folder=folder / "runs" / "toy")
    run_stages(run, "train")
    file = run.folder / "model" / "model.safetensors"
    known = file.read_bytes()
    Stages.of(run).evaluate.check_model()
    flip(file, 0.9)
    with pytest.raises(BadInputError, match="not the one that this training wrote") as error:
        Stages.of(run).evaluate.check_model()
    assert error.value.hint is not None and f"rm -r {run.folder / 'model'}" in error.value.hint
    shutil.rmtree(run.folder / "model")
    run_stages(run, "train")
    assert file.read_bytes() == known
