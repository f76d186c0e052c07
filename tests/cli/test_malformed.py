"""Damaged models, checkpoints, plans and runs, from the user's end: one message, exit code 2, no traceback."""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from nearfield.cli import main
from nearfield.pipeline import open_run, run_stages
from nearfield.training.checkpoint import checkpoint_paths
from tests.encoders.test_load import BROKEN_MODELS, break_model
from tests.training.test_checkpoint import damage

Command = Callable[..., str]


@pytest.fixture()
def refused(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must be refused, and give its message."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["-q", *arguments])
        message = capsys.readouterr().err
        assert stopped.value.code == 2, message
        assert message.count("nearfield: ") == 1
        assert "Traceback" not in message
        return message

    return run


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_models(toy_recipe: Path, tiny_model: Path, tmp_path: Path, kind: str, refused: Command) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    break_model(folder, kind)
    message = refused(
        "train",
        str(toy_recipe),
        f"encoder.model={folder}",
        "--run-folder",
        str(tmp_path / "runs" / "toy"),
        "--until",
        "tokens",
    )
    assert str(folder) in message


@pytest.mark.parametrize("kind", ["no checksums", "a missing file", "a cut file", "another version", "empty"])
def test_checkpoints(toy_recipe: Path, tmp_path: Path, kind: str, refused: Command) -> None:
    run = tmp_path / "runs" / "toy"
    run_stages(open_run(toy_recipe, (), run), "train")
    for path in checkpoint_paths(run / "checkpoints"):
        damage(path, kind)
    shutil.rmtree(run / "model")
    message = refused("train", str(toy_recipe), "--run-folder", str(run), "--until", "train")
    assert "none of the checkpoints can be used" in message
    assert "--restart" in message
    assert checkpoint_paths(run / "checkpoints"), "nothing was removed"


def test_runs(toy_recipe: Path, tmp_path: Path, refused: Command) -> None:
    assert "no recipe.yaml" in refused("run", "status", str(tmp_path))
    run = tmp_path / "runs" / "toy"
    run_stages(open_run(toy_recipe, (), run), "plan")
    (run / "manifest.json").write_text("{")
    message = refused("run", "status", str(run))
    assert "not valid JSON" in message and "Delete it" in message
    (run / "manifest.json").write_text("[]")
    assert "not one of a run" in refused("train", str(toy_recipe), "--run-folder", str(run))
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused("train", str(toy_recipe), "--run-folder", str(file))
    assert "no stage 'nothing'" in refused(
        "train", str(toy_recipe), "--run-folder", str(tmp_path / "x"), "--until", "nothing"
    )
    assert "no examples in the split 'dev'" in refused(
        "plan", str(toy_recipe), "split=dev", "--run-folder", str(tmp_path / "y")
    )


def test_token_caches(toy_recipe: Path, tmp_path: Path) -> None:
    """They can be made again, so they are."""
    run = tmp_path / "runs" / "toy"
    run_stages(open_run(toy_recipe, (), run), "tokens")
    (cache,) = (tmp_path / "runs" / ".cache" / "tokens").iterdir()
    before = (cache / "tokens.json").read_bytes()
    (cache / "tokens.json").write_text('{"version": 99}')
    assert "tokens" in run_stages(open_run(toy_recipe, (), run), "plan").ran
    assert (cache / "tokens.json").read_bytes() == before


def test_arguments(refused: Command) -> None:
    for arguments in (("nonsense",), ("train",), ("train", "--nonsense"), ("recipe", "check")):
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code == 2


def _save_tensors() -> None:
    """safetensors puts a new file in the place of one, so that a limit on sizes stands in for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_file({"a": torch.zeros(9000)}, f"{folder}/tensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def _save_array() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        np.save(file, np.zeros(90_000))


def _save_table() -> None:
    table = pa.table({"a": list(range(50_000))})
    with pa.OSFile("/dev/full", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a thing of Linux")
@pytest.mark.parametrize("write", [_save_tensors, _save_array, _save_table])
def test_a_full_disk_is_one_message_whatever_library_writes(
    write: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nearfield.cli.app", lambda arguments: write())
    with pytest.raises(SystemExit) as stopped:
        main([])
    message = capsys.readouterr().err
    assert stopped.value.code == 1 and message.startswith("nearfield: ")
    assert "run the same command again: what was whole is kept" in message


def test_other_errors_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError("3 apples"), OSError(5, "Input/output error"), RuntimeError("(os error 28)")):

        def fail(arguments: list[str], error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("nearfield.cli.app", fail)
        with pytest.raises(type(error)):
            main([])
