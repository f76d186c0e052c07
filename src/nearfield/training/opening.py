"""Opening an engine: what this machine, its launcher and the objective allow, and the model put on its devices."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from nearfield.encoders.borders import leaves_prompt_out
from nearfield.encoders.dropout import use_fast_dropout
from nearfield.encoders.half_tables import add_tables_in_float32
from nearfield.encoders.packing import packing_kind
from nearfield.encoders.sparse import sparse_embedding_gradients
from nearfield.errors import BadInputError
from nearfield.objectives.infonce import InfoNCE, can_ring
from nearfield.objectives.objective import Objective
from nearfield.objectives.queue import MemoryQueue
from nearfield.training.backends.base import Backend
from nearfield.training.backends.common import MakeOptimizer
from nearfield.training.config import TrainingConfig
from nearfield.training.engine import EmbeddingModule, Engine
from nearfield.training.feed import Feed
from nearfield.training.launch import BackendName, Launch, asked_backend, check_launch, wants_several
from nearfield.training.model_options import (
    compile_transformer,
    enable_checkpointing,
    freeze_parameters,
    set_attention_dropout,
    set_training_mode,
)
from nearfield.training.optimizer_configs import check_sharded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.training")


def check_token_task(backend: BackendName) -> None:
    """Refuse losses on tokens where parameters are taken apart: a head shares its matrix with the table of embeddings."""
    if backend not in ("single", "ddp"):
        raise BadInputError(
            f"losses on tokens share a matrix between embeddings and head, which {backend} would take apart",
            where="objective",
            hint="Use training.backend=ddp.",
        )


def check_can_train(config: TrainingConfig, launch: Launch, *, adapter: bool, token_task: bool = False) -> None:
    """Refuse, before any data is built, what this rank could never train: ``adapter`` and ``token_task`` say what it has."""
    name = check_launch(config.backend, launch)
    if token_task:
        check_token_task(name)
    if launch.is_main:
        for tracker in config.trackers:
            tracker.check()
    device = pick_device(config, launch)
    check_sharded(config.optimizer, name)
    if name == "fsdp2" and adapter and pick_precision(config, device) == "bf16-pure":
        raise BadInputError(
            "FSDP2 shards parameters of one type; bf16-pure holds the base in bfloat16 and the adapter in float32",
            where="training.precision",
            hint="Use training.precision=bf16-mixed, or another backend.",
        )
    if name.startswith("zero"):
        from nearfield.training.backends.zero import check_deepspeed

        check_deepspeed(name, launch.world_size)


def pick_device(config: TrainingConfig, launch: Launch) -> torch.device:
    """The device of this rank; ``auto`` follows accelerate's ``use_cpu``."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadInputError("training.device is cuda, but no CUDA device is here", hint="Use training.device=auto.")
    unwanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if config.device == "cpu" or not torch.cuda.is_available() or (config.device == "auto" and unwanted):
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise BadInputError(
            f"local rank {launch.local_rank} has no GPU: {torch.cuda.device_count()} are here",
            hint="Start one process a GPU.",
        )
    return torch.device("cuda", launch.local_rank)


def pick_precision(config: TrainingConfig, device: torch.device) -> str:
    """``fp32``, ``bf16-mixed`` or ``bf16-pure``."""
    if config.precision != "auto":
        return config.precision
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if native else "fp32"


