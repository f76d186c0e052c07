"""Settings of a training: optimisers, trackers, schedule, checkpoints, evaluation during training.

Each kind of optimiser and tracker builds a library's own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nearfield.config import Config, ConfigPath, Kinds, KindSettings, NotNegative, Positive
from nearfield.errors import BadInputError
from nearfield.mining.config import NegativesSettings
from nearfield.provenance import require_bitsandbytes

if TYPE_CHECKING:
    import torch

    from nearfield.training.changing_negatives import ChangingNegatives, NegativeInputs
    from nearfield.training.optimizers import ParameterGroup
    from nearfield.training.tracking import Tracker
    from nearfield.training.trainer import Trainer

Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


class OptimizerSettings(KindSettings):
    """The base of settings of optimisers. The learning rate is not here: the schedule sets it."""

    elementwise: ClassVar[bool] = True
    """Whether each weight's step depends on that weight alone, so that a slice of a tensor is stepped as in the whole."""
    by_matrix: ClassVar[bool] = False
    """Whether the matrices of the layers are stepped unlike the rest."""

    moment_bytes: ClassVar[int] = 8
    """Bytes of state an entry of a parameter, where no trial step can tell."""
    weight_decay: NotNegative = 0.01
    """Share of a weight taken off in each step, times the learning rate: more for long runs on few data. Biases, norms and
    what an objective learns beside the model are not decayed."""

    def without_values(self) -> OptimizerSettings:
        """The same optimiser so that it can step tensors without values, whose state has the same size."""
        return self

    def check_sharded(self, backend: str) -> None:
        """Refuse a backend that hands the optimiser slices of tensors, where it would take other steps than on wholes.

        Muon and Adafactor look at whole matrices and adamw_8bit at blocks of 256 weights: ZeRO gives them flat slices, FSDP2
        sharded tensors that they do not know. ``single`` and ``ddp`` suit all kinds.
        """
        if backend in ("single", "ddp") or self.elementwise:
            return
        raise BadInputError(
            f"the optimiser {self.kind} needs whole tensors, and {backend} gives it slices of them",
            where="training.optimizer",
            hint="Use training.optimizer.kind=adamw, or the backend ddp.",
        )

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        """The optimiser of ``groups``, one parameter group for each, in their order."""
        raise NotImplementedError


class AdamWConfig(OptimizerSettings):
    """torch's AdamW, fused where the device has it."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """How much of the running means of the gradient and of its square a step keeps; a lower second one forgets spikes sooner."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment: larger values damp steps of weights with tiny gradients."""

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        import torch

        fused = device.type in ("cpu", "cuda")
        options = [group.options(self.weight_decay) for group in groups]
        return torch.optim.AdamW(options, lr=rate, betas=self.betas, eps=self.epsilon, fused=fused)


class AdafactorConfig(OptimizerSettings):
    """transformers' Adafactor (arXiv 1804.04235): second moments of matrices as a row and a column, no first moment.

    Its own schedule is off: ``learning_rate`` and ``schedule`` mean what they mean for AdamW.
    """

    kind: Literal["adafactor"] = "adafactor"
    elementwise: ClassVar[bool] = False
    scale_parameter: bool = False
    """Multiply the learning rate by each tensor's root mean square, as the paper does; it then wants to be near 1e-2."""
    clip_threshold: Positive = 1.0
    """The most that the root mean square of a tensor's update may be, before the learning rate."""
    decay_rate: Annotated[float, Field(lt=0)] = -0.8
    """The second moment of step t forgets with 1 - t ** decay_rate."""
    beta1: Fraction | None = None
    """A first moment; null keeps none, which saves its memory."""
    epsilon: tuple[Positive, Positive] = (1e-30, 1e-3)
    """Added to squared gradients; the least scale under ``scale_parameter``."""

    def without_values(self) -> AdafactorConfig:
        return self.model_copy(update={"scale_parameter": False})

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor

        optimizer: torch.optim.Optimizer = Adafactor(
            [group.options(self.weight_decay) for group in groups],
            lr=rate,
            eps=self.epsilon,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            scale_parameter=self.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )
        return optimizer


