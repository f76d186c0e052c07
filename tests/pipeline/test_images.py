"""A run on pictures and their names: trained, scored both ways, resumed to the bit, loaded by sentence-transformers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from nearfield.data import Store
from nearfield.errors import BadInputError
from nearfield.mining.config import BM25Teacher, SentenceTransformerTeacher
from nearfield.mining.negatives import Negatives
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.audit import audit_run
from nearfield.pipeline.stages import Stages
from tests.data.making import write_rows
from tests.pipeline.scores import score

COLOURS = {"word1": (220, 30, 30), "word2": (30, 200, 40), "word3": (30, 40, 220), "word4": (230, 220, 40)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Pictures of one colour with a brightness, named by both."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(64):
        colour, shade = list(COLOURS)[number % 4], number // 4 % 8
        pixels = (np.array(COLOURS[colour]) * (0.4 + 0.075 * shade)).astype(np.uint8)
        Image.new("RGB", (10 + number % 5, 12), tuple(pixels.tolist())).save(folder / f"{number}.png")
        name = f"{colour} word{20 + shade}"
        rows.append({"name": name, "image": f"{number}.png", "split": "test" if number >= 32 else "train"})
    write_rows(folder / "rows.jsonl", rows)
    (folder / "data.yaml").write_text(
        """\
name: colours
sources:
  - name: colours
    task_type: Any2AnyRetrieval
    reader: {kind: jsonl, path: rows.jsonl}
    examples: {kind: retrieval, query: name, positives: image}
    images: {columns: [image]}
    split: {kind: column, column: split}
"""
    )
    (folder / "suite.yaml").write_text(
        """\
name: colours
tasks:
  - {kind: heldout, name: Find, data: data.yaml, source: colours, distractors: 0, metric: recall_at_10}
  - {kind: heldout, name: Name, data: data.yaml, source: colours, distractors: 0, metric: recall_at_10, reverse: true}
"""
    )
    path = folder / "recipe.yaml"
    path.write_text(
        f"""\
