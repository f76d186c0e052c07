"""Named parameters -> an optimiser, whose groups say what is decayed and how much of the learning rate each gets; the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nearfield.encoders.transformer import EMBEDDING, LAYER
from nearfield.errors import BadInputError
from nearfield.training.backends.replicated import MakeOptimizer

if TYPE_CHECKING:
    from nearfield.training.config import ScheduleConfig, TrainingConfig


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of the warm-up: a share of the run, or a number."""
    return math.ceil(config.warmup * total_steps) if config.warmup < 1 else int(config.warmup)


def rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The share of the peak rate that step ``step`` (0, 1, ... total_steps - 1) uses.

    The first step of a warm-up of n uses 1 / (n + 1) and the first step after it the peak, so that no step is wasted
    on a rate of zero.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.final + (1 - config.final) * shape


@dataclass
class ParameterGroup:
    """Parameters that are stepped alike."""

    decayed: bool
    factor: float
    """The factor of the learning rate."""
    hidden: bool = False
    """Matrices of the layers, for optimisers that tell them from the rest."""
    parameters: list[nn.Parameter] = field(default_factory=list)

    def options(self, weight_decay: float) -> dict[str, Any]:
        """The group as torch's optimisers take it, with the key ``factor`` beside."""
        decay = weight_decay if self.decayed else 0.0
        return {"params": self.parameters, "weight_decay": decay, "factor": self.factor}


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: TrainingConfig,
    device: torch.device,
    *,
    no_decay: Collection[str] | Callable[[str], bool] = (),
) -> torch.optim.Optimizer:
    """The recipe's optimiser of the parameters that require a gradient.

    Biases and norms (fewer than two dimensions) and the parameters that ``no_decay`` names are not decayed. Each group
    has a key ``factor``: the loop sets ``group["lr"] = rate * group["factor"]``.
    """
    spared = no_decay if callable(no_decay) else set(no_decay).__contains__
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not named:
        raise BadInputError("no parameter is trained", where="training", hint="Freeze less.")
    factors = layer_factors([name for name, _ in named], config.layer_decay)
    groups: dict[tuple[bool, float, bool], ParameterGroup] = {}
    for name, parameter in named:
        decayed = parameter.ndim >= 2 and not spared(name)
        in_layer = LAYER.search(name) is not None and EMBEDDING.search(name) is None
        hidden = config.optimizer.by_matrix and decayed and parameter.ndim == 2 and in_layer
        key = (decayed, factors[name], hidden)
        groups.setdefault(key, ParameterGroup(decayed, factors[name], hidden)).parameters.append(parameter)
    # Decayed parameters first, fast before slow: the same order whatever the order of the model's modules.
    ordered = sorted(groups.values(), key=lambda group: (not group.decayed, not group.hidden, -group.factor))
    return config.optimizer.build(ordered, config.learning_rate, device)


def optimizer_of(config: TrainingConfig, device: torch.device) -> MakeOptimizer:
    """The recipe's optimiser as backends ask for it; what the objective learns is not decayed."""
    return lambda named: make_optimizer(named, config, device, no_decay=lambda name: name.startswith("objective."))


def layer_factors(names: Sequence[str], decay: float) -> dict[str, float]:
    """Each parameter's share of the learning rate: 1 in the last layer and above, ``decay`` times less a layer below it.

    Layers are read from the names (``...layer.3...``); embeddings lie below the first one. A model of several towers
    (text and image) counts the layers of each. Raises :class:`BadInputError` where no name has a layer.
    """
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    places: dict[str, tuple[str, int]] = {}
    for name in names:
        if match := LAYER.search(name):
            places[name] = (name[: match.start()], int(match.group(1)))
    if not places:
        raise BadInputError(
            "no trained parameter's name has the number of a layer, so the learning rate cannot decay by layer",
            where="training.layer_decay",
            hint=f"Names are like {names[0]!r}. Use layer_decay: 1.0.",
        )
    depths: dict[str, int] = {}
    for tower, layer in places.values():
        depths[tower] = max(depths.get(tower, 0), layer + 1)
    factors = {}
    for name in names:
        if name in places:
            tower, layer = places[name]
            factors[name] = decay ** (depths[tower] - 1 - layer)
        elif EMBEDDING.search(name):
            tower = max(depths, key=lambda tower: _common_prefix(tower, name))
            factors[name] = decay ** depths[tower]
        else:
            factors[name] = 1.0
    return factors


def _common_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class MuonWithAdamW(torch.optim.Optimizer):
    """Two of torch's optimisers behind one face: one list of groups, one state a parameter, one step."""

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        rest: list[dict[str, Any]],
        muon: Mapping[str, Any],
        adamw: Mapping[str, Any],
    ) -> None:
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, **muon)]
        if rest:
            self.parts.append(torch.optim.AdamW(rest, **adamw))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give the parts this object's groups and state, so that what is set here is what they use."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            part.state = self.state
            start = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