class MuonConfig(OptimizerSettings):
    """torch's Muon for the matrices of the layers, AdamW for embeddings, biases, norms, heads and the rest."""

    kind: Literal["muon"] = "muon"
    elementwise: ClassVar[bool] = False
    by_matrix: ClassVar[bool] = True
    momentum: Fraction = 0.95
    """How much of the running sum of gradients a step keeps."""
    nesterov: bool = True
    """Look one step ahead along the momentum."""
    newton_schulz_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Iterations that make an update orthogonal: more are more exact and take more time."""
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """``match_rms_adamw`` makes a matrix's update as large as AdamW's, so that one learning rate suits both (arXiv
    2502.16982); ``original`` scales by the shape alone and wants a larger one, which AdamW then gets too."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of the AdamW that steps the rest: how much of its running means a step keeps."""
    epsilon: Positive = 1e-8
    """Of the AdamW that steps the rest: added to the root of the second moment."""

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        from nearfield.training.optimizers import MuonWithAdamW

        if not any(group.hidden for group in groups):
            raise BadInputError(
                "muon steps the matrices of the layers, and none of them is trained",
                where="training.optimizer",
                hint="Use kind: adamw, or freeze less.",
            )
        muon = {
            "lr": rate,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "ns_steps": self.newton_schulz_steps,
            "adjust_lr_fn": self.adjust,
        }
        adamw = {"lr": rate, "betas": self.betas, "eps": self.epsilon, "fused": device.type in ("cpu", "cuda")}
        return MuonWithAdamW(
            [group.options(self.weight_decay) for group in groups if group.hidden],
            [group.options(self.weight_decay) for group in groups if not group.hidden],
            muon,
            adamw,
        )


class SGDConfig(OptimizerSettings):
    """torch's SGD, plain unless asked: the step is the gradient times the learning rate."""

    kind: Literal["sgd"] = "sgd"
    weight_decay: NotNegative = 0.0
    """Added to the gradient, as SGD does; the other kinds decay weights apart from it."""
    momentum: Fraction = 0.0
    """How much of the running sum of gradients a step keeps; 0 has no state."""
    nesterov: bool = False
    """Look one step ahead along the momentum, which must be above 0."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        import torch

        options = [group.options(self.weight_decay) for group in groups]
        return torch.optim.SGD(options, lr=rate, momentum=self.momentum, nesterov=self.nesterov)


class AdamW8bitConfig(OptimizerSettings):
    """bitsandbytes' AdamW (arXiv 2110.02861): moments in 8 bits, blockwise, on CUDA."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    elementwise: ClassVar[bool] = False
    moment_bytes: ClassVar[int] = 2
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """How much of the running means of the gradient and of its square a step keeps; a lower second one forgets spikes sooner."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment: larger values damp steps of weights with tiny gradients."""

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        require_bitsandbytes("the optimiser adamw_8bit", device.type, "training.optimizer", "Use kind: adamw.")
        from bitsandbytes.optim import AdamW8bit

        options: list[dict[str, Any]] = [group.options(self.weight_decay) for group in groups]
        optimizer: torch.optim.Optimizer = AdamW8bit(options, lr=rate, betas=self.betas, eps=self.epsilon)
        return optimizer


OPTIMIZERS = Kinds(
    "optimizers",
    "nearfield.training.config:OptimizerSettings",
    {
        "adamw": ("nearfield.training.config:AdamWConfig", "torch's AdamW, fused where the device has it"),
        "adafactor": ("nearfield.training.config:AdafactorConfig", "Adafactor: second moments as a row and a column"),
        "muon": ("nearfield.training.config:MuonConfig", "Muon for the matrices of the layers, AdamW for the rest"),
        "sgd": ("nearfield.training.config:SGDConfig", "plain SGD: the gradient times the learning rate"),
        "adamw_8bit": (
            "nearfield.training.config:AdamW8bitConfig",
            "bitsandbytes' AdamW with moments in 8 bits, on CUDA",
        ),
    },
)


class TrackerSettings(KindSettings):
    """The base of settings of trackers, which show a run's figures."""

    def check(self) -> None:
        """Refuse, before any work, what cannot be used."""

    def preload(self) -> None:
        """Import what the tracker will, so that it counts as the process before it trains."""

    def build(self, run: Path, first_step: int, about: Mapping[str, Any]) -> Tracker:
        """The tracker of the run in a folder, of which ``first_step`` steps are done; ``about`` is its name and settings."""
        raise NotImplementedError


