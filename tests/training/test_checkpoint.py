"""Checkpoints: whole or not there, newest that verifies, clear words about all others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nearfield.errors import BadInputError
from nearfield.files import hash_file
from nearfield.training import checkpoint as module
from nearfield.training.checkpoint import checkpoint_paths, load_checkpoint, newest_checkpoint, save_checkpoint


def make(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def work(model: torch.nn.Module, optimizer: torch.optim.AdamW, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(step % 3))).square().sum().backward()
        optimizer.step()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model, optimizer = make()
    work(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, {"fingerprint": "f"}, keep_last=2)
    work(model, optimizer, 4, start=3)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["fingerprint"]) == (3, "f")
    other, other_optimizer = make(seed=9)
    load_checkpoint(found, other, other_optimizer)
    work(other, other_optimizer, 4, start=3)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_keeps_the_last(tmp_path: Path) -> None:
    model, optimizer = make()
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep_last=2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_newer_damaged_one_does_not_push_out_the_good(tmp_path: Path) -> None:
    model, optimizer = make()
    for step in (8, 12):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep_last=2)
    damage(tmp_path / "step-00000012", "a cut file")
    save_checkpoint(tmp_path, 10, model, optimizer, {}, keep_last=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10


def test_a_crash_inside_the_writing_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=2)

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "optimizer_tensors", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep_last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(BadInputError, match="No space left"):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep_last=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def damage(path: Path, kind: str) -> None:
    if kind == "no checksums":
        (path / "checksums.json").unlink()
    elif kind == "checksums are no JSON":
        (path / "checksums.json").write_text("{")
    elif kind == "a missing file":
        (path / "optimizer.safetensors").unlink()
    elif kind == "a cut file":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-3])
    elif kind == "another version":
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "version": 99}))
        sums = json.loads((path / "checksums.json").read_text())
        (path / "checksums.json").write_text(json.dumps({**sums, "state.json": hash_file(path / "state.json")}))
    elif kind == "empty":
        shutil.rmtree(path)
        path.mkdir()


@pytest.mark.parametrize(
    "kind", ["no checksums", "checksums are no JSON", "a missing file", "a cut file", "another version", "empty"]
)
def test_a_damaged_one_is_passed_over_and_told(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep_last=2)
    damage(tmp_path / "step-00000002", kind)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is passed over" in caplog.text
    damage(tmp_path / "step-00000001", kind)
    with pytest.raises(BadInputError, match="none of the checkpoints") as error:
        newest_checkpoint(tmp_path)
    assert "--restart" in str(error.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    work(model, optimizer, 1)
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=2)
    other = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(BadInputError, match="does not fit the model"):
        load_checkpoint(found, other, torch.optim.AdamW(other.parameters()))


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