name: colours
data: data.yaml
encoder:
  model: {tiny_model}
  normalize: true
  image_tower:
    architecture: vit
    size: 16
    settings: {{patch_size: 8, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
objective: {{kind: infonce, temperature: 0.1, both_directions: true, learn_temperature: true}}
batches: {{kind: single_source, batch_size: 16}}
training:
  epochs: 20
  max_steps: 24
  learning_rate: 5.0e-3
  micro_batch_tokens: 48
  gradient_cache: always
  checkpoints: {{every_steps: 12}}
  trackers: []
evaluation: {{suite: suite.yaml, baselines: [random]}}
"""
    )
    return path


def test_a_run_learns_which_name_goes_with_which_picture(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "colours"
    run_stages(open_run(recipe, (), folder))
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    assert model.modalities == ["image", "text"]
    pictures = [Image.new("RGB", (20, 20), colour) for colour in COLOURS.values()]
    similarity = model.encode(list(COLOURS)) @ model.encode(pictures).T
    assert similarity.argmax(axis=1).tolist() == [0, 1, 2, 3]
    for task in ("Find", "Name"):
        assert score(folder, "after", task) > score(folder, "before", task) + 0.1, task
    report = (folder / "report.html").read_text()
    assert "data:image/" in report
    # From the checkpoint in the middle: the same weights.
    again = tmp_path / "runs" / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step-00000024")
    shutil.rmtree(again / "model")
    run_stages(open_run(recipe, (), again), "train")
    for name in ("text_0_Transformer", "image_0_Transformer"):
        one, other = (load_file(run / "model" / name / "model.safetensors") for run in (folder, again))
        assert all(np.array_equal(one[key], other[key]) for key in one), name


def test_pictures_are_mined_and_planned_by_a_teacher_of_both(recipe: Path, tmp_path: Path) -> None:
    run_stages(open_run(recipe, ["training.max_steps=1"], tmp_path / "runs" / "teacher"), "train")
    teacher = tmp_path / "runs" / "teacher" / "model"
    settings = [
        f"teacher={{kind: sentence_transformer, model: {teacher}}}",
        "mining={negatives: 2, rules: []}",
        "batches={kind: communities, batch_size: 8, community_size: 2, rank_from: 1, rank_to: 4, negatives: 0}",
        "training.max_steps=2",
        "evaluation=null",
    ]
    run_stages(open_run(recipe, settings, tmp_path / "runs" / "mined"))
    stages = Stages.of(open_run(recipe, settings, tmp_path / "runs" / "mined"))
    store, found = Store.open(stages.data.output), Negatives(stages.mine.output)
    model = SentenceTransformer(str(teacher), device="cpu")
    names = model.encode(store.texts(found.table["query"].to_numpy()), normalize_embeddings=True)
    shown = model.encode(store.images(found.lists.values), normalize_embeddings=True)
    assert len(found.lists.values) == 2 * len(names) == 64
    np.testing.assert_allclose((np.repeat(names, 2, axis=0) * shown).sum(axis=1), found.scores, atol=2e-6)
    positives = store.examples.take(found.examples)["positives"].to_pylist()
    everything = np.unique([row for rows in positives for row in rows])
    similarity = names @ model.encode(store.images(everything), normalize_embeddings=True).T
    seen = audit_run(stages.job.run, SentenceTransformerTeacher(model=str(teacher)), shown=1)
    assert seen.sample[0].negatives[0].text.startswith("[image ")
    with pytest.raises(BadInputError, match="goes by words alone"):
        audit_run(stages.job.run, BM25Teacher())
    for line, own, mined in zip(similarity, positives, found.lists.values.reshape(-1, 2).tolist(), strict=True):
        others = [item for item in everything[np.argsort(-line)].tolist() if item not in own]
        assert mined == others[:2]


def test_patterns_of_a_sample_are_scored_in_one_batch(recipe: Path, tmp_path: Path) -> None:
    text = (recipe.parent / "data.yaml").read_text()
    text += """\
    cluster: number
  - name: words
    task_type: Retrieval
    reader: {kind: jsonl, path: words.jsonl}
    examples: {kind: retrieval, query: name, positives: also}
    cluster: number
    split: {kind: column, column: split}
"""
    for name in ("data.yaml", "rows.jsonl", "words.jsonl"):
        rows = [json.loads(line) for line in (recipe.parent / "rows.jsonl").read_text().splitlines()]
        rows = [{**row, "number": f"n{i}", "also": f"{row['name']} word90"} for i, row in enumerate(rows)]
        if name == "words.jsonl":
            rows = [row for i, row in enumerate(rows) if i % 4]
        (tmp_path / name).write_text(text if name == "data.yaml" else "".join(json.dumps(row) + "\n" for row in rows))
    for file in recipe.parent.glob("*.png"):
        shutil.copy(file, tmp_path)
    settings = [
        f"data={tmp_path / 'data.yaml'}",
        "batches={kind: patterns, batch_size: 8, negatives: 0}",
        "objective={kind: combined, parts: [{each_source: true, objective: {kind: infonce, temperature: 0.1}}]}",
        "training.max_steps=3",
        "evaluation=null",
    ]
    stages = Stages.of(open_run(recipe, settings, tmp_path / "runs" / "patterns"))
    run_stages(stages.job.run)
    plan = pq.read_table(stages.job.run.folder / "plan" / "epoch-000.parquet")
    store = Store.open(stages.data.output)
    samples = store.examples.take(plan["example"])["cluster"].to_pylist()
    assert len(samples) == 24 + 32
    for step in range(4):
        mine = [i for i, number in enumerate(plan["step"].to_pylist()) if number == step]
        of = [{samples[i] for i in mine if plan["source"][i].as_py() == number} for number in (0, 1)]
        assert len(of[0]) == 8 and of[1] == {sample for sample in of[0] if int(sample[1:]) % 4}
    lines = [json.loads(line) for line in (stages.job.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["loss"] > 1 for line in lines), "two losses, of 8 and of 6 rows"
    with pytest.raises(BadInputError, match="negatives of each other"):
        open_run(recipe, [*settings, "objective={kind: infonce}"], tmp_path / "runs" / "plain")
    with pytest.raises(BadInputError, match="which examples of 'colours' are of one sample"):
        open_run(recipe, settings[1:], tmp_path / "runs" / "unknown")


def test_what_cannot_work_with_pictures_is_refused(recipe: Path, tmp_path: Path) -> None:
    mining = ["mining={negatives: 1}", "batches.negatives=1"]
    with pytest.raises(BadInputError, match="this encoder takes none"):
        run_stages(open_run(recipe, mining, tmp_path / "runs" / "mined"), "mine")
    words = ["mining={negatives: 1, teacher: {kind: bm25}}", "batches.negatives=1"]
    with pytest.raises(BadInputError, match="bm25 goes by words alone"):
        run_stages(open_run(recipe, words, tmp_path / "runs" / "words"), "mine")
    with pytest.raises(BadInputError, match="this encoder takes none"):
        run_stages(open_run(recipe, ["encoder.image_tower=null"], tmp_path / "runs" / "texts"), "tokens")