class TensorBoardConfig(TrackerSettings):
    """TensorBoard, in the run's folder ``tensorboard``."""

    kind: Literal["tensorboard"] = "tensorboard"

    def check(self) -> None:
        """Refuse, before any work, what is not installed."""
        if find_spec("tensorboard") is None:
            raise BadInputError(
                "TensorBoard is not installed", where="training.trackers", hint="pip install tensorboard"
            )

    def preload(self) -> None:
        for module in ("torch.utils.tensorboard", "accelerate.tracking"):
            importlib.import_module(module)

    def build(self, run: Path, first_step: int, about: Mapping[str, Any]) -> Tracker:
        from nearfield.training.tracking import AccelerateTracker

        # Steps that a resumed run does again are purged.
        purged = {"purge_step": first_step + 1} if first_step else {}
        return AccelerateTracker("tensorboard", "tensorboard", run, purged)


class WandbConfig(TrackerSettings):
    """Weights & Biases. A resumed run goes on with the same W&B run, whose id the run's folder keeps."""

    kind: Literal["wandb"] = "wandb"
    project: Name
    """The project that the run stands in."""
    entity: Name | None = None
    """A user or team; null takes the account's own."""
    name: Name | None = None
    """Null takes the recipe's name."""
    group: Name | None = None
    """A name that runs share which belong together, such as the seeds of one recipe."""
    tags: tuple[Name, ...] = ()
    """Words to find the run by."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """``offline`` writes to the run's folder, for ``wandb sync`` later."""

    def check(self) -> None:
        """Refuse, before any work, what is not installed, and figures that are sent without a login that the server takes."""
        if sys.modules.get("wandb", False) is None or ("wandb" not in sys.modules and find_spec("wandb") is None):
            raise BadInputError(
                "Weights & Biases is not installed", where="training.trackers", hint="pip install 'nearfield[wandb]'"
            )
        if self.mode != "online":
            return
        from nearfield.training.tracking import check_wandb_login, has_wandb_login

        if not has_wandb_login():
            raise BadInputError(
                "Weights & Biases has no login on this machine",
                where="training.trackers",
                hint="Run `wandb login`, set WANDB_API_KEY, or set mode: offline.",
            )
        check_wandb_login()

    def build(self, run: Path, first_step: int, about: Mapping[str, Any]) -> Tracker:
        from nearfield.training.tracking import WandbTracker

        return WandbTracker(self, run, first_step, about)


class AccelerateConfig(TrackerSettings):
    """Any other tracker that accelerate knows, with what its own package asks for. A resumed run tells some steps again."""

    kind: Literal["accelerate"] = "accelerate"
    name: Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"]
    """The tracker, as accelerate names it; its package must be installed."""
    project: Name | None = None
    """The project or experiment that the run stands in; null takes the recipe's name."""
    settings: dict[str, Any] = {}
    """More arguments of accelerate's tracker, such as ``{run_id: ...}`` of MLflow to go on with a run."""

    def check(self) -> None:
        """Refuse, before any work, what is not installed."""
        from accelerate.tracking import get_available_trackers

        if self.name not in [one.value for one in get_available_trackers()]:
            raise BadInputError(
                f"the tracker {self.name} is not installed", where="training.trackers", hint=f"pip install {self.name}"
            )

    def build(self, run: Path, first_step: int, about: Mapping[str, Any]) -> Tracker:
        from nearfield.training.tracking import AccelerateTracker

        project = self.project or str(about.get("name", run.name))
        return AccelerateTracker(self.name, project, run, self.settings, about)


TRACKERS = Kinds(
    "trackers",
    "nearfield.training.config:TrackerSettings",
    {
        "tensorboard": ("nearfield.training.config:TensorBoardConfig", "TensorBoard, in the run's folder"),
        "wandb": ("nearfield.training.config:WandbConfig", "Weights & Biases"),
        "accelerate": (
            "nearfield.training.config:AccelerateConfig",
            "any other that accelerate knows, such as MLflow",
        ),
    },
)


