"""Settings of the optimisers. Each kind builds a library's own optimiser from groups of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from nearfield.config import Config
from nearfield.errors import BadInputError
from nearfield.optional import require_bitsandbytes

if TYPE_CHECKING:
    import torch

    from nearfield.training.optimizers import ParameterGroup

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Config):
    """What all kinds share. The learning rate is not here: the schedule sets it."""

    elementwise: ClassVar[bool] = True
    """Whether each weight's step depends on that weight alone, so that a slice of a tensor is stepped as in the whole."""
    by_matrix: ClassVar[bool] = False
    """Whether the matrices of the layers are stepped unlike the rest."""

    weight_decay: NotNegative = 0.01
    """Not applied to biases and norms, nor to what an objective learns beside the model."""

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        """The optimiser of ``groups``, one parameter group for each, in their order."""
        raise NotImplementedError


class AdamWConfig(_Optimizer):
    """torch's AdamW, fused where the device has it."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-8

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        import torch

        fused = device.type in ("cpu", "cuda")
        options = [group.options(self.weight_decay) for group in groups]
        return torch.optim.AdamW(options, lr=rate, betas=self.betas, eps=self.epsilon, fused=fused)


class AdafactorConfig(_Optimizer):
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
    beta1: Share | None = None
    """A first moment; null keeps none, which saves its memory."""
    epsilon: tuple[Positive, Positive] = (1e-30, 1e-3)
    """Added to squared gradients; the least scale under ``scale_parameter``."""

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


class MuonConfig(_Optimizer):
    """torch's Muon for the matrices of the layers, AdamW for embeddings, biases, norms, heads and the rest."""

    kind: Literal["muon"] = "muon"
    elementwise: ClassVar[bool] = False
    by_matrix: ClassVar[bool] = True
    momentum: Share = 0.95
    nesterov: bool = True
    newton_schulz_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """``match_rms_adamw`` makes a matrix's update as large as AdamW's, so that one learning rate suits both (arXiv
    2502.16982); ``original`` scales by the shape alone and wants a larger one, which AdamW then gets too."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Of AdamW."""
    epsilon: Positive = 1e-8
    """Of AdamW."""

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


class SGDConfig(_Optimizer):
    """torch's SGD, plain unless asked: the step is the gradient times the learning rate."""

    kind: Literal["sgd"] = "sgd"
    weight_decay: NotNegative = 0.0
    """Added to the gradient, as SGD does; the other kinds decay weights apart from it."""
    momentum: Share = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        import torch

        options = [group.options(self.weight_decay) for group in groups]
        return torch.optim.SGD(options, lr=rate, momentum=self.momentum, nesterov=self.nesterov)


class AdamW8bitConfig(_Optimizer):
    """bitsandbytes' AdamW (arXiv 2110.02861): moments in 8 bits, blockwise, on CUDA."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    elementwise: ClassVar[bool] = False
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-8

    def build(self, groups: Sequence[ParameterGroup], rate: float, device: torch.device) -> torch.optim.Optimizer:
        require_bitsandbytes("the optimiser adamw_8bit", device.type, "training.optimizer", "Use kind: adamw.")
        from bitsandbytes.optim import AdamW8bit

        options: list[dict[str, Any]] = [group.options(self.weight_decay) for group in groups]
        optimizer: torch.optim.Optimizer = AdamW8bit(options, lr=rate, betas=self.betas, eps=self.epsilon)
        return optimizer


OptimizerConfig = Annotated[
    AdamWConfig | AdafactorConfig | MuonConfig | SGDConfig | AdamW8bitConfig, Field(discriminator="kind")
]


def check_sharded(config: OptimizerConfig, backend: str) -> None:
    """Refuse an optimiser on a backend that hands it slices of tensors, where it would take other steps than on wholes.

    Muon and Adafactor look at whole matrices and adamw_8bit at blocks of 256 weights: ZeRO gives them flat slices, FSDP2
    sharded tensors that they do not know. ``single`` and ``ddp`` suit all kinds.
    """
    if backend in ("single", "ddp") or config.elementwise:
        return
    raise BadInputError(
        f"the optimiser {config.kind} needs whole tensors, and {backend} gives it slices of them",
        where="training.optimizer",
        hint="Use training.optimizer.kind=adamw, or the backend ddp.",
    )
