"""A run of one transformer on MMEB's format: tried out, trained, scored as MMEB and MIEB do, resumed to the bit, loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from nearfield.conformance.tiny_models import save_tiny_vlm
from nearfield.data import Store
from nearfield.encoders import load_encoder
from nearfield.encoders.encode import Encoder
from nearfield.errors import BadInputError
from nearfield.mining.negatives import Negatives
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import dry_run
from nearfield.pipeline.stages import Stages
from tests.data.making import write_rows
from tests.pipeline.scores import score

COLOURS = {"word1": (220, 30, 30), "word2": (30, 200, 40), "word3": (30, 40, 220), "word4": (230, 220, 40)}
TASK = "<|image_1|>\nword100 word101"


def shade(number: int) -> tuple[str, tuple[int, int, int]]:
    """The name of a colour, and that colour with a brightness."""
    name = list(COLOURS)[number % 4]
    red, green, blue = (np.array(COLOURS[name]) * (0.5 + 0.06 * (number // 4 % 8))).astype(np.uint8).tolist()
    return name, (red, green, blue)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one colour: which it is (a picture and an instruction -> a word), and pictures of the colour of a word."""
    folder = tmp_path_factory.mktemp("mmeb")
    model = save_tiny_vlm(folder / "base", "idefics3")
    classify, find, evaluation = [], [], []
    for number in range(64):
        name, colour = shade(number)
        Image.new("RGB", (20 + number % 5, 16), colour).save(folder / f"{number}.png")
        other = list(COLOURS)[(number + 1) % 4]
        row: dict[str, Any] = {"qry": TASK, "qry_image_path": f"{number}.png", "pos_text": f"{name} word{110 + number}"}
        classify.append({**row, "pos_image_path": "", "neg_text": f"{other} word199", "neg_image_path": ""})
        target = {"pos_text": "<|image_1|>\nword102", "pos_image_path": f"{number}.png"}
        find.append({"qry": f"word103 {name} word{40 + number}", "qry_image_path": "", **target})
        if number < 24:
            names = [name, *(each for each in COLOURS if each != name)]
            about = {"qry_inst": "<|image_1|>\nword100", "qry_text": "word101", "qry_img_path": f"{number}.png"}
            evaluation.append(
                {**about, "tgt_text": [f"{each} word{110 + number}" for each in names], "tgt_img_path": [""] * 4}
            )
    for file, rows in (("classify", classify), ("find", find), ("rows", evaluation)):
        write_rows(folder / f"{file}.jsonl", rows)
    source = """\
  - name: {name}
    task_type: Any2AnyRetrieval
    reader: {{kind: mmeb, path: {name}.jsonl, image_folder: .}}
    examples: {{kind: retrieval, query: query, positives: positives, negatives: negatives}}
    prompts: {{query: "word120 ", document: ""}}
    split: {{kind: hash, fractions: {{train: 0.75, test: 0.25}}}}
"""
    (folder / "data.yaml").write_text(
        "name: mmeb\nsources:\n" + source.format(name="classify") + source.format(name="find")
    )
    (folder / "suite.yaml").write_text(
        """\
name: mmeb
tasks:
  - {kind: mmeb, name: Colours, file: rows.jsonl}
  - {kind: heldout, name: Find, data: data.yaml, source: find, distractors: 0, metric: recall_at_10}
"""
    )
    path = folder / "recipe.yaml"
    path.write_text(
        f"""\
name: one-tower
data: data.yaml
encoder: {{model: {model}, pooling: last, append_eos: true, normalize: true, max_length: 200}}
objective: {{kind: infonce, temperature: 0.1}}
batches: {{kind: single_source, batch_size: 8, negatives: 1}}
training:
  epochs: 20
  max_steps: 40
  learning_rate: 8.0e-3
  micro_batch_tokens: 120
  gradient_cache: always
  checkpoints: {{every_steps: 20}}
  trackers: []
evaluation: {{suite: suite.yaml, baselines: [random]}}
"""
    )
    return path


def test_a_run_from_a_try_to_a_model(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    run = open_run(recipe, (), folder)
    found = dry_run(run)
    assert found is not None and found.would_start, found
    run_stages(run)
    pictures = [Image.new("RGB", (22, 16), colour) for colour in COLOURS.values()]
    ours = load_encoder(str(folder / "model"), device="cpu").model
    plain = SentenceTransformer(str(folder / "model"), device="cpu")
    np.testing.assert_array_equal(ours.encode(list(COLOURS)), plain.encode(list(COLOURS)))
    np.testing.assert_array_equal(ours.encode(pictures), plain.encode(pictures))
    assert score(folder, "after", "Colours") > score(folder, "before", "Colours") + 0.3
    hits = []
    for row in map(json.loads, (recipe.parent / "rows.jsonl").read_text().splitlines()):
        asked = {"text": "word100 word101", "image": Image.open(recipe.parent / row["qry_img_path"])}
        (query,) = plain.encode([asked], prompt="word120 ")
        hits.append(int((plain.encode(row["tgt_text"]) @ query).argmax()) == 0)
    assert score(folder, "after", "Colours") == pytest.approx(np.mean(hits), abs=1e-6)
    assert 0 <= score(folder, "after", "Find") <= 1
    # From the checkpoint in the middle: the same weights.
    again = tmp_path / "runs" / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step-00000040")
    shutil.rmtree(again / "model")
    run_stages(open_run(recipe, (), again), "train")
    one, other = (load_file(each / "model" / "model.safetensors") for each in (folder, again))
    assert all(np.array_equal(one[key], other[key]) for key in one)
    base = load_file(recipe.parent / "base" / "model.safetensors")
    moved = {name for name, value in base.items() if not np.array_equal(value, one[name])}
    assert any("vision" in name for name in moved) and any("text" in name for name in moved)


def test_the_score_is_that_of_the_strings_it_was_trained_with(recipe: Path, tmp_path: Path) -> None:
    """The tokens of a row of the evaluation are those of the same row of the training."""
    from nearfield.encoders.images import row_ids

    model = load_encoder(str(recipe.parent / "base"), device="cpu").model
    trained, scored = row_ids(model, ["<image>\nword100 word101", "word100 word101"], [(20, 16)] * 2, "word120 ")
    assert trained.tolist() == scored.tolist()


def test_what_cannot_work_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="pixels ends at token"):
        run_stages(open_run(recipe, ["encoder.max_length=12"], tmp_path / "runs" / "short"), "tokens")


def test_texts_pictures_and_both_are_mined_by_one_tower(recipe: Path, tmp_path: Path) -> None:
    settings = ["mining={negatives: 2, rules: []}", "batches.negatives=1"]
    stages = Stages.of(open_run(recipe, settings, tmp_path / "runs" / "mined"))
    run_stages(stages.job.run, "mine")
    store, found = Store.open(stages.data.output), Negatives(stages.mine.output)
    encoder = Encoder.load(str(recipe.parent / "base"), device="cpu")
    queries = found.table["query"].to_numpy()
    assert set(store.modalities(queries)) == {"text", "text+image"}
    assert set(store.modalities(found.lists.values)) == {"text", "text+image"}

    def alone(items: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        vectors = np.concatenate([encoder.of_items(store, items[i : i + 1]) for i in range(len(items))])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    few = np.arange(0, len(queries), 7)
    scores = (alone(np.repeat(queries[few], 2)) * alone(found.lists.values.reshape(-1, 2)[few].ravel())).sum(axis=1)
    np.testing.assert_allclose(scores, found.scores.reshape(-1, 2)[few].ravel(), atol=1e-5)
