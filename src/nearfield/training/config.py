"""Settings of the loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nearfield.config import Config, ConfigPath
from nearfield.training.optimizer_configs import AdamWConfig, OptimizerConfig
from nearfield.training.tracker_configs import TensorBoardConfig, TrackerConfig

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
    background: bool = True
    """Write files while training goes on; only the copy to main memory waits."""


class TrainingEvaluationConfig(Config):
    """Scoring the model while it is trained, on a suite small enough to be run often."""

    suite: ConfigPath
    """A suite file, or a folder of local tasks."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    every_epochs: Annotated[int, Field(ge=1)] | None = None
    """One of the two; the end of the training is always scored."""
    at_start: bool = True
    """Score the untrained model too: where the curve begins, and a suite that cannot be run is found out at once."""
    metric: Annotated[str, Field(min_length=1)] = "mean"
    """What says which model is better: ``mean`` of the tasks' main scores, a task's name for its main score, or
    ``<task>.<metric>`` for another of its metrics. Greater is better."""
    keep_best: bool = False
    """Keep the checkpoint with the best score, and make the model of it instead of the last one."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row without a gain; null trains to the end."""
    minimum_gain: Annotated[float, Field(ge=0)] = 0.0
    """By how much a score must pass the best before it to count as a gain."""
    prompts: Literal["contract", "as-is"] = "contract"
    """``contract`` refuses a task whose prompt is not trained with; ``as-is`` lets it pass."""

    @model_validator(mode="after")
    def _says_when(self) -> TrainingEvaluationConfig:
        if (self.every_steps is None) == (self.every_epochs is None):
            raise ValueError("give either 'every_steps' or 'every_epochs'")
        return self

    @property
    def decides(self) -> bool:
        """Whether the scores decide which model comes out."""
        return self.keep_best or self.patience is not None


class TrainingConfig(Config):
    """Length of the run, optimiser, schedule, precision, memory, checkpoints."""

    epochs: Annotated[int, Field(ge=1)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many steps; null runs all epochs."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Longest input in tokens that is read in training, special tokens and prompt included: longer texts are cut. The model's
    own length (``encoder.max_length``) stays what it is; null reads as much as the model does."""
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
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-pure"] = "auto"
    """``bf16-mixed`` computes in bfloat16 with float32 weights; ``bf16-pure`` holds the weights in bfloat16 too (adapters
    stay in float32). The loss and the gathered embeddings are in float32 always. ``auto`` takes bf16-mixed on devices
    that compute in it natively (CUDA from Ampere on), fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """How several processes share the work; ``auto`` follows the launcher's configuration, else ddp for several."""
    collective_timeout: Annotated[float, Field(gt=0)] = 1800
    """Seconds after which a collective that some rank never joins is an error."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """Tokens encoded at a time, on each rank. ``auto`` takes what is fast on the device and, where memory may not
    suffice, measures it on the longest batch of the plan. A resumed run keeps the number that it went on with, since
    dropout is drawn chunk by chunk."""
    packing: Literal["auto", "never"] = "auto"
    """``auto`` encodes texts end to end without padding where that was verified to give the same embeddings."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks see each other's embeddings. ``gather`` gives all to each; ``ring`` gives each its share and passes the others
    round, for batches of which not even the embeddings fit. The gradient is the same."""
    gradient_cache: Literal["auto", "always", "never"] = "auto"
    """``never`` keeps the graph of the whole batch; ``always`` encodes twice and keeps one chunk's (GradCache, arXiv
    2101.06983); ``auto`` keeps the graph of batches that fit. The gradient is the same."""
    graph_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """The most tokens of a rank's share whose graph ``gradient_cache: auto`` keeps; ``auto`` measures memory."""
    averaged_batches: Annotated[int, Field(ge=1)] = 1
    """Cut each planned batch into so many smaller ones and average their losses, as plain gradient accumulation does:
    each then sees fewer negatives. A batch that does not fit needs none of it, it is computed whole in chunks."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the layer again in the backward pass: less memory, about a third more
    time, the same gradient."""
    compile: bool = False
    """Compile the transformer with torch.compile, for any length. Worth it on a GPU and a long run only."""
    dropout: bool = True
    """Whether the model's own dropout is on."""
    attention_dropout: Share | None = None
    """The rate of dropout in attention while this trains, for models made without one (LLM2Vec's SimCSE: 0.3); null keeps
    the model's own, which is also what is saved."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between lines of metrics."""
    watch_every: Annotated[int, Field(ge=1)] = 10
    """Of so many lines of metrics, one says more: masks, weights, where the gradient comes from, the embeddings' shape.
    The first and the last always do."""
    trackers: tuple[TrackerConfig, ...] = (TensorBoardConfig(),)
    """Where figures and scores go besides ``metrics.jsonl`` and ``evaluations.jsonl``."""
    evaluation: TrainingEvaluationConfig | None = None
    """Score the model during the training."""

    def logs(self, step: int, steps: int) -> tuple[bool, bool]:
        """Whether step number ``step`` of ``steps`` gets a line of metrics, and whether that line says more."""
        last = step == steps
        logged = step % self.log_every == 0 or last
        return logged, logged and (last or step // self.log_every % self.watch_every == 1 % self.watch_every)

    @model_validator(mode="after")
    def _trackers_differ(self) -> TrainingConfig:
        kinds = [tracker.kind for tracker in self.trackers]
        if len(set(kinds)) < len(kinds):
            raise ValueError("a tracker stands twice")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingConfig:
        if self.max_steps is not None and self.schedule.warmup >= 1 and self.schedule.warmup >= self.max_steps:
            raise ValueError(
                f"a warm-up of {self.schedule.warmup:g} steps leaves nothing of max_steps {self.max_steps}"
            )
        return self
