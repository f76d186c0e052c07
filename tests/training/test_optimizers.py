"""Optimisers: against plain references, their groups, and what they refuse."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError
from nearfield.provenance import require_bitsandbytes
from nearfield.training import TrainingConfig
from nearfield.training.optimizers import MuonWithAdamW, layer_factors, make_optimizer

CPU = torch.device("cpu")
KINDS = ["adamw", "adafactor", "muon", "sgd"]


class Tiny(nn.Module):
    """Parameters with the names and shapes that optimisers tell apart."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.layer = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(4)
        self.temperature = nn.Parameter(torch.zeros(1, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(ids)
        for layer in self.layer:
            hidden = torch.tanh(layer(hidden))
        out: torch.Tensor = (self.norm(hidden) * self.temperature.exp()).pow(2).mean()
        return out


def tiny(layers: int = 2) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tiny(layers)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model


def config(kind: str, **settings: Any) -> TrainingConfig:
    extra = {name: settings.pop(name) for name in ("layer_decay", "learning_rate") if name in settings}
    return TrainingConfig.model_validate({"optimizer": {"kind": kind, **settings}, "learning_rate": 0.01, **extra})


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rate: float = 0.01) -> None:
    for step in steps:
        give_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()


Reference = Callable[[str, torch.Tensor, torch.Tensor, dict[str, Any], int], torch.Tensor]


def adamw(decay: float) -> Reference:
    def step(name: str, weight: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
        m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
        v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
        shrunk = weight * (1 - 0.01 * decay) if weight.ndim >= 2 and name != "temperature" else weight
        return shrunk - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    return step


def adafactor(name: str, weight: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    """Algorithm 4 of the paper with a given step size."""
    forget = 1 - t**-0.8
    square = g * g + 1e-30
    if g.ndim >= 2:
        rows = state["r"] = forget * state.get("r", 0) + (1 - forget) * square.sum(1)
        columns = state["c"] = forget * state.get("c", 0) + (1 - forget) * square.sum(0)
        second = torch.outer(rows, columns) / rows.sum()
    else:
        second = state["v"] = forget * state.get("v", 0) + (1 - forget) * square
    update = g / second.sqrt()
    update = update / max(1.0, float(update.pow(2).mean().sqrt()))
    return weight - 0.01 * update


def sgd(name: str, weight: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    state["b"] = g if t == 1 else 0.5 * state["b"] + g
    return weight - 0.01 * state["b"]


def muon(name: str, weight: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    """Momentum, then the nearest orthogonal matrix; the polynomial of torch's Muon comes near it only."""
    if not (name.startswith("layer.") and weight.ndim == 2):
        return adamw(0.1)(name, weight, g, state, t)
    buffer = state["b"] = 0.95 * state.get("b", 0) + 0.05 * g
    update = 0.05 * g + 0.95 * buffer
    x = update.bfloat16() / update.bfloat16().norm()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    singular = torch.linalg.svdvals(x.float())
    assert float(singular.max()) < 1.3
    return weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(max(weight.shape)) * x.float()


@pytest.mark.parametrize(
    ("kind", "settings", "reference"),
    [
        ("adamw", {"weight_decay": 0.1}, adamw(0.1)),
        ("adafactor", {"weight_decay": 0.0}, adafactor),
        ("sgd", {"momentum": 0.5}, sgd),
        ("muon", {"weight_decay": 0.1}, muon),
    ],
)
def test_steps_are_those_of_the_paper(kind: str, settings: dict[str, Any], reference: Reference) -> None:
    model = tiny()
    optimizer = make_optimizer(model.named_parameters(), config(kind, **settings), CPU, no_decay={"temperature"})
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for step in range(4):
        take_steps(model, optimizer, range(step, step + 1))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            weights[name] = reference(name, weights[name], parameter.grad, states[name], step + 1)
            torch.testing.assert_close(parameter.detach(), weights[name], atol=2e-6, rtol=1e-5)


def test_muon_makes_the_update_orthogonal() -> None:
    model = tiny()
    optimizer = make_optimizer(model.named_parameters(), config("muon", weight_decay=0, momentum=0), CPU)
    before = model.layer[0].weight.detach().clone()
    take_steps(model, optimizer, range(1))
    update = (before - model.layer[0].weight.detach()) / (0.01 * 0.2 * math.sqrt(4))
    singular = torch.linalg.svdvals(update)
    assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.3


@pytest.mark.parametrize("kind", KINDS)
def test_state_put_back_goes_on_alike(kind: str) -> None:
    """As checkpoints do it: every value a tensor, by the parameter's name."""
    settings = {"momentum": 0.9} if kind == "sgd" else {"beta1": 0.9} if kind == "adafactor" else {}
    whole, first, second = tiny(), tiny(), tiny()
    take_steps(whole, make_optimizer(whole.named_parameters(), config(kind, **settings), CPU), range(6))
    optimizer = make_optimizer(first.named_parameters(), config(kind, **settings), CPU)
    take_steps(first, optimizer, range(3))
    names = {parameter: name for name, parameter in first.named_parameters()}
    saved = {names[p]: {k: torch.as_tensor(v).clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    assert set(saved) == set(names.values())
    second.load_state_dict(first.state_dict())
    other = make_optimizer(second.named_parameters(), config(kind, **settings), CPU)
    for name, parameter in second.named_parameters():
        other.state[parameter].update(saved[name])
    take_steps(second, other, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_muon_with_adamw_is_one_optimizer() -> None:
    whole, model = tiny(), tiny()
    take_steps(whole, make_optimizer(whole.named_parameters(), config("muon"), CPU), range(4))
    optimizer = make_optimizer(model.named_parameters(), config("muon"), CPU)
    assert isinstance(optimizer, MuonWithAdamW)
    take_steps(model, optimizer, range(2))
    state = optimizer.state_dict()
    again = make_optimizer(model.named_parameters(), config("muon"), CPU)
    again.load_state_dict(state)
    take_steps(model, again, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    again.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = model.norm.weight.detach().clone()
    for group in again.param_groups:
        group["lr"] = 0.0
    give_gradients(model, 9)
    assert again.step(lambda: 1.5) == 1.5  # type: ignore[arg-type, func-returns-value]
    assert torch.equal(before, model.norm.weight)
    assert {len(s) for s in again.state.values()} == {1, 3}


def test_what_muon_takes() -> None:
    model = tiny()
    optimizer = make_optimizer(model.named_parameters(), config("muon"), CPU, no_decay=lambda name: "temp" in name)
    hidden = [name for name, p in model.named_parameters() for q in optimizer.param_groups[0]["params"] if p is q]
    assert hidden == ["layer.0.weight", "layer.1.weight"]
    model.layer.requires_grad_(False)
    with pytest.raises(BadInputError, match="none of them is trained"):
        make_optimizer(model.named_parameters(), config("muon"), CPU)
    only = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(2, 2, bias=False)])})
    assert len(make_optimizer(only.named_parameters(), config("muon"), CPU).param_groups) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_groups(kind: str) -> None:
    model = tiny()
    model.norm.bias.requires_grad_(False)
    optimizer = make_optimizer(
        model.named_parameters(), config(kind, weight_decay=0.3), CPU, no_decay=frozenset({"temperature"})
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[float, set[str]] = {}
    for group in optimizer.param_groups:
        assert group["lr"] == 0.01
        assert group["factor"] == 1.0
        found.setdefault(group["weight_decay"], set()).update(names[p] for p in group["params"])
    assert found == {
        0.3: {"embeddings.weight", "layer.0.weight", "layer.1.weight"},
        0.0: {"layer.0.bias", "layer.1.bias", "norm.weight", "temperature"},
    }
    assert len(optimizer.param_groups) == (3 if kind == "muon" else 2)


def test_layer_decay_scales_the_rate(tiny_model: Path) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    optimizer = make_optimizer(model.named_parameters(), config("sgd", layer_decay=0.5), CPU)
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors = {names[p]: group["factor"] for group in optimizer.param_groups for p in group["params"]}
    assert set(factors) == set(names.values())
    for name, factor in factors.items():
        assert factor == (0.5 if ".layer.0." in name else 0.25 if ".embeddings." in name else 1.0), name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take_steps(model, optimizer, range(1), rate=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * factors[name] * parameter.grad)


def test_layers_are_read_from_names() -> None:
    names = [
        "encoder.0.model.embeddings.word_embeddings.weight",
        "encoder.0.model.layers.0.attn.Wqkv.weight",
        "encoder.0.model.layers.10.attn.Wqkv.lora_A.default.weight",
        "encoder.0.model.final_norm.weight",
        "encoder.2.linear.weight",
        "temperature",
    ]
    assert list(layer_factors(names, 0.5).values()) == [0.5**11, 0.5**10, 1, 1, 1, 1]
    towers = [
        "0.model.text_model.embeddings.token_embedding.weight",
        "0.model.text_model.encoder.layers.1.mlp.fc1.weight",
        "0.model.vision_model.embeddings.patch_embedding.weight",
        "0.model.vision_model.encoder.layers.3.mlp.fc1.weight",
        "0.model.vision_model.encoder.layers.0.mlp.fc1.weight",
    ]
    assert list(layer_factors(towers, 0.5).values()) == [0.25, 1, 0.0625, 1, 0.125]
    assert set(layer_factors(names, 1.0).values()) == {1.0}
    with pytest.raises(BadInputError, match="has the number of a layer"):
        layer_factors(["embedding.weight"], 0.5)
    with pytest.raises(BadInputError, match="no parameter is trained"):
        make_optimizer([], TrainingConfig(), CPU)


@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero2", "zero3"])
def test_what_does_not_work_on_slices_is_refused(backend: str) -> None:
    for kind in ("muon", "adafactor", "adamw_8bit"):
        config(kind).optimizer.check_sharded("single")
        config(kind).optimizer.check_sharded("ddp")
        with pytest.raises(BadInputError, match=f"{kind} needs whole tensors, and {backend}"):
            config(kind).optimizer.check_sharded(backend)
    for kind in ("adamw", "sgd"):
        config(kind).optimizer.check_sharded(backend)


def test_eight_bits_need_bitsandbytes_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    there = importlib.machinery.ModuleSpec("bitsandbytes", None)
    for found, message in ((None, "pip install bitsandbytes"), (there, "needs a CUDA device; this is cpu")):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, found=found: found if name == "bitsandbytes" else find_spec(name, *rest),
        )
        with pytest.raises(BadInputError, match=message):
            make_optimizer(tiny().named_parameters(), config("adamw_8bit"), CPU)
    require_bitsandbytes("a test", "cuda", "here", "")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available(),
    reason="needs bitsandbytes on CUDA",
)
def test_eight_bits_come_near_adamw() -> None:
    device = torch.device("cuda")
    ours, theirs = (nn.Linear(128, 128, device=device) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for model, kind in ((ours, "adamw_8bit"), (theirs, "adamw")):
        optimizer = make_optimizer(model.named_parameters(), config(kind), device)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
    assert float((ours.weight - theirs.weight).abs().mean()) < 0.1 * 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "adamw", "epsilon": 0},
        {"kind": "adamw", "weight_decay": -0.1},
        {"kind": "adamw", "betas": (1.0, 0.5)},
        {"kind": "adamw", "momentum": 0.9},
        {"kind": "adafactor", "decay_rate": 0.1},
        {"kind": "muon", "newton_schulz_steps": 0},
        {"kind": "muon", "adjust": "some"},
        {"kind": "sgd", "nesterov": True},
        {"kind": "sgd", "momentum": 1.0},
        {"kind": "adam"},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_settings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TrainingConfig.model_validate({"optimizer": settings})