def build_engine(
    config: TrainingConfig,
    encoder: SentenceTransformer,
    objective: Objective,
    make_optimizer: MakeOptimizer,
    feed: Feed,
    device: torch.device,
    launch: Launch,
) -> Engine:
    """Put the model on its devices; the process group of several ranks must exist."""
    name = asked_backend(config.backend, launch.world_size)
    check_sharded(config.optimizer, name)
    if feed.token_task is not None:
        check_token_task(name)
        if feed.pictures is not None:
            raise BadInputError("tokens are told of texts, and the data has pictures", where="objective")
    if config.exchange == "ring":
        check_ring(objective)
    freeze_parameters(encoder.named_parameters(), config.freeze)
    if config.gradient_checkpointing:
        enable_checkpointing(encoder)
    if config.attention_dropout is not None:
        set_attention_dropout(encoder, config.attention_dropout)
    packing = None
    if config.packing == "auto":
        packing = packing_kind(encoder.to(device), device, bf16=pick_precision(config, device) == "bf16-mixed")
    use_fast_dropout(encoder)
    # A head that is tied to the table of embeddings gives all of its rows a gradient.
    if name in ("single", "ddp") and feed.token_task is None:
        sparse_embedding_gradients(encoder)
    if device.type == "cpu" and pick_precision(config, device) != "fp32":
        add_tables_in_float32(encoder)
    set_training_mode(encoder, dropout=config.dropout)
    if config.compile:
        compile_transformer(encoder)
    module = EmbeddingModule(encoder, objective, feed.token_task)
    dimension = encoder.get_embedding_dimension()
    if dimension is None:
        raise BadInputError("this model does not say how wide its embeddings are", where="encoder.model")
    backend = open_backend(name, config, module, make_optimizer, device, launch)
    backend.verify()
    if launch.is_main:
        precision = pick_precision(config, device)
        logger.info("Backend %s in effect on %d process(es), %s, %s", name, launch.world_size, device.type, precision)
    by_prompt = leaves_prompt_out(encoder) or feed.token_task is not None
    return Engine(
        backend,
        encoder,
        objective,
        launch,
        feed,
        packing,
        by_prompt,
        dimension,
        queue=open_queue(config, objective),
        ring=launch.world_size > 1 and config.exchange == "ring",
    )


def check_ring(objective: nn.Module) -> None:
    """Refuse an objective that cannot be computed while parts of a batch are passed round."""
    known = isinstance(objective, InfoNCE)
    if isinstance(objective, InfoNCE) and can_ring(objective.config) and not objective.config.queue:
        return
    raise BadInputError(
        "a spread-out regulariser and a queue look at all embeddings of a batch, which a ring never brings together"
        if known
        else "this objective looks at all embeddings of a batch, which a ring never brings together",
        where="training.exchange",
        hint="Use training.exchange=gather.",
    )


def open_queue(config: TrainingConfig, objective: nn.Module) -> MemoryQueue | None:
    """The memory that the objective asks for, empty; none where it asks for none."""
    sizes = [part.config.queue for part in objective.modules() if isinstance(part, InfoNCE)]
    if not any(sizes):
        return None
    if config.averaged_batches > 1:
        raise BadInputError(
            "a queue takes in whole batches, which training.averaged_batches cuts",
            where="training.averaged_batches",
            hint="Leave it at 1: a large batch fits by gradient caching.",
        )
    return MemoryQueue(max(sizes))


def open_backend(
    name: BackendName,
    config: TrainingConfig,
    module: EmbeddingModule,
    make_optimizer: MakeOptimizer,
    device: torch.device,
    launch: Launch,
) -> Backend:
    """The backend of a name."""
    precision = pick_precision(config, device)
    mixed = precision == "bf16-mixed"
    world = launch.world_size
    if name in ("single", "ddp"):
        from nearfield.training.backends.replicated import ReplicatedBackend

        return ReplicatedBackend(module, make_optimizer, device, world, mixed)
    if world == 1 and not torch.distributed.is_initialized():
        raise wants_several(name)
    if name == "fsdp2":
        from nearfield.training.backends.fsdp2 import Fsdp2Backend

        return Fsdp2Backend(module, list(module.objective.parameters()), make_optimizer, device, world, mixed)
    from nearfield.training.backends.zero import ZeroBackend

    bf16 = precision.startswith("bf16")
    return ZeroBackend(name, module, make_optimizer, device, world, bf16, config.max_gradient_norm)
