"""Recipes with stages: pretrain, fine-tune, distil; each from the model of the one before."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from nearfield.errors import BadInputError, StoppedError
from nearfield.files import read_metrics
from nearfield.objectives import LossSum
from nearfield.pipeline import open_run, run_stages, status
from nearfield.pipeline.dry_run import dry_run
from nearfield.recipe import load_recipe, stage_recipes
from nearfield.shipped import copy_shipped
from tests.training.launching import BIN, PYTHONPATH, TORCHRUN, launch

STAGES = """\
stages:
  - name: pretrain
    training: {max_steps: 3}
  - name: finetune
    objective: {kind: infonce, temperature: 0.05}
    batches: {kind: single_source, batch_size: 8, negatives: 1}
    training: {max_steps: 2, learning_rate: 5.0e-4}
  - name: distil
    seed: 7
    objective: {kind: distil_embeddings}
    training: {max_steps: 2, averaged_batches: 2}
"""


@pytest.fixture()
def staged(toy_recipe: Path) -> Path:
    """The toy recipe with three stages."""
    toy_recipe.write_text(toy_recipe.read_text() + STAGES)
    return toy_recipe


def test_a_stage_says_only_what_differs(staged: Path) -> None:
    """Groups are merged key by key; another kind replaces; messages name the stage's line."""
    pretrain, finetune, distil = stage_recipes(load_recipe(staged))
    assert pretrain.config.training.max_steps == 3
    assert pretrain.config.training.learning_rate == 1e-3
    assert (finetune.config.objective.kind, finetune.config.objective.temperature) == ("infonce", 0.05)  # type: ignore[union-attr]
    assert (finetune.config.batches.batch_size, finetune.config.batches.kind) == (8, "single_source")
    assert (finetune.config.training.learning_rate, finetune.config.training.epochs) == (5e-4, 2)
    assert finetune.config.training.checkpoints.every_steps == 4
    assert distil.config.objective.kind == "distil_embeddings"
    assert (distil.config.seed, pretrain.config.seed) == (7, 0)
    assert distil.config.batches.batch_size == 16
    lines = staged.read_text().splitlines()
    line = finetune.where(("training", "learning_rate")).rpartition(":")[2]
    assert "learning_rate: 5.0e-4" in lines[int(line) - 1]


def test_what_is_wrong_in_a_stage_is_named(staged: Path, tmp_path: Path) -> None:
    text = staged.read_text()
    staged.write_text(text.replace("name: finetune", "name: pretrain"))
    with pytest.raises(BadInputError, match="two stages have the same name"):
        open_run(staged)
    staged.write_text(text.replace("kind: distil_embeddings", "kind: distil_scores"))
    with pytest.raises(BadInputError, match="the recipe does not mine") as error:
        open_run(staged)
    assert error.value.where is not None
    line = int(error.value.where.rpartition(":")[2])
    assert "distil_scores" in staged.read_text().splitlines()[line - 1]


def test_what_does_not_fit_with_the_recipe_is_named(staged: Path) -> None:
    """Right by itself, wrong together with what stands above."""
    staged.write_text(staged.read_text().replace("{max_steps: 3}", "{schedule: {warmup: 20}}"))
    with pytest.raises(BadInputError, match="stage 'pretrain': a warm-up of 20 steps leaves nothing of max_steps 12"):
        open_run(staged)


def test_each_stage_starts_from_the_model_of_the_one_before(staged: Path, tmp_path: Path) -> None:
    """Three trainings by hand, each a recipe of its own, end with the same weights to the bit."""
    folder = tmp_path / "runs" / "toy"
    result = run_stages(open_run(staged, (), folder))
    assert [name for name in result.ran if name.endswith("train")] == ["pretrain/train", "finetune/train", "train"]
    steps = [len(read_metrics(path / "metrics.jsonl")) for path in (folder / "stages" / "pretrain", folder)]
    assert steps == [3, 2]
    base = None
    by_hand = []
    for number, loaded in enumerate(stage_recipes(load_recipe(staged))):
        recipe = loaded.config
        if base is not None:
            encoder = recipe.encoder.model_copy(update={"model": str(base)})
            recipe = recipe.model_copy(update={"encoder": encoder})
        base = run_stages(open_run(recipe, (), tmp_path / "hand" / str(number)), "train").model
        assert base is not None
        by_hand.append(load_file(base / "model.safetensors"))
    models = [folder / "stages" / "pretrain" / "model", folder / "stages" / "finetune" / "model", folder / "model"]
    for model, expected in zip(models, by_hand, strict=True):
        found = load_file(model / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())
    assert run_stages(open_run(staged, (), folder)).ran == ()
    # The run's folder, and that of a stage, are enough to ask.
    assert {stage.state for stage in status(open_run(folder))} == {"done"}
    inner = open_run(folder / "stages" / "finetune")
    assert (inner.stage, inner.recipe.batches.batch_size) == ("finetune", 8)
    assert {stage.state for stage in status(inner) if stage.name != "report"} == {"done"}
    manifest = json.loads((folder / "stages" / "pretrain" / "manifest.json").read_text())
    assert manifest["recipe"]["stage"] == "pretrain"
    assert "evaluate" not in manifest["stages"]


