"""Checkpoints: a step number and tensors, written aside, checked, renamed, and gone on from. No pickle."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import atomic_path, hash_file, read_json, write_json
from nearfield.training.engine import Engine
from nearfield.training.launch import broadcast_json, broadcast_tensors

logger = logging.getLogger("nearfield.training")

VERSION = 2
_NAME = re.compile(r"step-(\d{8})")
_TENSORS = ("model.safetensors", "optimizer.safetensors")
_EXTRA = "extra.safetensors"
"""Further tensors of a run; no file where there are none."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    path: Path
    step: int
    """Steps done."""
    state: dict[str, Any]


class CheckpointWriter:
    """Copies tensors to main memory at once and writes them to the disk while training goes on.

    One checkpoint is written at a time. A failure is raised by the next call. As a context it ends when nothing is being
    written any more, so that whoever catches an error finds the newest checkpoint in its place.
    """

    def __init__(self, folder: Path, keep_last: int, *, background: bool, writes: bool) -> None:
        """``writes``: whether this process writes files; the others only take part in gathering tensors."""
        self.folder = folder
        self.keep_last = keep_last
        self.background = background
        self.writes = writes
        self.protected: set[int] = set()
        """Steps whose checkpoints are never removed."""
        self.newest: int | None = None
        """The step of the last checkpoint."""
        self._thread: threading.Thread | None = None
        self._error: NearfieldError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except NearfieldError as own:
            if error is None:
                raise
            if own is not error:
                logger.error("%s", own)

    def save(
        self,
        step: int,
        model: Iterable[tuple[str, Tensor]],
        optimizer: Iterable[tuple[str, Tensor]],
        state: dict[str, Any],
        extra: Iterable[tuple[str, Tensor]] = (),
    ) -> Path:
        """Write ``step-XXXXXXXX`` aside, rename it, then remove the oldest beyond ``keep_last``; collective."""
        copies = [_copies(tensors, keep=self.writes) for tensors in (model, optimizer, extra)]
        path = self.path(step)
        self.wait()
        self.newest = step
        if self.writes:
            work = threading.Thread(target=self._write, args=(path, step, state, *copies), name="nearfield-checkpoint")
            work.start()
            self._thread = work
            if not self.background:
                self.wait()
        return path

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def wait(self) -> None:
        """Wait until nothing is being written; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def check(self) -> None:
        """Raise what went wrong so far, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _write(
        self,
        path: Path,
        step: int,
        state: dict[str, Any],
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        extra: dict[str, Tensor],
    ) -> None:
        try:
            write_checkpoint(path, step, model, optimizer, state, extra)
            prune(self.folder, path.name, self.keep_last, self.protected)
        except NearfieldError as error:
            self._error = error
        except Exception as error:
            self._error = NearfieldError(f"a checkpoint could not be written: {error!r}", where=str(path))