class ScheduleConfig(Config):
    """The learning rate over the run: a linear warm-up, then a shape that ends at ``final`` times the peak."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """The shape after the warm-up; ``constant`` suits a run that may be prolonged."""
    warmup: Annotated[float, Field(ge=0)] = 0.1
    """Below 1 a share of all steps, else a number of steps."""
    final: Fraction = 0.0
    """The share of the peak that cosine and linear end at."""


class CheckpointConfig(Config):
    """When checkpoints are written, and how many stay."""

    every_steps: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints: at most so many are lost where a run is killed."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """The newest checkpoints that stay on the disk; more cost its space and guard against a damaged one."""
    background: bool = True
    """Write files while training goes on; only the copy to main memory waits."""


class TrainingEvaluationConfig(Config):
    """Scoring the model while it is trained, on a suite small enough to be run often."""

    suite: ConfigPath
    """A suite file, or a folder of local tasks."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Score after so many steps."""
    every_epochs: Annotated[int, Field(ge=1)] | None = None
    """Score after so many epochs. Give this or ``every_steps``; the end of the training is always scored."""
    at_start: bool = True
    """Score the untrained model too: where the curve begins, and a suite that cannot be run is found out at once."""
    metric: Annotated[str, Field(min_length=1)] = "mean"
    """The score that decides which model is better: ``mean`` of the tasks' main scores, a task's name for its main score, or
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
    """Passes over the data, each planned anew."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many steps; null runs all epochs."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Longest input in tokens that is read in training, special tokens and prompt included: longer texts are cut. The model's
    own length (``encoder.max_length``) stays what it is; null reads as much as the model does."""
    learning_rate: Positive = 2e-5
    """The learning rate at its peak: lower for larger models and for continued training, higher for adapters."""
    optimizer: Annotated[OptimizerSettings, OPTIMIZERS] = AdamWConfig()
    """The optimiser and its settings."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of a layer is this times that of the layer above it; embeddings lie below the first. 1 gives all
    the same."""
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Parameters that are not trained: patterns with ``*`` for the names of the model's parameters, such as
    ``*.embeddings.*`` or ``*.layer.0.*``."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate moves over the run."""
    max_gradient_norm: Positive | None = 1.0
    """Clip the global norm of the gradient; null does not."""
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-pure"] = "auto"
    """``bf16-mixed`` computes in bfloat16 with float32 weights; ``bf16-pure`` holds the weights in bfloat16 too (adapters
    stay in float32), and on one process, DDP and FSDP2 adds their gradients over chunks and ranks in it: many small chunks
    lose what is small, which ``bf16-mixed`` and ZeRO do not. The loss and the gathered embeddings are in float32 always. ``auto`` takes bf16-mixed on devices
    that compute in it natively (CUDA from Ampere on), fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; ``auto`` takes a GPU where there is one."""
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
    """Whether the model's own dropout is on. Off, losses fall faster and models overfit sooner."""
    attention_dropout: Fraction | None = None
    """The rate of dropout in attention while this trains, for models made without one (LLM2Vec's SimCSE: 0.3); null keeps
    the model's own, which is also what is saved."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, and how many stay."""
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between lines of metrics."""
    watch_every: Annotated[int, Field(ge=1)] = 10
    """Of so many lines of metrics, one says more: masks, weights, where the gradient comes from, the embeddings' shape.
    The first and the last always do."""
    trackers: tuple[Annotated[TrackerSettings, TRACKERS], ...] = (TensorBoardConfig(),)
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


# Mined negatives that change while the model trains (``mining.during``)


class ScheduledNegatives(NegativesSettings):
    """From easy to hard: a window over each example's mined candidates moves along their ranks, with the steps.

    At the first step negatives are taken from rank ``start`` on, at the share ``over`` of all steps and after it from rank
    ``end`` on; between them the rank goes in a straight line. Ranks count from 0, the hardest; lists that are too short give
    their last ones.
    """

    kind: Literal["scheduled"] = "scheduled"
    start: Annotated[int, Field(ge=0)] = 20
    """The rank that negatives are taken from at the first step; a high one begins with easy negatives."""
    end: Annotated[int, Field(ge=0)] = 0
    """The rank that negatives are taken from at the end; 0 ends with the hardest."""
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of all steps over which the rank moves."""

    def least(self, wanted: int) -> int:
        """One more than batches take: with fewer nothing would change."""
        return wanted + 1

    def build(self, inputs: NegativeInputs, trainer: Trainer) -> ChangingNegatives:
        """The window over the candidates."""
        from nearfield.training.changing_negatives import Scheduled

        return Scheduled(inputs, self, trainer.inputs.data.known_positives, trainer.seed, trainer.steps)


