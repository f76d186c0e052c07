"""The quickstart on pictures, as it is shipped, one seed."""

from __future__ import annotations

from pathlib import Path

from nearfield.pipeline import open_run, run_stages
from tests.pipeline.scores import score

RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "emoji.yaml"
# What is chosen by the memory that is free would differ on a busy machine.
BUDGET = ("training.micro_batch_tokens=512", "training.graph_tokens=65536")


def test_a_held_out_picture_finds_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "emoji"
    run_stages(open_run(RECIPE, ["training.trackers=[]", "seed=0", *BUDGET], folder))
    assert score(folder, "before", "EmojiImageToName") < 0.12, "ten of 214 are 4.7 % by chance"
    assert score(folder, "after", "EmojiImageToName") >= 0.30
    assert score(folder, "after", "EmojiNameToImage") >= 0.30
    assert score(folder, "after", "EmojiImageToNameNoFlags") >= 0.30
    assert (folder / "report.html").read_text().count("data:image/webp;base64,") >= 5
