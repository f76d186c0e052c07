"""MMEB's rows: hit@1 among own candidates, ties by chance, duplicates once, pictures on either side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nearfield.conformance.cases import TINY_VISION
from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.encoders import EncoderConfig, LoadedEncoder
from nearfield.encoders.config import ImageTowerConfig
from nearfield.encoders.load import build_encoder
from nearfield.errors import BadInputError
from nearfield.evaluation import SuiteConfig, evaluate
from nearfield.evaluation.config import MmebTask
from nearfield.evaluation.folder import mmeb_task
from tests.data.image_making import noise, saved
from tests.data.making import write_rows

ROWS, CANDIDATES = 60, 4


@pytest.fixture()
def model(tmp_path: Path) -> SentenceTransformer:
    tower = ImageTowerConfig(architecture="vit", settings=TINY_VISION, size=16)
    config = EncoderConfig(model=str(save_tiny_bert(tmp_path / "text")), image_tower=tower, normalize=True)
    return build_encoder(config, "cpu").model


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    """Pictures with an instruction, and four names each, one of which stands twice."""
    rows = []
    for number in range(ROWS):
        (tmp_path / f"{number}.png").write_bytes(saved(noise(number)))
        names = [f"word{(number * 7 + step) % 150}" for step in range(CANDIDATES)]
        about = {"qry_inst": "<|image_1|>\nword199", "qry_text": f"word{number}", "qry_img_path": f"{number}.png"}
        rows.append({**about, "tgt_text": [*names, names[1]], "tgt_img_path": [""] * (CANDIDATES + 1)})
    return write_rows(tmp_path / "rows.jsonl", rows)


def hits(model: SentenceTransformer, file: Path) -> float:
    suite = SuiteConfig(name="mmeb", tasks=[MmebTask(name="Rows", file=file)])
    result = evaluate(LoadedEncoder(model, "local/tiny", "0", "nowhere"), suite, file.parent / "results")
    assert result.failures == {}
    return float(json.loads((result.results_dir / "Rows.json").read_text())["scores"]["test"][0]["main_score"])


def test_hit_at_one_is_that_of_a_loop(model: SentenceTransformer, file: Path) -> None:
    found = []
    for row in map(json.loads, file.read_text().splitlines()):
        number = int(row["qry_text"].removeprefix("word"))
        query = model.encode([noise(number)])[0] + model.encode([f"word199 {row['qry_text']}"])[0]
        scores = model.encode(row["tgt_text"]) @ query
        found.append(int(np.argmax(scores)) == 0)
    assert hits(model, file) == pytest.approx(np.mean(found), abs=1e-4)


def test_equal_scores_hit_by_chance(model: SentenceTransformer, file: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    chance = mmeb_task(MmebTask(name="Rows", file=file)).details["chance"]
    assert chance == pytest.approx(1 / CANDIDATES, abs=1e-6)
    assert abs(hits(model, file) - chance) < 4 * (chance * (1 - chance) / ROWS) ** 0.5


def test_rows_that_cannot_be_scored_are_told(tmp_path: Path) -> None:
    def task(*rows: dict[str, Any]) -> None:
        mmeb_task(MmebTask(name="Rows", file=write_rows(tmp_path / "rows.jsonl", rows)))

    with pytest.raises(BadInputError, match="needs candidates"):
        task({"qry_text": "a", "tgt_text": []})
    with pytest.raises(BadInputError, match="needs a query"):
        task({"qry_text": "<image>", "tgt_text": ["a"]})
    with pytest.raises(BadInputError, match="some queries have a text or an image and others have not"):
        task({"qry_text": "a", "tgt_text": ["a"]}, {"qry_img_path": "a.png", "tgt_text": ["a"]})
    with pytest.raises(BadInputError, match="no rows"):
        task()
    outside = {"qry_text": "a", "tgt_img_path": ["../secret.png"]}
    mmeb = mmeb_task(MmebTask(name="Rows", file=write_rows(tmp_path / "rows.jsonl", [outside])))
    with pytest.raises(BadInputError, match="leaves its folder"):
        mmeb.task.load_data()
