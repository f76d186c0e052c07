"""Memory is measured without a trace, and the budget that comes of it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nearfield.conformance.cases import Case
from nearfield.objectives import InfoNCEConfig
from nearfield.training import TrainingConfig, memory
from nearfield.training.chunks import Budget, Cut
from nearfield.training.engine import Engine
from nearfield.training.launch import Launch
from nearfield.training.memory import (
    FAST_MICRO_BATCH_TOKENS,
    AllocationTracker,
    LinearCost,
    available_main_memory,
    choose_budget,
    fit_line,
    heavy_batches,
    measure_chunk,
    measure_profile,
    no_trace,
    optimizer_bytes,
    peak_resident_bytes,
    resident_bytes,
    run_chunk,
    share_costs,
    state_size,
)
from nearfield.training.optimizers import make_optimizer
from nearfield.training.trainer import TrainingInputs


@pytest.fixture()
def engine(tiny_model: Path, inputs: TrainingInputs) -> Engine:
    """A tiny BERT with dropout, in float32, over the tokens of ``inputs``."""
    case = Case.make(InfoNCEConfig(), folder=tiny_model, dtype=torch.float32)
    engine = case.engine(Launch(), "single", dropout=True)
    return replace(engine, data=inputs.data)


def test_the_tracker_counts_storages_once() -> None:
    first, second = nn.Linear(100, 200), nn.Linear(200, 10)
    x = torch.randn(50, 100)
    with AllocationTracker() as tracker:
        hidden = torch.relu(first(x))
        output = second(hidden).view(10, 50)
        # The rectified values stay, the linear ones are gone; a view is not counted, nor what was there before.
        assert tracker.live == 4 * (50 * 200 + 50 * 10)
        assert tracker.peak == tracker.live + 4 * 50 * 200 - 4 * 50 * 10
        output.sum().backward()
        gradients = 4 * sum(p.numel() for layer in (first, second) for p in layer.parameters())
        del output, hidden
        assert tracker.live == gradients


def test_a_line_through_its_points_and_above_noisy_ones() -> None:
    exact = LinearCost(100.0, 7.0, 0.5)
    sizes = [(10, 100), (40, 90), (40, 1600), (25, 200)]
    found = fit_line([(t, s, exact(t, s)) for t, s in sizes])
    assert found.fixed == pytest.approx(100)
    assert found.per_token == pytest.approx(7)
    assert found.per_square == pytest.approx(0.5)
    random = np.random.default_rng(0)
    noisy = [(t, s, exact(t, s) * random.uniform(0.8, 1.2)) for t, s in sizes]
    raised = fit_line(noisy)
    assert all(raised(t, s) >= value * (1 - 1e-9) for t, s, value in noisy)
    assert fit_line([(10, 100, 50.0)]) == LinearCost(0.0, pytest.approx(5.0), 0.0)
    assert fit_line([]) == LinearCost(0.0, 0.0, 0.0)
    assert exact.tokens_within(100 + 12 * (7 + 0.5 * 8), 8) == 12


def test_measuring_leaves_no_trace(engine: Engine, inputs: TrainingInputs) -> None:
    before = {name: tensor.clone() for name, tensor in engine.backend.module.state_dict().items()}
    random = torch.get_rng_state()
    config = TrainingConfig(device="cpu", precision="fp32")
    profile = measure_profile(replace(engine, config=config), inputs.plans)
    assert profile.seconds > profile.forward_seconds > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert not engine.backend.optimizer.state
    assert all(p.grad is None for p in engine.backend.module.parameters())
    after = engine.backend.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_kept_graphs_are_the_sum_of_their_chunks(engine: Engine, inputs: TrainingInputs) -> None:
    """The line's figure for a batch's chunks is what their graphs hold together, as counted on all of them."""
    config = TrainingConfig(device="cpu", precision="fp32", micro_batch_tokens=48)
    profile = measure_profile(replace(engine, config=config), inputs.plans)
    batch = inputs.plans[0].batch(1)
    work, lengths = engine.work(batch, Cut(48))
    assert len(work.chunks) > 2
    features = engine.make_features(work.pool)
    with no_trace(engine), AllocationTracker() as tracker:
        parts = [engine.backend.module(features(chunk)) for chunk in work.chunks]
        held = tracker.live
        del parts
    [(tokens, predicted)] = share_costs(work, lengths, profile.kept, padded=engine.padded)
    assert tokens == sum(work.tokens)
    assert predicted == pytest.approx(held, rel=0.02)


def test_a_longer_chunk_takes_more(engine: Engine, inputs: TrainingInputs) -> None:
    work, _ = engine.work(inputs.plans[0].batch(0), Cut(1000))
    with no_trace(engine):
        run_chunk(engine, work.pool, work.chunks[0][:1])
        one = measure_chunk(engine, work.pool, work.chunks[0][:1])
        all_of_it = measure_chunk(engine, work.pool, work.chunks[0])
    assert all_of_it.peak >= all_of_it.kept > one.kept > 0
    assert all_of_it.tokens > one.tokens


def test_explicit_numbers_are_used_as_they_are(engine: Engine, inputs: TrainingInputs) -> None:
    engine = replace(engine, config=TrainingConfig(micro_batch_tokens=77, graph_tokens=99))
    assert choose_budget(engine, inputs.plans, measure_profile(engine, inputs.plans)) == Budget(77, 99)


def test_a_budget_is_state_with_the_ranks_that_batches_were_cut_for(engine: Engine, inputs: TrainingInputs) -> None:
    config = TrainingConfig(micro_batch_tokens=77, graph_tokens=99)
    here = replace(engine, config=config)
    there = replace(here, launch=Launch(0, 8))
    chosen = choose_budget(there, inputs.plans, measure_profile(here, inputs.plans))
    assert chosen == Budget(77, 99, 8)
    kept = Budget.from_json(chosen.to_json())
    assert kept == chosen and kept.cut == Cut(77, 8)
    halved = kept.halved()
    assert halved is not None and halved.cut == Cut(38, 8), "less memory changes the budget alone"


def test_auto_takes_what_is_fast_or_what_fits(
    engine: Engine, inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(device="cpu", precision="fp32")

    def choose(available: int | None) -> Budget:
        monkeypatch.setattr(memory, "available_memory", lambda device: available)
        here = replace(engine, config=config)
        return choose_budget(here, inputs.plans, measure_profile(here, inputs.plans))

    plenty = choose(10**12)
    assert plenty == choose(None) == choose(10**11)
    assert plenty.micro_batch_tokens == FAST_MICRO_BATCH_TOKENS["cpu"]
    batches = [plan.batch(step) for plan in inputs.plans for step in range(len(plan))]
    heaviest = max(engine.work(batch, Cut(512))[0].heaviest for batch in batches)
    assert heaviest <= plenty.graph_tokens <= 1.25 * heaviest + 1
    state = state_size(replace(engine, config=config))
    fixed = state.gradients + state.optimizer + state.checkpoint
    rooms = [choose(int(fixed / 0.9) + step * 100_000).graph_tokens for step in range(30)]
    assert rooms == sorted(rooms)
    assert any(16 < tokens < heaviest for tokens in rooms)
    starved = choose(fixed)
    assert starved.micro_batch_tokens == 16


def test_heavy_batches(inputs: TrainingInputs) -> None:
    totals = sorted((int(t) for plan in inputs.plans for t in plan.tokens()), reverse=True)

    def tokens(batch) -> int:  # type: ignore[no-untyped-def]
        prompt0, prompt1 = inputs.data.tokens.tables
        documents = np.concatenate([*batch.positives, *batch.negatives])
        return int(prompt0.lengths(batch.query).sum() + prompt1.lengths(documents).sum())

    assert tokens(heavy_batches(inputs.plans)[0]) == totals[0]
    only = heavy_batches(inputs.plans, max_steps=1)
    assert [batch.query.tolist() for batch in only] == [inputs.plans[0].batch(0).query.tolist()]


@pytest.mark.parametrize(
    "optimizer",
    [{"kind": "adamw"}, {"kind": "sgd"}, {"kind": "sgd", "momentum": 0.9}, {"kind": "muon"}, {"kind": "adafactor"}],
)
def test_optimizer_bytes_are_those_of_a_step(tiny_model: Path, optimizer: dict[str, object]) -> None:
    from nearfield.encoders import load_encoder

    config = TrainingConfig.model_validate({"optimizer": optimizer})
    model = load_encoder(str(tiny_model), device="cpu").model
    parameters = dict(model.named_parameters())
    found = optimizer_bytes(parameters, config)
    made = make_optimizer(parameters.items(), config, torch.device("cpu"))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    tensors = [v for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert found == sum(tensor.nbytes for tensor in tensors)


def test_adafactor_that_looks_at_values_counts_too(tiny_model: Path) -> None:
    from nearfield.encoders import load_encoder

    parameters = dict(load_encoder(str(tiny_model), device="cpu").model.named_parameters())
    plain = TrainingConfig.model_validate({"optimizer": {"kind": "adafactor"}})
    scaled = TrainingConfig.model_validate({"optimizer": {"kind": "adafactor", "scale_parameter": True}})
    assert optimizer_bytes(parameters, scaled) == optimizer_bytes(parameters, plain) > 0


def test_available_memory_is_the_least_of_system_and_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   800 kB\n")
    assert available_main_memory(proc, groups) == 800 * 1024
    inner = groups / "outer" / "inner"
    inner.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    for folder, limit, used, cached in ((inner, "max", 5000, 0), (inner.parent, "500000", 300000, 50000)):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert available_main_memory(proc, groups) == 500000 - 300000 + 50000
    (proc / "self" / "cgroup").write_text("4:memory:/job\n")
    (groups / "memory" / "job").mkdir(parents=True)
    (groups / "memory" / "job" / "memory.limit_in_bytes").write_text("700000")
    (groups / "memory" / "job" / "memory.usage_in_bytes").write_text("600000")
    (groups / "memory" / "job" / "memory.stat").write_text("total_inactive_file 1000")
    assert available_main_memory(proc, groups) == 101000
    assert available_main_memory(tmp_path / "none", groups) is None


def test_resident_memory_of_this_process() -> None:
    assert resident_bytes("VmHWM:\t 30 kB\nVmRSS:\t 20 kB\n") == 20 * 1024
    assert peak_resident_bytes("VmHWM:\t 30 kB\n") == 30 * 1024
    assert resident_bytes("Name: x\n") == 0
    assert resident_bytes() > 10_000_000
