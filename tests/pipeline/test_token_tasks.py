"""Stages that train on plain texts before there are pairs: masked tokens, MNTP, RetroMAE, SimCSE."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from nearfield.conformance.tiny_models import WORDS, save_tiny_bert
from nearfield.errors import BadInputError
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages
from tests.encoders.tiny import save_tiny

RETROMAE = "{kind: masked_tokens, share: 0.3, decoder: {share: 0.5}}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty plain texts."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS[:20], k=draw.randint(3, 12))) + f" word{i}"} for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.yaml").write_text(
        """\
name: texts
sources:
  - name: plain
    task_type: Clustering
    reader: {kind: jsonl, path: texts.jsonl}
    examples: {kind: text, text: text}
    split: {kind: all}
"""
    )
    return folder / "texts.yaml"


def recipe(folder: Path, model: Path, data: Path, objective: str, **more: object) -> Path:
    path = folder / "plain.yaml"
    settings = {
        "name": "plain",
        "data": str(data),
        "encoder": {"model": str(model)},
        "objective": yaml.safe_load(objective),
        "batches": {"kind": "shuffled", "batch_size": 10},
        "training": {
            "max_steps": 6,
            "learning_rate": 1e-3,
            "trackers": [],
            "watch_every": 1,
            "checkpoints": {"every_steps": 3},
            "micro_batch_tokens": 64,
        },
    }
    path.write_text(yaml.safe_dump({**settings, **more}))
    return path


def test_a_training_on_texts_alone(texts: Path, tmp_path: Path) -> None:
    """The figures go down, the model is a plain one with the base's tensors, and a resumed run is the uninterrupted one."""
    base = save_tiny_bert(tmp_path / "base")
    path = recipe(tmp_path, base, texts, RETROMAE)
    settings = ("training.max_steps=24", "training.epochs=4", "training.checkpoints.every_steps=12")
    run = run_stages(open_run(path, settings, tmp_path / "run"), "train").folder
    lines = read_metrics(run / "metrics.jsonl")
    assert len(lines) == 24
    for name in ("loss/masked", "loss/decoded"):
        assert np.mean([line[name] for line in lines[-4:]]) < np.mean([line[name] for line in lines[:4]]) - 0.3
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/masked"] + line["loss/decoded"], rel=1e-4)
        assert "positive_similarity" not in line and "alignment" not in line
    after, before = (load_file(folder / "model.safetensors") for folder in (run / "model", base))
    assert {name for name in after if "pooler" not in name} == before.keys(), "neither head nor decoder"
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert "embeddings.word_embeddings.weight" in moved and len(moved) > len(before) - 3
    assert SentenceTransformer(str(run / "model"), device="cpu").encode(["word1"]).shape == (1, 32)

    checkpoints = run / "checkpoints"
    first, last = checkpoints / "step-00000012", checkpoints / "step-00000024"
    straight = {name: load_file(last / name) for name in ("model.safetensors", "optimizer.safetensors")}
    assert any(name.startswith("token_task.decoder.") for name in straight["model.safetensors"])
    assert first.is_dir()
    shutil.rmtree(last)
    shutil.rmtree(run / "model")
    run_stages(open_run(path, settings, tmp_path / "run"), "train")
    for name, tensors in straight.items():
        again = load_file(last / name)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors), name


def test_llm2vec_in_a_row(texts: Path, toy_data: Path, tmp_path: Path) -> None:
    """A decoder learns MNTP, SimCSE and pairs with a LoRA each, and stays a plain bidirectional one."""
    base = save_tiny(tmp_path / "base", "llama")
    stages = [
        {"name": "mntp", "objective": {"kind": "masked_tokens", "predict": "next", "mask_token": "word7"}},
        {"name": "simcse", "objective": {"kind": "simcse"}, "training": {"attention_dropout": 0.3}},
        {"name": "pairs", "data": str(toy_data), "objective": {"kind": "infonce"}},
    ]
    encoder = {
        "model": str(base),
        "attention": "bidirectional",
        "adapter": {"kind": "lora", "r": 4, "targets": "all-linear"},
    }
    path = recipe(tmp_path, base, texts, RETROMAE, stages=stages, encoder=encoder)
    run = open_run(path, (), tmp_path / "run")
    run_stages(run, "train")
    models = [one.folder / "model" for one in (*run.before, run)]
    before = load_file(base / "model.safetensors")
    for folder in models:
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {name for name in after if "_proj" in name}
        config = json.loads((folder / "config.json").read_text())
        assert config["is_causal"] is False and config.get("attention_dropout", 0.0) == 0.0
        assert SentenceTransformer(str(folder), device="cpu").encode(["word1"]).shape == (1, 32)
        before = after


def test_masked_tokens_beside_pairs(toy_data: Path, tmp_path: Path) -> None:
    """A contrastive loss with masked tokens of its queries, as DeCLUTR and SimCSE have it."""
    objective = (
        "{kind: combined, parts: [{objective: {kind: infonce}}, {objective: {kind: masked_tokens}, weight: 0.1}]}"
    )
    path = recipe(tmp_path, save_tiny_bert(tmp_path / "base"), toy_data, objective)
    lines = read_metrics(run_stages(open_run(path, (), tmp_path / "run"), "train").folder / "metrics.jsonl")
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/infonce"] + 0.1 * line["loss/masked_tokens"], rel=1e-3)
        assert "positive_similarity" in line


def test_what_is_refused(texts: Path, tmp_path: Path) -> None:
    base = save_tiny_bert(tmp_path / "base")
    path = recipe(tmp_path, base, texts, "{kind: infonce}")
    with pytest.raises(BadInputError, match="learns from retrieval examples, and no source has any"):
        open_run(path, (), tmp_path / "run")
    path = recipe(tmp_path, base, texts, "{kind: masked_tokens, mask_token: '<absent>'}")
    with pytest.raises(BadInputError, match="'<absent>' is no token"):
        run_stages(open_run(path, (), tmp_path / "run"), "train")
    path = recipe(tmp_path, base, texts, RETROMAE)
    with pytest.raises(BadInputError, match="a ring never brings together"):
        run_stages(open_run(path, ("training.exchange=ring",), tmp_path / "ring"), "train")
