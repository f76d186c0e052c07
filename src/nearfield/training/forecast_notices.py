"""Notices of a forecast: what the run asks of this machine and does not find, or leaves unused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nearfield.notices import Notice
from nearfield.training.config import TrainingConfig
from nearfield.training.forecast import Forecast, say_bytes
from nearfield.training.machine import free_disk, local_processes


@dataclass(frozen=True)
class Machine:
    """What a run needs and finds beside memory."""

    checkpoints: int
    """The most checkpoints that are on the disk at a time."""
    disk_needed: int
    """Bytes of these and of the saved model."""
    disk_free: int
    gpus: int
    processes: int
    """Ranks on this machine."""

    @classmethod
    def of(cls, forecast: Forecast, config: TrainingConfig, run: Path) -> Machine:
        """This machine, for a run in the folder ``run``."""
        kept = config.checkpoints.keep_last + 1 + int(config.evaluation is not None)
        count = min(kept, -(-forecast.steps // config.checkpoints.every_steps) + 1)
        needed = forecast.checkpoint_bytes * count + forecast.parameters * 4
        return cls(count, needed, free_disk(run), count_gpus(), local_processes())


def count_gpus() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def forecast_notices(forecast: Forecast, machine: Machine) -> Iterator[Notice]:
    """What a forecast says of this machine: memory, disk, devices, what is sent."""
    growth = forecast.memory.peak - forecast.memory.base - forecast.memory.weights
    if forecast.available and growth > forecast.available:
        yield Notice(
            "memory-short",
            f"the run needs {say_bytes(growth)} more memory on each device than it holds now, and "
            f"{say_bytes(forecast.available)} are available",
            "Lower training.max_length or training.micro_batch_tokens, use gradient_cache: always, gradient "
            "checkpointing, an adapter, or more devices with fsdp2 or zero3.",
            blocks=True,
        )
    if machine.disk_needed > machine.disk_free:
        yield Notice(
            "disk-short",
            f"checkpoints and the model need {say_bytes(machine.disk_needed)} on the disk, and "
            f"{say_bytes(machine.disk_free)} are free",
            "Make room, or lower training.checkpoints.keep_last.",
            blocks=True,
        )
    if forecast.reductions > 1:
        yield Notice(
            "gradient-sent-often",
            f"{forecast.backend} reduces the gradient once a chunk, up to {forecast.reductions} times a step: "
            f"{say_bytes(forecast.reduced_a_step)} a step and rank",
            "zero1, fsdp2 and ddp reduce once a step. Larger training.micro_batch_tokens make fewer chunks.",
        )
    if machine.gpus > machine.processes and forecast.device.startswith("cuda"):
        yield Notice(
            "gpus-idle",
            f"{machine.gpus} GPUs are here, and {machine.processes} are used",
            f"torchrun --nproc-per-node {machine.gpus} -m nearfield train RECIPE",
        )
    if machine.gpus and forecast.device == "cpu":
        yield Notice("gpu-idle", "a GPU is here, and the run trains on the CPU", "Set training.device=auto.")


def notices_of_start(forecast: Forecast, config: TrainingConfig, run: Path) -> list[Notice]:
    """The same for a run that begins whatever its forecast says: a budget that is too large is halved as it goes."""
    return [replace(notice, blocks=False) for notice in forecast_notices(forecast, Machine.of(forecast, config, run))]
