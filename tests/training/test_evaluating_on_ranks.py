"""Evaluation during the training on two ranks: all hold all embeddings, and the run is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nearfield.encoders import load_encoder
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages
from tests.patience import PATIENCE
from tests.training.ranks_evaluating import TEXTS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-3000:]


def test_embeddings_of_two_ranks(tiny_model: Path, tmp_path: Path) -> None:
    torchrun(str(Path(__file__).with_name("ranks_evaluating.py")), str(tiny_model), str(tmp_path))
    expected = load_encoder(str(tiny_model), device="cpu").model.encode(TEXTS, prompt="word9 ")
    for backend in ("ddp", "fsdp2"):
        for rank in (0, 1):
            found = np.load(tmp_path / f"{backend}-many-{rank}.npy")
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
            one = np.load(tmp_path / f"{backend}-one-{rank}.npy")
            np.testing.assert_allclose(one, expected[:1], rtol=0, atol=2e-6, err_msg="a rank without a text")
            told = json.loads((tmp_path / f"{backend}-{rank}.json").read_text())
            assert told == {"stopped": True}, "one rank's signal ends the evaluation of all"


def test_a_run_on_two_ranks(toy_recipe: Path, toy_data: Path, tmp_path: Path) -> None:
    suite = tmp_path / "small.yaml"
    suite.write_text(f"name: small\ntasks:\n  - {{kind: heldout, name: Toy, data: {toy_data}, source: pairs}}\n")
    evaluation = json.dumps({"suite": str(suite), "every_steps": 3, "keep_best": True, "patience": 2})
    overrides = [f"training.evaluation={evaluation}", "training.dropout=false"]
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    run_stages(open_run(toy_recipe, overrides, one), "train")
    torchrun("-m", "nearfield", "train", str(toy_recipe), "--run-folder", str(two), "--until", "train", *overrides)
    scores = [
        [(line["step"], line["scores"]["Toy"]) for line in read_metrics(run / "evaluations.jsonl")]
        for run in (one, two)
    ]
    assert [step for step, _ in scores[0]] == [step for step, _ in scores[1]]
    assert [score for _, score in scores[0]] == pytest.approx([score for _, score in scores[1]], abs=2e-3)
    records = [json.loads((run / "manifest.json").read_text())["stages"]["train"] for run in (one, two)]
    assert [record["world_size"] for record in records] == [1, 2]
    assert records[0]["checkpoint"] == records[1]["checkpoint"]
