"""The quickstart on pictures, as it is shipped: one seed, seven minutes of one core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfield.pipeline import open_run, run_stages

RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "emoji.yaml"


@pytest.mark.slow
def test_a_held_out_picture_finds_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "emoji"
    run_stages(open_run(RECIPE, ["training.trackers=[]", "seed=0"], folder))
    results = json.loads((folder / "manifest.json").read_text())["stages"]["evaluate"]["results"]

    def score(side: str, task: str) -> float:
        entries = json.loads((folder / results[side] / f"{task}.json").read_text())["scores"]["test"]
        return float(entries[0]["main_score"])

    assert score("before", "EmojiImageToName") < 0.12, "ten of 214 are 4.7 % by chance"
    assert score("after", "EmojiImageToName") >= 0.30
    assert score("after", "EmojiNameToImage") >= 0.30
    assert score("after", "EmojiImageToNameNoFlags") >= 0.30
    assert (folder / "report.html").read_text().count("data:image/webp;base64,") >= 5
