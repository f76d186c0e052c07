"""Checkpoints: whole or not there, newest that verifies, clear words about all others."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nearfield.errors import BadInputError
from nearfield.files import hash_file
from nearfield.training import checkpoint as module
from nearfield.training.backends.replicated import ReplicatedBackend
from nearfield.training.checkpoint import (
    CheckpointWriter,
    amend_state,
    checkpoint_paths,
    load_into,
    newest_checkpoint,
    open_checkpoint,
    read_tensors,
    write_checkpoint,
)

CPU = torch.device("cpu")


def make(seed: int = 0, width: int = 3) -> ReplicatedBackend:
    """Two linear layers with AdamW."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
    return ReplicatedBackend(
        model, lambda named: torch.optim.AdamW([p for _, p in named], lr=0.1, fused=True), CPU, 1, False
    )


def work(backend: ReplicatedBackend, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        backend.begin()
        backend.backward(backend.module(torch.full((2, 4), float(step % 3))).square().sum(), True)
        backend.update([0.1], None, backend.used())


def save(
    folder: Path, step: int, backend: ReplicatedBackend, state: dict[str, Any] | None = None, *, keep_last: int = 2
) -> Path:
    """Write a checkpoint and wait for it."""
    writer = CheckpointWriter(folder, keep_last, background=False, writes=True)
    return writer.save(step, backend.model_tensors(), backend.optimizer_tensors(), state or {})


def test_round_trip_is_exact(tmp_path: Path) -> None:
    backend = make()
    work(backend, 3)
    save(tmp_path, 3, backend, {"fingerprint": "f"})
    work(backend, 4, start=3)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["fingerprint"]) == (3, "f")
    other = make(seed=9)
    other.load(*read_tensors(found))
    work(other, 4, start=3)
    for ours, theirs in zip(other.module.parameters(), backend.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_weights_alone_go_into_a_whole_module(tmp_path: Path) -> None:
    backend = make()
    work(backend, 2)
    found = open_checkpoint(save(tmp_path, 2, backend))
    other = make(seed=9).module
    frozen = torch.nn.Parameter(torch.ones(2))
    other.register_parameter("frozen", frozen)
    load_into(other, found)
    for name, parameter in backend.module.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], parameter)
    assert torch.equal(frozen, torch.ones(2)), "what was not trained stays as it is"
    with pytest.raises(BadInputError, match=r"does not fit the model: '0\.bias'"):
        load_into(make(width=5).module, found)


def test_how_far_a_checkpoint_moves_the_encoder(tmp_path: Path) -> None:
    backend = make()
    path = tmp_path / "step-00000001"
    tensors = {f"encoder.{name}": tensor.clone() for name, tensor in backend.module.state_dict().items()}
    module = torch.nn.ModuleDict({"encoder": backend.module, "objective": torch.nn.Linear(2, 2)})
    learnt = {"objective.bias": torch.ones(2)}
    write_checkpoint(path, 1, {**tensors, **learnt}, {}, {})
    assert load_into(module, open_checkpoint(path)) == 0, "what an objective learns is no part of the model"
    write_checkpoint(path, 1, {**tensors, "encoder.0.bias": tensors["encoder.0.bias"] + 1.0}, {}, {})
    largest = max(float(parameter.abs().max()) for parameter in [*tensors.values(), tensors["encoder.0.bias"] + 1])
    assert load_into(module, open_checkpoint(path)) == pytest.approx(1 / largest)


