"""The loop: it learns, it stops when asked, it names what breaks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError, NonFiniteError
from nearfield.files import read_metrics
from nearfield.objectives import ContrastiveBatch
from nearfield.objectives.diagnostics import similarities
from nearfield.pipeline import open_run, run_stages
from nearfield.training import TrainingConfig
from nearfield.training import step as step_module
from nearfield.training.config import AdamWConfig
from nearfield.training.optimizers import make_optimizer
from tests.cli.command import run as command
from tests.patience import PATIENCE
from tests.training.test_train import poison


def test_optimizer_groups(tiny_model: Path) -> None:
    model = load_encoder(str(tiny_model), device="cpu").model
    config = TrainingConfig(optimizer=AdamWConfig(weight_decay=0.3))
    optimizer = make_optimizer(model.named_parameters(), config, torch.device("cpu"))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_the_loop_is_adamw_on_the_mean_loss(toy_recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    """The weights after three steps are those of a plain loop: one padded batch, autograd, clipping, torch's AdamW."""
    from safetensors.torch import load_file

    from nearfield.batching.plan import Plan
    from nearfield.data import Store
    from nearfield.objectives import InfoNCEConfig

    run = tmp_path / "runs" / "toy"
    settings = [
        "training.max_steps=3",
        "training.dropout=false",
        "training.schedule={kind: linear, warmup: 1}",
        "training.max_gradient_norm=0.5",
    ]
    result = run_stages(open_run(toy_recipe, settings, run), "train")
    trained = load_file(result.folder / "model" / "model.safetensors")
    manifest = json.loads((run / "manifest.json").read_text())
    store = Store.open(manifest["stages"]["data"]["path"])
    plan = Plan(run / "plan" / "epoch-000.parquet")
    model = load_encoder(str(tiny_model), device="cpu").model
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        fused=False,
        foreach=False,
    )
    lines = read_metrics(run / "metrics.jsonl")
    for step, rate in enumerate((0.5e-3, 1e-3, 0.5e-3)):
        batch = plan.batch(step)
        documents = [row for p, n in zip(batch.positives, batch.negatives, strict=True) for row in (*p, *n)]
        features = model.preprocess(store.texts([*batch.query.tolist(), *documents]))
        embeddings = torch.nn.functional.normalize(model(features)["sentence_embedding"])
        queries, documents_e = embeddings[: len(batch.query)], embeddings[len(batch.query) :]
        target = torch.tensor([2 * i for i in range(len(batch.query))])
        loss = torch.nn.functional.cross_entropy(queries @ documents_e.T / 0.1, target)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert lines[step]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert lines[step]["learning_rate"] == pytest.approx(rate)
    # AdamW turns rounding noise into steps where gradients are nearly zero, hence a share and not a maximum.
    ours = torch.cat([trained[name].flatten() for name in sorted(trained)])
    state = dict(model[0].auto_model.named_parameters())
    theirs = torch.cat([state[name].detach().flatten() for name in sorted(trained)])
    assert float(((ours - theirs).abs() > 1e-5).float().mean()) < 0.01
    assert InfoNCEConfig().temperature == 0.05


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_non_finite_stops_with_names(
    toy_recipe: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "toy"
    with monkeypatch.context() as patch:
        poison(patch, f"the {broken}", at=6)
        with pytest.raises(NonFiniteError, match="step 7 is not finite") as error:
            run_stages(open_run(toy_recipe, (), run), "train")
    assert error.value.exit_code == 4
    report = json.loads((run / "non_finite.json").read_text())
    assert report["step"] == 7
    assert report["queries"][0] in str(error.value)
    assert (run / "checkpoints" / "step-00000006").is_dir()
    run_stages(open_run(toy_recipe, (), run), "train")
    assert json.loads((run / "manifest.json").read_text())["stages"]["train"]["resumed_from"] == 6


def test_the_figures_know_the_hardest_negative() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    documents = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 3.0], [-1.0, 0.0]])
    owner, positive = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, False])
    ids = torch.arange(4)
    figures = similarities(ContrastiveBatch(queries, documents, owner, positive, ids, ids[::2, None]))
    assert figures["positive_similarity"] == pytest.approx(1.0)
    assert figures["hardest_negative_similarity"] == pytest.approx((0.6 + 0.8) / 2)


def test_settings_that_cannot_work(toy_recipe: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(BadInputError, match="no CUDA device"):
            run_stages(open_run(toy_recipe, ["training.device=cuda"], tmp_path / "a"), "train")
    with pytest.raises(BadInputError, match="not one batch of 999"):
        run_stages(open_run(toy_recipe, ["batches.batch_size=999"], tmp_path / "b"), "train")
    with pytest.raises(BadInputError, match="leaves nothing"):
        open_run(toy_recipe, ["training.schedule.warmup=12"], tmp_path / "c")


def test_bf16_trains_with_float32_weights(toy_recipe: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run = tmp_path / "runs" / "toy"
    run_stages(open_run(toy_recipe, ["training.precision=bf16-mixed", "training.max_steps=2"], run), "train")
    assert json.loads((run / "manifest.json").read_text())["stages"]["train"]["precision"] == "bf16-mixed"
    assert {str(t.dtype) for t in load_file(run / "model" / "model.safetensors").values()} == {"float32"}


def long_training(recipe: Path, run: Path) -> list[str]:
    """Arguments of a training that lasts until it is stopped, and of which only its last checkpoint is written."""
    long = ["training.max_steps=2000", "training.epochs=60", "batches.batch_size=4"]
    long.append("training.checkpoints.every_steps=100000")
    return ["train", str(recipe), *long, "--until", "train", "--run-folder", str(run)]


def check_stopped(run: Path, name: str, code: int, errors: str) -> None:
    assert code == 3, errors
    assert f"stopped by {name}" in errors
    assert "Traceback" not in errors
    done = len(read_metrics(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step-{done:08d}").is_dir()


def test_a_signal_ends_the_command_with_its_own_code(toy_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "toy"
    started = [sys.executable, "-m", "nearfield", *long_training(toy_recipe, run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(started, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(run / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    check_stopped(run, "SIGTERM", process.returncode, errors)


def test_ctrl_c_ends_the_command_with_the_same_code(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, run_step = tmp_path / "runs" / "toy", step_module.run_step

    def interrupted(*args: Any, **named: Any) -> Any:
        if named["step"] == 2:
            signal.raise_signal(signal.SIGINT)
        return run_step(*args, **named)

    monkeypatch.setattr(step_module, "run_step", interrupted)
    code = command(*long_training(toy_recipe, run))
    check_stopped(run, "SIGINT", code, capsys.readouterr().err)
    assert len(read_metrics(run / "metrics.jsonl")) == 3
