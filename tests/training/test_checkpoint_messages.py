"""The content of a checkpoint's folder, and the message for each checkpoint that cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nearfield.errors import BadInputError
from nearfield.files import hash_file
from nearfield.training import checkpoint as module
from nearfield.training.backends.replicated import named_state
from nearfield.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    load_into,
    newest_checkpoint,
    read_tensors,
)
from tests.training.test_checkpoint import make, save, work

FILES = ["checksums.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def saved(folder: Path, step: int = 7) -> Path:
    backend = make()
    work(backend, 1)
    return save(folder, step, backend, {"fingerprint": "f"})


def rewrite(file: Path, text: str) -> None:
    """Change a file and its checksum."""
    file.write_text(text)
    sums = json.loads((file.parent / "checksums.json").read_text())
    (file.parent / "checksums.json").write_text(json.dumps({**sums, file.name: [hash_file(file)]}))


def reason(folder: Path) -> str:
    with pytest.raises(BadInputError) as error:
        newest_checkpoint(folder)
    assert error.value.where == str(folder)
    assert error.value.hint == "Start this training anew with --restart; the old checkpoints are kept aside."
    first, _, rest = error.value.what.partition("\n")
    assert first == "none of the checkpoints can be used:"
    return rest


def test_the_folder(tmp_path: Path) -> None:
    path = saved(tmp_path / "checkpoints")
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == FILES
    state = {"version": 2, "step": 7, "fingerprint": "f", "files": ["model.safetensors", "optimizer.safetensors"]}
    assert json.loads((path / "state.json").read_text()) == state
    assert json.loads((path / "checksums.json").read_text()) == {name: [hash_file(path / name)] for name in FILES[1:]}
    assert sorted(load_file(path / "model.safetensors")) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert sorted(load_file(path / "optimizer.safetensors")) == sorted(
        f"{layer}.{name}/{key}"
        for layer in (0, 1)
        for name in ("weight", "bias")
        for key in ("exp_avg", "exp_avg_sq", "step")
    )
    assert newest_checkpoint(tmp_path / "checkpoints") == Checkpoint(path, 7, state)


def test_what_is_no_checkpoint_is_not_listed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for name in ("step-1", "step-000000012", "xstep-00000001", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert checkpoint_paths(tmp_path) == [path]


@pytest.mark.parametrize("name", FILES[1:])
def test_words_for_a_file_that_is_missing_or_changed(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path) / name
    content = file.read_bytes()
    file.write_bytes(content + b" ")
    assert reason(tmp_path) == f"{file}: this file of the checkpoint does not have its checksum"
    file.unlink()
    assert reason(tmp_path) == f"{file}: this file of the checkpoint is missing"
    file.write_bytes(content)
    assert newest_checkpoint(tmp_path) is not None


def test_words_for_checksums_that_are_none(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "checksums.json").write_text('["model.safetensors"]')
    assert reason(tmp_path) == f"{path / 'checksums.json'}: this list of checksums gives no list for each file"
    (path / "checksums.json").write_text("{")
    assert "list of checksums" in reason(tmp_path)


def test_words_for_another_version(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path / "state.json", '{"version": 99, "step": 7}')
    assert reason(tmp_path) == f"{path}: this checkpoint has version 99; 2 is wanted"
    rewrite(path / "state.json", '{"step": 7}')
    assert reason(tmp_path) == f"{path}: this checkpoint has version None; 2 is wanted"
    rewrite(path / "state.json", "{")
    assert "checkpoint state" in reason(tmp_path)


def test_all_reasons_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        (saved(tmp_path, step) / "state.json").unlink()
    missing = [
        f"{tmp_path / f'step-0000000{s}' / 'state.json'}: this file of the checkpoint is missing" for s in (2, 1)
    ]
    assert reason(tmp_path) == "\n".join(missing)
    assert caplog.messages == [
        f"Checkpoint step-0000000{step} is passed over: {text}" for step, text in zip((2, 1), missing, strict=True)
    ]
    assert {(record.name, record.levelname) for record in caplog.records} == {("nearfield.training", "WARNING")}


def test_who_may_refuse_a_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        saved(tmp_path, step)

    def accept(found: Checkpoint) -> None:
        if found.step == 2:
            raise BadInputError("too new")

    found = newest_checkpoint(tmp_path, accept)
    assert found is not None
    assert found.step == 1


def test_words_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(BadInputError) as error:
        saved(tmp_path, 3)
    assert error.value.what == "the checkpoint of step 3 could not be written: [Errno 28] No space left on device"
    assert error.value.where == str(tmp_path / "step-00000003")
    assert error.value.hint is not None
    assert re.fullmatch(
        r"It takes 0\.0 MB, and [\d,.]+ MB are free\. Earlier checkpoints are untouched: make room, "
        r"then run the same command again\.",
        error.value.hint,
    )


def test_the_size_that_is_told_is_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_234_560_000))
    big = {"weight": torch.zeros(1_000_000), "half": torch.zeros(1_000_000, dtype=torch.bfloat16)}
    with pytest.raises(BadInputError) as error:
        module.write_checkpoint(tmp_path / "step-00000001", 1, big, {"weight/exp_avg": torch.zeros(500_000)}, {})
    assert error.value.hint is not None
    assert error.value.hint.startswith("It takes 8.0 MB, and 1,234.6 MB are free. ")


def test_tensors_that_cannot_be_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    (path / "optimizer.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(BadInputError, match="this checkpoint cannot be read") as error:
        read_tensors(found)
    assert error.value.where == str(path)


def test_words_for_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(BadInputError) as error:
        load_into(make(width=5).module, found)
    assert error.value.where == str(path)
    assert error.value.what == "this checkpoint does not fit the model: '0.bias'"
    backend = make()
    save_file({"2.weight/step": torch.tensor(1.0)}, path / "optimizer.safetensors")
    with pytest.raises(KeyError, match=r"2\.weight"):
        backend.load(*read_tensors(found))


def test_a_state_that_is_a_number_becomes_a_tensor() -> None:
    """Some optimisers count their steps in plain numbers."""
    backend = make()
    weight = backend.parameters["0.weight"]
    backend.optimizer.state[weight] = {"step": 3.0, "exp_avg": torch.ones(3, 4)}
    tensors = dict(named_state(backend.optimizer, {id(weight): "0.weight"}, lambda tensor: tensor.detach()))
    assert list(tensors) == ["0.weight/exp_avg", "0.weight/step"]
    assert tensors["0.weight/step"].item() == 3.0
    copies = module._copies(backend.optimizer_tensors(), keep=True)
    backend.optimizer.state[weight]["exp_avg"].zero_()
    assert copies["0.weight/exp_avg"].sum() == 12, "a copy, not a view"


def test_loaded_state_replaces_what_was_there() -> None:
    backend = make()
    work(backend, 1)
    weight = backend.parameters["0.weight"]
    backend.load(dict(backend.model_tensors()), {"0.weight/step": torch.tensor(5.0)})
    assert list(backend.optimizer.state) == [weight]
    assert {key: value.item() for key, value in backend.optimizer.state[weight].items()} == {"step": 5.0}


def test_as_many_stay_as_are_wanted(tmp_path: Path) -> None:
    backend = make()
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, backend, keep_last=3)
        expected = [f"step-{s:08d}" for s in range(max(1, step - 2), step + 1)]
        assert [path.name for path in checkpoint_paths(tmp_path)] == expected