class DynamicNegatives(NegativesSettings):
    """Negatives that the model no longer finds hard give way to the next of the mined candidates.

    ``conan_v1`` (Conan-embedding, arXiv 2408.15710): an example has a block of n candidates, at first those of ranks 0 to
    n - 1. Every ``check_every`` steps it is replaced if ``ratio`` x its mean score now is below its mean score when it was
    first used, and the size of its mean score now is below ``ceiling``; the i-th block after the first is of the n candidates
    from rank ``skip`` + (i - 1) n on. ``conan_v2`` (Conan-embedding-v2): a single negative that scores below ``below`` gives
    way to the next unused candidate when its example comes next. Scores are cosines of the model in training. An example
    whose candidates are used up keeps the negatives that it has.
    """

    whole_batches: ClassVar[bool] = True
    kind: Literal["dynamic"] = "dynamic"
    rule: Literal["conan_v1", "conan_v2"] = "conan_v1"
    """``conan_v1`` replaces whole blocks of negatives, ``conan_v2`` single ones."""
    check_every: Annotated[int, Field(ge=1)] = 100
    """Steps between two checks of ``conan_v1``."""
    ratio: Annotated[float, Field(ge=1)] = 1.15
    """A block is replaced once its mean score times this is below its first mean score; a lower ratio replaces sooner."""
    ceiling: Annotated[float, Field(gt=0)] = 0.8
    """A block whose mean score is larger than this in size is never replaced: it is still hard."""
    skip: Annotated[int, Field(ge=0)] = 10
    """The rank that the second block begins at."""
    below: Annotated[float, Field(ge=-1, le=1)] = 0.4
    """``conan_v2`` replaces a negative whose cosine with its query is lower than this."""

    def least(self, wanted: int) -> int:
        """The first candidate that a negative may give way to, and those before it."""
        return self.skip + wanted if self.rule == "conan_v1" else wanted + 1

    def build(self, inputs: NegativeInputs, trainer: Trainer) -> ChangingNegatives:
        """The rule's part. Raises :class:`BadInputError` where no rank has the scores of a whole batch."""
        from nearfield.training.changing_negatives import BlockAtATime, OneAtATime

        if trainer.config.averaged_batches > 1:
            raise BadInputError(
                "dynamic negatives need the scores of the whole batch, which training.averaged_batches cuts",
                where="training.averaged_batches",
                hint="Leave it at 1: a large batch fits by gradient caching.",
            )
        if trainer.engine.ring:
            raise BadInputError(
                "dynamic negatives look at the embeddings of whole batches, which a ring never brings together",
                where="training.exchange",
                hint="Use training.exchange=gather.",
            )
        kind = BlockAtATime if self.rule == "conan_v1" else OneAtATime
        return kind(inputs, self, trainer.inputs.data.known_positives, trainer.seed)


class RefreshedNegatives(NegativesSettings):
    """Negatives mined anew from the weights in training (as ANCE does, arXiv 2007.00808; there beside the training).

    Every ``every_steps`` steps, or ``every_epochs`` epochs, training stops while all ranks encode queries and documents, search
    exactly and apply the mining rules. A pool has a generation number; the negatives of a step are all of one generation.
    """

    mines_anew: ClassVar[bool] = True
    kind: Literal["refresh"] = "refresh"
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two minings; null leaves the rhythm to ``every_epochs``."""
    every_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs between two minings; null leaves the rhythm to ``every_steps``."""

    def least(self, wanted: int) -> int:
        """As many as batches take."""
        return wanted

    def build(self, inputs: NegativeInputs, trainer: Trainer) -> ChangingNegatives:
        """Negatives drawn from the pool of the newest generation."""
        from nearfield.training.changing_negatives import Refreshed

        return Refreshed(inputs, self, trainer)

    @model_validator(mode="after")
    def _one_rhythm(self) -> Self:
        if (self.every_steps is None) == (self.every_epochs is None):
            raise ValueError("give every_steps or every_epochs, one of the two")
        return self
