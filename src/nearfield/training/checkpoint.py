"""Checkpoints: a step number and tensors, written aside, checked, renamed. No pickle."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearfield.errors import BadInputError
from nearfield.files import atomic_path, hash_file, read_json, write_json

logger = logging.getLogger("nearfield.training")

VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_TENSORS = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    path: Path
    step: int
    """Steps done."""
    state: dict[str, Any]


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters and buffers that the model needs; tensors that share memory are written once each."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter>/<key>`` tensors; ``names`` maps id(parameter) to its name."""
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            tensors[f"{names[id(parameter)]}/{key}"] = tensor.detach().cpu().contiguous().clone()
    return tensors


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put saved state back; a parameter that had none when it was saved has none again."""
    optimizer.state.clear()
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        # AdamW keeps its step counter on the CPU or, fused, on the parameter's device; moments are always beside it.
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def save_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write ``folder/step-XXXXXXXX`` aside, rename it, then remove the oldest beyond ``keep_last``, this one counted."""
    path = folder / f"step-{step:08d}"
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    try:
        with atomic_path(path) as aside:
            aside.mkdir()
            save_file(model_tensors(module), aside / "model.safetensors")
            save_file(optimizer_tensors(optimizer, names), aside / "optimizer.safetensors")
            write_json(aside / "state.json", {"version": VERSION, "step": step, **state})
            sums = {file.name: hash_file(file) for file in sorted(aside.iterdir())}
            write_json(aside / "checksums.json", sums)
    except OSError as error:
        raise BadInputError(
            f"the checkpoint of step {step} could not be written: {error}",
            where=str(path),
            hint="Earlier checkpoints are untouched. Make room, then run the same command again.",
        ) from error
    # A newer one than this is damaged, or the run would have begun there: it must not count among the last.
    for old in [found for found in checkpoint_paths(folder) if found.name <= path.name][:-keep_last]:
        shutil.rmtree(old)
    return path


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; half-written ones have other names and are not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def _verify(path: Path) -> Checkpoint:
    sums = read_json(path / "checksums.json", "list of checksums")
    for name in (*_TENSORS, "state.json"):
        file = path / name
        if not file.is_file():
            raise BadInputError("this file of the checkpoint is missing", where=str(file))
        if not isinstance(sums, dict) or sums.get(name) != hash_file(file):
            raise BadInputError("this file of the checkpoint does not have its checksum", where=str(file))
    state = read_json(path / "state.json", "checkpoint state")
    if state.get("version") != VERSION:
        raise BadInputError(f"this checkpoint has version {state.get('version')}; {VERSION} is wanted", where=str(path))
    return Checkpoint(path, int(state["step"]), state)


def newest_checkpoint(folder: Path, accept: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; each one that is passed over is told with its reason.

    ``accept`` may refuse a checkpoint by raising :class:`BadInputError`. Where checkpoints exist and none can be used,
    that is an error: training anew would lose work without a word.
    """
    reasons = []
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        try:
            checkpoint = _verify(path)
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


def load_checkpoint(checkpoint: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into the model and the optimiser."""
    try:
        tensors = load_file(checkpoint.path / "model.safetensors")
        module.load_state_dict(tensors)
        saved = load_file(checkpoint.path / "optimizer.safetensors")
        load_optimizer(optimizer, dict(module.named_parameters()), saved)
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInputError(f"this checkpoint does not fit the model: {reason}", where=str(checkpoint.path)) from error
