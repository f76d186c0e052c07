"""A run's stages: what runs, what is up to date, what is stale, what resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nearfield.errors import BadInputError
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages, status


def states(recipe: Path, run: Path, *overrides: str) -> dict[str, str]:
    return {stage.name: stage.state for stage in status(open_run(recipe, overrides, run))}


def test_all_stages_run_once(toy_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    assert set(states(toy_recipe, folder).values()) == {"missing"}
    result = run_stages(open_run(toy_recipe, (), folder))
    assert result.ran == ("data", "tokens", "plan", "train", "report")
    assert set(states(toy_recipe, folder).values()) == {"done"}
    assert run_stages(open_run(toy_recipe, (), folder)).ran == ()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert manifest["versions"]["torch"]
    assert manifest["stages"]["train"]["steps"] == 12
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(np.isfinite(line["loss"]) and line["tokens"] <= line["padded_tokens"] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_changed_setting_makes_stale_what_depends_on_it(toy_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    run_stages(open_run(toy_recipe, (), folder))
    changed = states(toy_recipe, folder, "training.learning_rate=0.002")
    assert changed["plan"] == "done"
    assert changed["train"] == "stale"
    assert states(toy_recipe, folder, "batches.batch_size=8")["plan"] == "stale"
    for length in ("encoder.max_length=16", "training.max_length=16"):
        assert states(toy_recipe, folder, length)["tokens"] == "missing"
    # Neither the token budget nor the cadence of checkpoints changes what comes out.
    assert set(
        states(toy_recipe, folder, "training.micro_batch_tokens=128", "training.checkpoints.every_steps=3").values()
    ) == {"done"}
    result = run_stages(open_run(toy_recipe, ["training.learning_rate=0.002"], folder))
    assert result.ran == ("train", "report")
    assert [path.name for path in folder.glob("checkpoints-*")], "the old checkpoints are kept aside"
    # The run's folder alone is enough to ask.
    assert set(states(folder, folder).values()) == {"done"}


def test_the_manifest_names_the_artifact_that_is_used(toy_recipe: Path, tmp_path: Path) -> None:
    """Also where the artifact was in the shared cache already."""
    folder, settings = tmp_path / "runs" / "toy", ["encoder.max_length=8"]
    run_stages(open_run(toy_recipe, settings, tmp_path / "runs" / "other"), "tokens")
    paths = []
    for overrides in ((), settings):
        run_stages(open_run(toy_recipe, overrides, folder), "tokens")
        paths.append(json.loads((folder / "manifest.json").read_text())["stages"]["tokens"]["path"])
    assert paths[0] != paths[1]


def test_until_and_restart(toy_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    assert run_stages(open_run(toy_recipe, (), folder), "plan").ran == ("data", "tokens", "plan")
    assert not (folder / "model").exists()
    assert run_stages(open_run(toy_recipe, (), folder), "train").ran == ("train",)
    before = load_file(folder / "model" / "model.safetensors")
    assert run_stages(open_run(toy_recipe, (), folder), "train", restart=True).ran == ("train",)
    after = load_file(folder / "model" / "model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(BadInputError, match="no stage 'nonsense'"):
        run_stages(open_run(toy_recipe, (), folder), "nonsense")


def test_two_processes_do_not_share_a_run(toy_recipe: Path, tmp_path: Path) -> None:
    run = open_run(toy_recipe, (), tmp_path / "runs" / "toy")
    with run.lock(), pytest.raises(BadInputError, match="another process"):
        run_stages(run, "data")


def test_model_loads_in_plain_sentence_transformers(toy_recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    """The folder alone gives the embeddings that the checkpoint's weights give, and differs from the base model."""
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders import EncoderConfig
    from nearfield.encoders.load import build_encoder

    folder = tmp_path / "runs" / "toy"
    run_stages(open_run(toy_recipe, (), folder), "train")
    texts = ["word1 word2", "word3 word4 word5 word6 word7", "word8"]
    plain = SentenceTransformer(str(folder / "model"), device="cpu").encode(texts)
    encoder = build_encoder(EncoderConfig(model=str(tiny_model)), "cpu").model
    untrained = encoder.encode(texts)
    from safetensors.torch import load_file as load_torch

    weights = load_torch(folder / "checkpoints" / "step-00000012" / "model.safetensors")
    encoder.load_state_dict({name.removeprefix("encoder."): weights[name] for name in weights}, strict=False)
    assert {f"encoder.{name}" for name, p in encoder.named_parameters() if p.requires_grad} <= set(weights)
    np.testing.assert_allclose(plain, encoder.encode(texts), rtol=0, atol=1e-6)
    assert np.abs(plain - untrained).max() > 1e-3
    contract = json.loads((folder / "model" / "prompt_contract.json").read_text())
    assert contract["prompts"] == {"query": [""], "document": [""]}
    card = (folder / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert "# toy\n" in card
    assert "- steps: 12\n" in card
    assert "- pairs: query none, document none\n" in card
    for file in (folder / "model").rglob("*"):
        if file.suffix in (".json", ".md"):
            assert str(tmp_path) not in file.read_text(), f"{file.name} holds a path of this machine"


SHAPES: list[Any] = [
    [],
    3,
    {"stages": []},
    {"stages": {"train": 3}},
    {"stages": {"data": None}},
    {"recipe": 3},
    {"recipe": {"path": 3}},
    {"recipe": {"overrides": "a=b"}},
    {"recipe": {"overrides": [3]}},
]


@pytest.mark.parametrize("manifest", SHAPES, ids=json.dumps)
def test_manifests_of_another_shape(toy_recipe: Path, tmp_path: Path, manifest: Any) -> None:
    folder = tmp_path / "run"
    open_run(toy_recipe, [], folder).begin()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInputError, match="this manifest is not one of a run") as error:
        run_stages(open_run(folder), "plan")
    assert error.value.hint == "Delete it to run all stages again."