def test_a_changed_stage_makes_the_later_ones_stale(staged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    run_stages(open_run(staged, (), folder), "train")
    text = staged.read_text()
    staged.write_text(text.replace("learning_rate: 5.0e-4", "learning_rate: 6.0e-4"))
    ran = run_stages(open_run(staged, (), folder), "train").ran
    assert [name for name in ran if name.endswith("train")] == ["finetune/train", "train"]


def test_an_interrupted_stage_is_gone_on_with(staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second stage: the first is not trained again, the second goes on, all ends as without the stop."""
    from nearfield.objectives.infonce import InfoNCE

    straight = run_stages(open_run(staged, (), tmp_path / "straight"), "train").model
    folder = tmp_path / "runs" / "toy"
    forward, calls, before = InfoNCE.forward, [], signal.getsignal(signal.SIGTERM)

    def stopping(self: InfoNCE, batch: object) -> LossSum:
        # Before a training listens for signals its objective is tried out on planned batches.
        if signal.getsignal(signal.SIGTERM) is not before and self.config.temperature == 0.05 and not calls:
            calls.append(self.config.temperature)
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(InfoNCE, "forward", stopping)
        with pytest.raises(StoppedError):
            run_stages(open_run(staged, (), folder), "train")
    ran = run_stages(open_run(staged, (), folder), "train", resume=True).ran
    assert "pretrain/train" not in ran
    assert [name for name in ran if name.endswith("train")] == ["finetune/train", "train"]
    record = json.loads((folder / "stages" / "finetune" / "manifest.json").read_text())["stages"]["train"]
    assert record["resumed_from"] == 1
    assert straight is not None
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder / "model", straight))
    assert all(bool((ours[name] == tensor).all()) for name, tensor in theirs.items())


def test_a_dry_run_covers_all_stages(staged: Path, tmp_path: Path) -> None:
    """Before anything is trained: the model that a stage starts from is stood in for."""
    folder = tmp_path / "runs" / "toy"
    found = dry_run(open_run(staged, (), folder))
    assert found is not None
    assert [one.stage for one in (*found.before, found)] == ["pretrain", "finetune", "distil"]
    steps = [None if one.forecast is None else one.forecast.steps for one in (*found.before, found)]
    assert steps == [3, 2, 2]
    assert found.would_start
    assert not (folder / "stages" / "pretrain" / "model").exists()
    blocked = dry_run(open_run(staged, ["stages.1.batches.batch_size=999"], folder))
    assert blocked is not None
    assert not blocked.would_start
    assert [one.would_start for one in blocked.before] == [True, False]


def test_parts_before_training_train_nothing(staged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    ran = run_stages(open_run(staged, (), folder), "plan").ran
    assert [name for name in ran if name.endswith("plan")] == ["pretrain/plan", "finetune/plan", "plan"]
    assert not list(folder.rglob("model"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_stages_on_two_ranks(staged: Path, tmp_path: Path, backend: str) -> None:
    """In one launch; the last model is that of one process to the rounding of float32."""
    folder = tmp_path / "runs" / "two"
    overrides = ["training.dropout=false", "training.optimizer.kind=sgd"]
    command = [*TORCHRUN, "-m", "nearfield", "train", str(staged), *overrides, "--until", "train"]
    command.append(f"training.backend={backend}")
    done = launch([*command, "--run-folder", str(folder)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_stages(open_run(staged, overrides, tmp_path / "runs" / "one"), "train").model
    assert alone is not None
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder / "model", alone))
    assert max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_sweep_in_one_launch(toy_recipe: Path, tmp_path: Path, backend: str) -> None:
    """Trainings, one that fails while it is prepared, and a dry run, by the same processes; models as of one process."""
    check_sweep(toy_recipe, tmp_path, backend, [*TORCHRUN, "-m"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_a_sweep_by_other_launchers(toy_recipe: Path, tmp_path: Path, launcher: str) -> None:
    """Here rank 0 keeps the store that the ranks meet at, and keeps it for the next training."""
    copy_shipped(tmp_path)
    config = tmp_path / "training" / "accelerate" / "zero2.yaml"
    start = {
        "accelerate": [str(BIN / "accelerate"), "launch", "--config_file", str(config), "-m"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--no_local_rank", "--module"],
    }[launcher]
    check_sweep(toy_recipe, tmp_path, "zero2", start)


def check_sweep(toy_recipe: Path, tmp_path: Path, backend: str, start: Sequence[str]) -> None:
    """Run the sweep on two ranks and compare its models with those of one process."""
    broken = tmp_path / "broken.yaml"
    data = tmp_path / "broken-data.yaml"
    original = yaml.safe_load(toy_recipe.read_text())["data"]
    data.write_text(Path(original).read_text().replace("pairs.jsonl", "nowhere.jsonl"))
    broken.write_text(toy_recipe.read_text().replace(str(original), str(data)))
    overrides = ["training.dropout=false", "training.optimizer.kind=sgd", "training.max_steps=2"]
    runs = tmp_path / "runs"
    arguments = [str(toy_recipe), str(runs), str(broken), *overrides, f"training.backend={backend}"]
    # The launcher deepspeed counts processor sockets where there is no GPU, unless it is told of devices.
    more = {"PYTHONPATH": PYTHONPATH, "DS_ACCELERATOR": "cpu"}
    done = launch([*start, "tests.training.sweep", *arguments], cwd=tmp_path, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()).count("caught:") == 4, done.stdout
    for rate in ("1.0e-3", "5.0e-4"):
        alone = run_stages(
            open_run(toy_recipe, [*overrides, f"training.learning_rate={rate}"], tmp_path / "one" / rate), "train"
        ).model
        assert alone is not None
        ours, theirs = (load_file(path / "model.safetensors") for path in (runs / rate / "model", alone))
        assert max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items()) < 1e-6
