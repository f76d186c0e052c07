"""A guide model in a run: its vectors are an artifact, and each batch looks its rows up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nearfield.data import Store, prepare_store
from nearfield.objectives import ContrastiveBatch
from nearfield.objectives.infonce import InfoNCE
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import dry_run
from tests.pipeline.fingerprints import fingerprints

MASK = "objective.guide_mask={rule: absolute, margin: 0.0}"
FEW = ("training.max_steps=2", "batches.batch_size=8")


def vectors_file(folder: Path, data: Path) -> tuple[Path, np.ndarray[Any, Any], Store]:
    """A file of vectors of all items of some data; the vectors by item row, of length 1; the store."""
    store = prepare_store(data, folder / "store-cache")
    count = store.items.num_rows
    vectors = np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)
    order = np.random.default_rng(1).permutation(count)
    ids = [identity.hex() for identity in store.items["id"].to_pylist()]
    np.save(folder / "guide.npy", vectors[order])
    (folder / "guide.ids.txt").write_text("\n".join(ids[row] for row in order))
    return folder / "guide.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True), store


def test_each_batch_brings_the_guides_vectors_of_its_texts(
    toy_recipe: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, vectors, store = vectors_file(tmp_path, toy_data)
    seen: list[ContrastiveBatch] = []
    forward = InfoNCE.forward

    def spy(self: InfoNCE, batch: ContrastiveBatch) -> Any:
        seen.append(batch)
        return forward(self, batch)

    monkeypatch.setattr(InfoNCE, "forward", spy)
    run = open_run(toy_recipe, [MASK, f"guide={{kind: vectors, documents: {file}}}", *FEW], tmp_path / "run")
    run_stages(run, "train")
    seen = [batch for batch in seen if len(batch.queries) == 8]
    assert len(seen) >= 2
    for batch in seen:
        assert batch.query_ids is not None and batch.guide_queries is not None and batch.guide_documents is not None
        np.testing.assert_allclose(batch.guide_queries.numpy(), vectors[batch.query_ids.numpy()], rtol=1e-6)
        np.testing.assert_allclose(batch.guide_documents.numpy(), vectors[batch.document_ids.numpy()], rtol=1e-6)
    assert store.items.num_rows == len(vectors)


def test_a_guide_makes_only_the_training_stale(toy_recipe: Path) -> None:
    def prints(*overrides: str) -> dict[str, str]:
        return fingerprints(toy_recipe, list(overrides))

    without, base = prints(), prints(MASK)
    assert "vectors" in base and "vectors" not in without
    same = {name for name in without if without[name] == base[name]}
    assert same == {"data", "tokens", "plan"}
    other = prints(MASK, "guide={kind: sentence_transformer, prompts: {query: 'q: '}}")
    assert {name for name in base if base[name] == other[name]} == {"data", "tokens", "plan"}
    # One model in two roles is encoded once.
    assert prints(MASK, "teacher={kind: sentence_transformer}")["vectors"] == base["vectors"]


def test_the_model_before_training_guides_itself_and_a_dry_run_tries_it(toy_recipe: Path) -> None:
    found = dry_run(open_run(toy_recipe, [MASK, *FEW], toy_recipe.parent / "dry"))
    assert found is not None and found.would_start, found
    assert found.trial_steps > 0 and "vectors" in found.built


def test_a_guide_that_masks_nothing_changes_nothing(toy_recipe: Path) -> None:
    models = []
    for name, overrides in (("plain", []), ("masked", ["objective.guide_mask={margin: 3.0}"])):
        run = open_run(toy_recipe, [*overrides, *FEW], toy_recipe.parent / name)
        run_stages(run, "train")
        models.append(load_file(next((toy_recipe.parent / name / "checkpoints").glob("step-*2")) / "model.safetensors"))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