def test_keeps_the_last(tmp_path: Path) -> None:
    backend = make()
    for step in (1, 2, 3, 4):
        save(tmp_path, step, backend)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_newer_damaged_one_does_not_push_out_the_good(tmp_path: Path) -> None:
    backend = make()
    for step in (8, 12):
        save(tmp_path, step, backend)
    damage(tmp_path / "step-00000012", "a cut file")
    save(tmp_path, 10, backend, keep_last=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10


def test_protected_ones_are_never_removed(tmp_path: Path) -> None:
    backend = make()
    writer = CheckpointWriter(tmp_path, 1, background=False, writes=True)
    for step in (1, 2, 3, 4):
        writer.protected = {2}
        writer.save(step, backend.model_tensors(), backend.optimizer_tensors(), {})
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
def test_a_crash_inside_the_writing_leaves_nothing_that_counts(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    save(tmp_path, 1, backend)

    def crash_at(write: Any, place: int) -> Any:
        def crash(*arguments: Any) -> None:
            if arguments[place].name == file:
                raise KeyboardInterrupt
            write(*arguments)

        return crash

    monkeypatch.setattr(module, "save_file", crash_at(module.save_file, 1))
    monkeypatch.setattr(module, "write_json", crash_at(module.write_json, 0))
    with pytest.raises(KeyboardInterrupt):
        module.write_checkpoint(tmp_path / "step-00000002", 2, dict(backend.model_tensors()), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make()
    save(tmp_path, 1, backend, keep_last=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(BadInputError, match="No space left"):
        save(tmp_path, 2, backend, keep_last=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "and no rubbish"


class Gate:
    """``save_file`` that waits to be opened, and then works or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.error, self.write = error, module.save_file
        self.threads: list[str] = []

    def __call__(self, *arguments: Any) -> None:
        self.threads.append(threading.current_thread().name)
        self.reached.set()
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        self.write(*arguments)


def test_training_goes_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the tensors as they were at the call, whatever became of them in the meantime."""
    gate = Gate()
    monkeypatch.setattr(module, "save_file", gate)
    backend = make()
    work(backend, 2)
    before = {name: tensor.clone() for name, tensor in backend.model_tensors()}
    moments = {name: tensor.clone() for name, tensor in backend.optimizer_tensors()}
    writer = CheckpointWriter(tmp_path, 2, background=True, writes=True)
    path = writer.save(2, backend.model_tensors(), backend.optimizer_tensors(), {"fingerprint": "f"})
    assert gate.reached.wait(60)
    work(backend, 3, start=2)
    writer.check()
    assert not path.exists(), "it is renamed only when it is whole"
    assert checkpoint_paths(tmp_path) == []
    gate.open.set()
    writer.wait()
    assert set(gate.threads) == {"nearfield-checkpoint"}
    found = open_checkpoint(path)
    model, optimizer = read_tensors(found)
    assert all(torch.equal(model[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(optimizer[name], tensor) for name, tensor in moments.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in backend.model_tensors())


def test_one_checkpoint_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(module, "save_file", gate)
    backend = make()
    writer = CheckpointWriter(tmp_path, 2, background=True, writes=True)
    writer.save(1, backend.model_tensors(), backend.optimizer_tensors(), {})
    assert gate.reached.wait(60)
    second = threading.Thread(
        target=writer.save, args=(2, backend.model_tensors(), backend.optimizer_tensors(), {}), daemon=True
    )
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second waits for the first"
    assert len(gate.threads) == 1
    gate.open.set()
    second.join(60)
    writer.wait()
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("call", ["wait", "check", "save"])
def test_a_full_disk_in_the_background_is_told_by_the_next_call(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    work(backend, 1)
    writer = CheckpointWriter(tmp_path, 2, background=True, writes=True)
    writer.save(1, backend.model_tensors(), backend.optimizer_tensors(), {})
    writer.wait()
    gate = Gate(OSError(28, "No space left on device"))
    monkeypatch.setattr(module, "save_file", gate)
    writer.save(2, backend.model_tensors(), backend.optimizer_tensors(), {})
    writer.check()  # still writing: nothing to tell
    gate.open.set()
    assert writer._thread is not None
    if call == "check":
        writer._thread.join()
    with pytest.raises(BadInputError) as error:
        if call == "save":
            writer.save(3, backend.model_tensors(), backend.optimizer_tensors(), {})
        else:
            getattr(writer, call)()
    assert error.value.what == "the checkpoint of step 2 could not be written: [Errno 28] No space left on device"
    assert error.value.hint is not None
    assert "MB, and" in error.value.hint and "MB are free" in error.value.hint
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    writer.wait()  # told once


def test_a_fault_in_the_background_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("never")

    monkeypatch.setattr(module, "prune", broken)
    backend = make()
    writer = CheckpointWriter(tmp_path, 2, background=True, writes=True)
    writer.save(1, backend.model_tensors(), backend.optimizer_tensors(), {})
    with pytest.raises(module.NearfieldError, match=r"could not be written: ZeroDivisionError\('never'\)"):
        writer.wait()


def test_who_leaves_in_an_error_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    monkeypatch.setattr(module, "save_file", gate)
    backend = make()
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, 2, background=True, writes=True) as writer:
        writer.save(1, backend.model_tensors(), backend.optimizer_tensors(), {})
        threading.Timer(0.1, gate.open.set).start()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    gate.error = OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, 2, background=True, writes=True) as writer:
        writer.save(2, backend.model_tensors(), backend.optimizer_tensors(), {})
        raise ZeroDivisionError
    assert "the checkpoint of step 2 could not be written" in caplog.text, "the first error is raised, the other told"
    with (
        pytest.raises(BadInputError, match="step 3 could not be written"),
        CheckpointWriter(tmp_path, 2, background=True, writes=True) as writer,
    ):
        writer.save(3, backend.model_tensors(), backend.optimizer_tensors(), {})


def test_who_does_not_write_still_gathers(tmp_path: Path) -> None:
    """Gathering whole tensors of a sharded model is collective: every rank must go through them."""
    backend, seen = make(), []

    def watched() -> Any:
        for name, tensor in backend.model_tensors():
            seen.append(name)
            yield name, tensor

    writer = CheckpointWriter(tmp_path, 2, background=True, writes=False)
    path = writer.save(1, watched(), backend.optimizer_tensors(), {})
    writer.wait()
    assert seen == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert path == tmp_path / "step-00000001"
    assert list(tmp_path.iterdir()) == []


class CrashError(Exception):
    """The process dies here."""


@pytest.mark.parametrize("crash", ["before the checksums", "between checksums and state", "never"])
def test_a_changed_state_leaves_a_whole_checkpoint_at_every_moment(
    tmp_path: Path, crash: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, make(), {"micro_batch_tokens": 512, "name": "ü"})
    with monkeypatch.context() as patch:
        if crash == "before the checksums":

            def at_once(*arguments: object) -> None:
                raise CrashError

            patch.setattr(module, "write_json", at_once)
        elif crash == "between checksums and state":
            write = module.write_json

            def then(*arguments: Any) -> None:
                write(*arguments)
                raise CrashError

            patch.setattr(module, "write_json", then)
        if crash == "never":
            amend_state(path, {"micro_batch_tokens": 256})
        else:
            with pytest.raises(CrashError):
                amend_state(path, {"micro_batch_tokens": 256})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    tokens = 256 if crash == "never" else 512
    files = ["model.safetensors", "optimizer.safetensors"]
    assert found.state == {"version": 2, "step": 1, "micro_batch_tokens": tokens, "name": "ü", "files": files}
    # And again, from whatever was left.
    for smaller in (128, 64):
        amend_state(path, {"micro_batch_tokens": smaller})
        assert open_checkpoint(path).state["micro_batch_tokens"] == smaller
    assert sorted(file.name for file in path.iterdir()) == [
        "checksums.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


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
        (path / "checksums.json").write_text(json.dumps({**sums, "state.json": [hash_file(path / "state.json")]}))
    elif kind == "empty":
        shutil.rmtree(path)
        path.mkdir()


@pytest.mark.parametrize(
    "kind", ["no checksums", "checksums are no JSON", "a missing file", "a cut file", "another version", "empty"]
)
def test_a_damaged_one_is_passed_over_and_told(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    backend = make()
    for step in (1, 2):
        save(tmp_path, step, backend)
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
    backend = make()
    work(backend, 1)
    save(tmp_path, 1, backend)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(RuntimeError, match=r"'0\.bias' has shape \(3,\), the model's has \(5,\)"):
        make(width=5).load(*read_tensors(found))


def test_a_tensor_that_would_only_broadcast_is_refused() -> None:
    """One row into all rows would be no error of torch's."""
    backend = make()
    tensors = {name: tensor.clone() for name, tensor in backend.model_tensors()}
    for name, changed, words in (
        ("1.bias", tensors["1.bias"][:1], "'1.bias' has shape"),
        ("1.bias", None, "'1.bias' is missing"),
        ("2.bias", torch.zeros(2), "the model has no trained parameter '2.bias'"),
    ):
        others = {key: value for key, value in {**tensors, name: changed}.items() if value is not None}
        with pytest.raises(RuntimeError, match=words):
            backend.load(others, {})


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_file_that_is_gone_with_its_checksum_is_missed(tmp_path: Path) -> None:
    """Otherwise a run with a queue, or with negatives that change, would go on with an empty one."""
    writer = CheckpointWriter(tmp_path, 2, background=False, writes=True)
    path = writer.save(1, [], [], {}, [("queue.pushed", torch.tensor([3]))])
    (path / "extra.safetensors").unlink()
    sums = json.loads((path / "checksums.json").read_text())
    del sums["extra.safetensors"]
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(BadInputError, match="missing") as error:
        open_checkpoint(path)
    assert str(error.value.where).endswith("extra.safetensors")


@pytest.mark.parametrize("sums", [[], 3, None, {"state.json": 3}, {"state.json": "abc"}, {"model.safetensors": {}}])
def test_checksums_of_another_shape(tmp_path: Path, sums: Any) -> None:
    path = save(tmp_path, 1, make())
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(BadInputError, match="none of the checkpoints can be used"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("state", [[], 3, None, "text", {}, {"version": 2}, {"version": 2, "step": "1"}])
def test_states_of_another_shape(tmp_path: Path, state: Any) -> None:
    path = save(tmp_path, 1, make())
    (path / "state.json").write_text(json.dumps(state))
    sums = json.loads((path / "checksums.json").read_text())
    sums["state.json"] = [hash_file(path / "state.json")]
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(BadInputError, match="none of the checkpoints can be used"):
        newest_checkpoint(tmp_path)
