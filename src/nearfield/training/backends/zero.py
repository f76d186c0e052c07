"""ZeRO 1, 2 and 3 by DeepSpeed.

The engine is driven by hand: a backward a chunk, one step. With ``managed_gradient_accumulation`` off, stage 1 adds up
gradients locally and reduces them once, in the step. Stages 2 and 3 keep only a rank's part of the gradient, so they
reduce in every chunk's backward: bytes grow with the number of chunks, by design.

In bfloat16 the gradients of chunks are added up in float32, and summed over ranks in float32. Stage 1 then has an
optimiser of its own in DeepSpeed (``BF16_Optimizer``, unless its state is offloaded), which names its parts otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import read_json
from nearfield.shipped import shipped_root
from nearfield.training.backends.replicated import (
    KeptGraphs,
    MakeOptimizer,
    check_fit,
    saved_buffers,
    set_rates,
    trainable,
)
from nearfield.training.launch import BackendName, broadcast_tensors

_STAGES: dict[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3}
logger = logging.getLogger("nearfield.training")

_TRIED = "0.19"
"""The DeepSpeed whose private attributes (partitions, links of the optimiser's state, hooks) this file uses."""
_FLOAT32 = ("fp32", "float32", "float")
_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def deepspeed_config(name: BackendName, bf16: bool, world_size: int, max_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's settings: the launcher's file or the shipped one of the stage, with what the recipe decides."""
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    path = Path(named) if named and named != "none" else shipped_root() / "training" / "deepspeed" / f"{name}.json"
    config = read_json(path, "DeepSpeed configuration")
    if not isinstance(config, dict):
        raise BadInputError("this DeepSpeed configuration is not an object", where=str(path))
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") != _STAGES[name]:
        raise BadInputError(
            f"this DeepSpeed configuration has stage {zero.get('stage')}, and {name} was asked for", where=str(path)
        )
    for key in ("optimizer", "scheduler", "fp16"):
        if key in config:
            raise BadInputError(
                f"this DeepSpeed configuration sets {key!r}, which is the recipe's to say",
                where=str(path),
                hint=f"Remove {key!r} from it.",
            )
    for key in _OURS:
        if config.get(key) not in (None, "auto"):
            raise BadInputError(
                f"this DeepSpeed configuration sets {key!r}, which the recipe and the plan decide",
                where=str(path),
                hint=f'Remove {key!r}, or set it to "auto".',
            )
    for part in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            zero.setdefault(f"offload_{part}", {"device": device})
    config["train_micro_batch_size_per_gpu"] = 1
    config["train_batch_size"] = world_size
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = max_norm or 0.0
    config["managed_gradient_accumulation"] = False
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    # A gradient that is not finite must not reach the parameters; in bfloat16 DeepSpeed looks only if told to.
    config["bf16"] = {"enabled": bf16, "check_grad_overflow": True} if bf16 else {"enabled": False}
    types = config["data_types"] = config.get("data_types") or {}
    if not isinstance(types, dict):
        raise BadInputError("data_types of this DeepSpeed configuration is not an object", where=str(path))
    for holder, key in ((types, "grad_accum_dtype"), (config, "communication_data_type")):
        # Left to itself DeepSpeed adds gradients in the type of the parameters, over chunks and over ranks.
        if holder.get(key) in (None, "auto"):
            holder[key] = "fp32"
    return config


def _lossy_sums(config: Mapping[str, Any]) -> list[str]:
    """Settings of a configuration that add gradients in less than float32: the sum of many loses what is small."""
    asked = {**config["data_types"], "communication_data_type": config["communication_data_type"]}
    keys = ("grad_accum_dtype", "communication_data_type")
    return [f"{key}: {asked[key]}" for key in keys if str(asked[key]).lower().removeprefix("torch.") not in _FLOAT32]


def check_deepspeed(name: BackendName, world_size: int) -> None:
    """Refuse settings that DeepSpeed would not run with, and its absence, without importing it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise _not_installed()
    deepspeed_config(name, False, world_size, None)


class ZeroBackend:
    """A DeepSpeed engine around the module."""

    same_chunk_count = True
    """Stage 3 gathers parameters in every forward and backward, stage 2 reduces in every backward, and stage 1 fails on a
    rank that had none."""
    retries_in_place = False

    def __init__(
        self,
        name: BackendName,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        device: torch.device,
        world_size: int,
        bf16: bool,
        max_norm: float | None,
    ) -> None:
        self.name = name
        self.stage = _STAGES[name]
        self.device = device
        self.world_size = world_size
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = _import_deepspeed()
        self._deepspeed = deepspeed
        self._scalars = _scalars_to_vectors(module)
        optimizer = make_optimizer(trainable(module).items())
        weights = {name: parameter.detach() for name, parameter in trainable(module).items()} if bf16 else {}
        config = deepspeed_config(name, bf16, world_size, max_norm)
        lossy = _lossy_sums(config)
        if lossy and dist.get_rank() == 0:
            logger.warning("DeepSpeed's configuration adds gradients in less than float32 (%s)", ", ".join(lossy))
        # Its optimiser for bfloat16 prints what memory is in use, and collects garbage before each line: without what stood
        # here before, all imported libraries among it, that takes no time.
        gc.freeze()
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                self.engine, self._zero, _, _ = deepspeed.initialize(
                    model=module.to(device),
                    optimizer=optimizer,
                    config=config,
                    dist_init_required=False,
                )
        finally:
            gc.unfreeze()
        logger.debug("DeepSpeed says: %s", said.getvalue())
        self._in_half = type(self._zero).__name__ == "BF16_Optimizer"
        if self._in_half:
            # It forgets the last chunk's gradient when a backward reaches the model's output: what was there before, that
            # of a learnt temperature, was lost. Here it is forgotten before the backward.
            self._zero.backward_prologue = lambda: None
        self.module: nn.Module = self.engine
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        self.parameters = trainable(self.engine.module)
        # DeepSpeed makes its float32 weights of those that it has rounded to bfloat16.
        for each, tensor in weights.items():
            self._set(self.parameters[each], tensor.to(device), None)
        # DeepSpeed's hooks take it that a forward is followed by its backward: stages 1 and 3 add wrongly otherwise.
        self.kept_graphs: KeptGraphs = "one" if bf16 else "joined"

    def begin(self) -> None:
        """The engine forgets its gradient after each step, but for stage 3: there a layer that has no part in a step's first
        backward would add to that of the step before, and one that has none at all would keep it."""
        if self.stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: the engine casts parameters, the embedding's output is cast back."""
        return nullcontext()

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Stage 3 gathers them; outside of a forward it would hand out an empty tensor, without a word."""
        if self.stage < 3 or not parameters:
            return nullcontext()
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(list(parameters))
        return gathered

    def backward(self, scalar: Tensor, last: bool, settle: bool = False) -> None:
        """The engine divides the sum by the number of ranks."""
        if self._in_half:
            self._zero.clear_lp_grads(set_to_none=True)
        self.engine.backward(scalar * self.world_size)

    def used(self) -> list[bool]:
        """Nothing to agree on: the engine counts a missing gradient as zero."""
        return []

    def update(self, rates: Sequence[float], max_norm: float | None, used: Sequence[bool]) -> float:
        """The engine sums, clips and steps, unless the gradient is not finite."""
        set_rates(self.optimizer, rates)
        self.engine.step()
        if self._zero.overflow:
            return math.inf
        return float(self.engine.get_global_grad_norm())

    def gradients(self) -> dict[str, Tensor]:
        """The summed gradient of each parameter, whole: in stage 1 this also takes the sum."""
        from deepspeed.utils import safe_get_full_grad

        if self.stage == 1:
            self.engine._running_engine_step = True
            self.engine.allreduce_gradients()
            self.engine._running_engine_step = False
        else:
            self._zero.finalize_gradient_accumulation_boundary()
        whole = {name: safe_get_full_grad(parameter) for name, parameter in self.parameters.items()}
        return {n: self._shaped(n, gradient.detach()).clone() for n, gradient in whole.items() if gradient is not None}

    def _shaped(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's tensor in the shape that it has outside of the engine."""
        return tensor.reshape(()) if name in self._scalars else tensor

    def model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Trainable parameters in float32, and buffers, whole."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.parameters.items():
            yield name, self._shaped(name, safe_get_full_fp32_param(parameter).detach())
        for name, buffer in saved_buffers(self.engine.module).items():
            yield name, buffer.detach()

    def _flat(self) -> list[tuple[Tensor, list[str]]]:
        """Each flat float32 partition of the optimiser, and the names of the parameters in it."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        if self.stage == 3:
            partitions, groups = self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups
        elif self._in_half:
            partitions, groups = self._zero.fp32_groups_flat_partition, self._zero.bf16_groups
        else:
            partitions, groups = self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups
        return [(flat, [names[id(p)] for p in group]) for flat, group in zip(partitions, groups, strict=True)]

    def _link_state(self) -> None:
        """Let parameters find their part of the optimiser's state.

        DeepSpeed links all groups of parameters after the first group's first step, when the others have no state yet.
        """
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The optimiser's state, whole; numbers that the engine keeps once a partition are given to each parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.optimizer.state:
            self._link_state()
        for flat, names in self._flat():
            state = self.optimizer.state.get(flat, {})
            for name in names:
                for key in sorted(state):
                    value = state[key]
                    if isinstance(value, Tensor) and value.shape == flat.shape:
                        tensor = safe_get_full_optimizer_state(self.parameters[name], key).detach()
                        yield f"{name}/{key}", self._shaped(name, tensor)
                    else:
                        yield f"{name}/{key}", value.detach() if isinstance(value, Tensor) else torch.tensor(value)

    def load(self, model: dict[str, Tensor] | None, optimizer: dict[str, Tensor] | None) -> None:
        """Set the float32 partitions, the parameters made of them, and the optimiser's state."""
        buffers = saved_buffers(self.engine.module)
        if model is not None:
            model = {name: t.reshape(1) if name in self._scalars and t.ndim == 0 else t for name, t in model.items()}
        check_fit(model, {**self.parameters, **buffers})
        with torch.no_grad():
            for name, tensor in broadcast_tensors(model, self.device):
                if name in buffers:
                    buffers[name].copy_(tensor)
                    continue
                parameter = self.parameters[name]
                if self.stage == 3:
                    with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.data.copy_(tensor)
                else:
                    parameter.data.copy_(tensor)
                self._set(parameter, tensor, None)
        state: dict[str, dict[str, Tensor]] = {}
        for name, tensor in broadcast_tensors(optimizer, self.device):
            parameter_name, _, key = name.rpartition("/")
            state.setdefault(parameter_name, {})[key] = tensor
        self.optimizer.state.clear()
        partitions = self._flat()
        for flat, names in partitions:
            saved = next((state[name] for name in names if name in state), {})
            for key, tensor in saved.items():
                per_parameter = self._per_parameter(names, state, key)
                self.optimizer.state[flat][key] = torch.zeros_like(flat) if per_parameter else tensor.clone()
        if state:
            self._link_state()
        for flat, names in partitions:
            for name in names:
                for key, tensor in state.get(name, {}).items():
                    current = self.optimizer.state[flat][key]
                    if current.shape == flat.shape:
                        self._set(self.parameters[name], tensor, key)

    def _set(self, parameter: nn.Parameter, tensor: Tensor, key: str | None) -> None:
        """Set the float32 value (no ``key``) or an entry of the optimiser's state from a whole tensor."""
        from deepspeed import utils

        value = tensor.float().flatten()
        if self.stage == 3:
            # DeepSpeed's own setters of whole tensors fail where a parameter does not divide evenly over ranks.
            size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            padded = value.new_zeros(size * self.world_size)
            padded[: len(value)] = value
            part = padded[dist.get_rank() * size :][:size]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def _per_parameter(self, names: Sequence[str], state: dict[str, dict[str, Tensor]], key: str) -> bool:
        """Whether an entry of a partition's saved state has a number for each of a parameter's, rather than one in all."""
        saved = [name for name in names if name in state]
        wide = next((name for name in saved if name not in self._scalars), None)
        if wide is None:
            # A scalar's own entries look like the count of steps.
            return key != "step"
        parameter = self.parameters[wide]
        return state[wide][key].shape == torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def verify(self) -> None:
        """A DeepSpeed engine of the wanted stage is really in effect, on all ranks."""
        if type(self.engine).__name__ != "DeepSpeedEngine" or self.engine.zero_optimization_stage() != self.stage:
            raise NearfieldError(
                f"{self.name} was asked for, but no DeepSpeed engine of stage {self.stage} is in effect"
            )
        if dist.get_world_size() != self.world_size:
            raise NearfieldError(f"{self.world_size} processes were started, and the group has {dist.get_world_size()}")


def _scalars_to_vectors(module: nn.Module) -> frozenset[str]:
    """Give scalar parameters, which DeepSpeed cannot send, one dimension; the names of the trained ones.

    They broadcast as before. Outside of the engine, in checkpoints and gradients, they stay scalars.
    """
    scalars = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim == 0}
    for parameter in scalars.values():
        parameter.data = parameter.data.reshape(1)
    return frozenset(name for name, parameter in scalars.items() if parameter.requires_grad)


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise _not_installed() from error
    if ".".join(deepspeed.__version__.split(".")[:2]) != _TRIED:
        logger.warning(
            "DeepSpeed %s was not tried, %s was: `nearfield doctor --conformance` shows whether its gradients are right",
            deepspeed.__version__,
            _TRIED,
        )
    # It warns of any optimiser but its own.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPUs DeepSpeed would compile its own collectives, for minutes at the first run, and spin in them for ever where a
    # rank died; gloo's fail.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _not_installed() -> BadInputError:
    return BadInputError(
        "DeepSpeed is not installed", where="training.backend", hint="pip install 'nearfield[deepspeed]'"
    )