def _copies(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copies in main memory, so that training may change the originals; every rank goes through them, some keep none."""
    copies = {}
    for name, tensor in tensors:
        if keep:
            copies[name] = tensor.to("cpu", copy=True).contiguous()
    return copies


def write_checkpoint(
    path: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    extra: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint aside, flush it to the disk and rename it."""
    size = sum(tensor.nbytes for tensors in (model, optimizer, extra or {}) for tensor in tensors.values())
    try:
        with atomic_path(path) as aside:
            aside.mkdir()
            save_file(model, aside / "model.safetensors")
            save_file(optimizer, aside / "optimizer.safetensors")
            if extra:
                save_file(extra, aside / _EXTRA)
            # The state names its files: one that is gone, and whose checksum is gone too, is missed all the same.
            files = [file.name for file in sorted(aside.iterdir())]
            write_json(aside / "state.json", {"version": VERSION, "step": step, **state, "files": files})
            sums = {file.name: [hash_file(file)] for file in sorted(aside.iterdir())}
            write_json(aside / "checksums.json", sums)
    except (OSError, SafetensorError) as error:
        try:
            free = shutil.disk_usage(path.parent).free
        except OSError:
            free = 0
        raise BadInputError(
            f"the checkpoint of step {step} could not be written: {error}",
            where=str(path),
            hint=f"It takes {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. Earlier checkpoints are untouched: "
            "make room, then run the same command again.",
        ) from error


def prune(folder: Path, newest: str, keep_last: int, protected: AbstractSet[int] = frozenset()) -> None:
    """Remove the oldest checkpoints beyond ``keep_last``, ``newest`` counted."""
    # A newer one than this is damaged, or the run would have begun there: it must not count among the last.
    known = [path for path in checkpoint_paths(folder) if path.name <= newest]
    for old in known[:-keep_last]:
        if int(old.name.removeprefix("step-")) not in protected:
            shutil.rmtree(old)


def amend_state(checkpoint: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of a checkpoint's state in place, so that a kill at any moment leaves a whole checkpoint.

    First both the old and the new text are declared valid, then the new one replaces the old.
    """
    state = {**read_json(checkpoint / "state.json", "checkpoint state"), **changes}
    text = json.dumps(state, indent=2, ensure_ascii=False, default=str) + "\n"
    sums: dict[str, list[str]] = read_json(checkpoint / "checksums.json", "list of checksums")
    with atomic_path(checkpoint / "state.json") as aside:
        aside.write_text(text, encoding="utf-8")
        sums["state.json"] = [*sums["state.json"], hash_file(aside)]
        write_json(checkpoint / "checksums.json", sums)


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; half-written ones have other names and are not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, if it is whole."""
    sums = read_json(path / "checksums.json", "list of checksums")
    if not isinstance(sums, dict) or not all(isinstance(known, list) for known in sums.values()):
        raise BadInputError("this list of checksums gives no list for each file", where=str(path / "checksums.json"))
    _check_file(path / "state.json", sums)
    state = read_json(path / "state.json", "checkpoint state")
    if not isinstance(state, dict) or state.get("version") != VERSION:
        version = state.get("version") if isinstance(state, dict) else None
        raise BadInputError(f"this checkpoint has version {version}; {VERSION} is wanted", where=str(path))
    if type(state.get("step")) is not int:
        raise BadInputError("this checkpoint does not say its step", where=str(path / "state.json"))
    named = state.get("files", [])
    for name in dict.fromkeys([*_TENSORS, *(named if isinstance(named, list) else []), *({_EXTRA} & sums.keys())]):
        _check_file(path / name, sums)
    return Checkpoint(path, state["step"], state)


def _check_file(file: Path, sums: Mapping[str, list[str]]) -> None:
    if not file.is_file():
        raise BadInputError("this file of the checkpoint is missing", where=str(file))
    if hash_file(file) not in sums.get(file.name, []):
        raise BadInputError("this file of the checkpoint does not have its checksum", where=str(file))


def newest_checkpoint(folder: Path, accept: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; each one that is passed over is told with its reason.

    ``accept`` may refuse a checkpoint by raising :class:`BadInputError`. Where checkpoints exist and none can be used,
    that is an error: training anew would lose work without a word.
    """
    reasons = []
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        try:
            checkpoint = open_checkpoint(path)
            if accept is not None:
                accept(checkpoint)
            return checkpoint
        except BadInputError as error:
            reasons.append(str(error))
            logger.warning("Checkpoint %s is passed over: %s", path.name, error)
    if paths:
        raise BadInputError(
            "none of the checkpoints can be used:\n" + "\n".join(reasons),
            where=str(folder),
            hint="Start this training anew with --restart; the old checkpoints are kept aside.",
        )
    return None


def read_tensors(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the model and of the optimiser."""
    try:
        return load_file(checkpoint.path / _TENSORS[0]), load_file(checkpoint.path / _TENSORS[1])
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"this checkpoint cannot be read: {error}", where=str(checkpoint.path)) from error


def read_extra(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Further tensors of the run."""
    path = checkpoint.path / _EXTRA
    return load_file(path) if path.is_file() else {}


def load_into(module: nn.Module, checkpoint: Checkpoint) -> float:
    """Put a checkpoint's parameters and buffers into a whole module; those that were not trained stay as they are.

    Returns how far that moves a weight of its ``encoder`` at most, as a share of the largest of them.
    """
    tensors = read_tensors(checkpoint)[0]
    known = module.state_dict(keep_vars=True)
    unknown = [name for name, tensor in tensors.items() if name not in known or known[name].shape != tensor.shape]
    if unknown:
        raise BadInputError(f"this checkpoint does not fit the model: {unknown[0]!r}", where=str(checkpoint.path))
    moved = largest = 0.0
    for name, tensor in tensors.items():
        if name.startswith("encoder.") and tensor.is_floating_point() and tensor.numel():
            now = tensor.double()
            moved = max(moved, float((now - known[name].detach().cpu().double()).abs().max()))
            largest = max(largest, float(now.abs().max()))
    module.load_state_dict(tensors, strict=False)
    return moved / largest if largest else moved


logger = logging.getLogger("nearfield.training")


def resume(
    engine: Engine, checkpoints: Path, identity: dict[str, Any], steps: int
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Put the newest checkpoint into the engine and return its state, and its tensors that are not the engine's.

    Rank 0 reads, the others receive.
    """
    launch, device = engine.launch, engine.backend.device
    checkpoint: Checkpoint | None = None
    if launch.is_main:
        checkpoint = newest_checkpoint(checkpoints, lambda path: _check_identity(path, identity))
    state: dict[str, Any] | None = broadcast_json(None if checkpoint is None else checkpoint.state, device)
    if state is None:
        return None, {}
    tensors = read_tensors(checkpoint) if checkpoint is not None else (None, None)
    try:
        engine.backend.load(*tensors)
    except (RuntimeError, KeyError) as error:
        where = str(checkpoint.path) if checkpoint is not None else str(checkpoints)
        reason = str(error).strip().splitlines()[0]
        raise BadInputError(f"this checkpoint does not fit the model: {reason}", where=where) from error
    if launch.is_main:
        logger.info("Resuming from step %d of %d", state["step"], steps)
        if state.get("world_size") != launch.world_size:
            logger.info(
                "The checkpoint was written by %s ranks, now there are %d: the batches and dropout masks are the same",
                state.get("world_size"),
                launch.world_size,
            )
        if engine.level and not state["cut_apart"] and engine.data.images is not None and not engine.towers:
            logger.warning(
                "On %s texts and images lie in chunks of their own, unlike where the run began: from here on the "
                "dropout masks of batches with both are other ones",
                engine.backend.name,
            )
    return state, dict(broadcast_tensors(None if checkpoint is None else read_extra(checkpoint), device))


def _check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    for key, value in identity.items():
        if checkpoint.state.get(key) != value:
            raise BadInputError(f"it belongs to another run (its {key} differs)", where=str(checkpoint.path))
