"""Settings of the loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nearfield.config import Config
from nearfield.training.optimizer_configs import AdamWConfig, OptimizerConfig

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(Config):
    """The learning rate over the run: a linear warm-up, then a shape that ends at ``final`` times the peak."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.1
    """Below 1 a share of all steps, else a number of steps."""
    final: Share = 0.0
    """The share of the peak that cosine and linear end at."""


class CheckpointConfig(Config):
    """When checkpoints are written, and how many stay."""

    every_steps: Annotated[int, Field(ge=1)] = 500
    keep_last: Annotated[int, Field(ge=1)] = 2


class TrainingConfig(Config):
    """Length of the run, optimiser, schedule, precision, memory, checkpoints."""

    epochs: Annotated[int, Field(ge=1)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many steps; null runs all epochs."""
    learning_rate: Positive = 2e-5
    optimizer: OptimizerConfig = AdamWConfig()
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of a layer is this times that of the layer above it; embeddings lie below the first. 1 gives all
    the same."""
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Parameters that are not trained: patterns with ``*`` for the names of the model's parameters, such as
    ``*.embeddings.*`` or ``*.layer.0.*``."""
    schedule: ScheduleConfig = ScheduleConfig()
    max_gradient_norm: Positive | None = 1.0
    """Clip the global norm of the gradient; null does not."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``bf16`` is autocast with float32 weights, loss and gathered embeddings; ``auto`` takes it on devices that
    compute in it natively (CUDA from Ampere on), float32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    chunk_tokens: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens encoded at a time; null takes 512 on a CPU, where small chunks cost little and pad little, and 16,384
    on a GPU. A resumed run keeps the number that it began with, since dropout is drawn chunk by chunk."""
    gradient_cache: Literal["auto", "always", "never"] = "auto"
    """``never`` keeps the graph of the whole batch; ``always`` encodes twice and keeps one chunk's (GradCache, arXiv
    2101.06983); ``auto`` keeps the graph of batches up to ``graph_tokens``. The gradient is the same."""
    graph_tokens: Annotated[int, Field(ge=16)] = 65_536
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the layer again in the backward pass: less memory, about a third more
    time, the same gradient."""
    compile: bool = False
    """Compile the transformer with torch.compile, for any length. Worth it on a GPU and a long run only."""
    dropout: bool = True
    """Whether the model's own dropout is on."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between lines of metrics."""
    tensorboard: bool = True

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingConfig:
        if self.max_steps is not None and self.schedule.warmup >= 1 and self.schedule.warmup >= self.max_steps:
            raise ValueError(
                f"a warm-up of {self.schedule.warmup:g} steps leaves nothing of max_steps {self.max_steps}"
            )
        return self
