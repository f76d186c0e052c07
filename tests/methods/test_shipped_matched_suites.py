"""The shipped twins: a domain and its general twin from one data recipe, scored and set beside each other."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from nearfield.data import DataConfig
from nearfield.evaluation import HeldOutTask, SuiteConfig
from tests.cli.command import run

ROOT = Path(__file__).parents[2]
SIDES = {side: ROOT / "eval" / "suites" / f"twin-{side}.yaml" for side in ("general", "domain")}


def _entries(side: str) -> list[HeldOutTask]:
    entries = SuiteConfig.load(SIDES[side]).tasks
    assert all(isinstance(entry, HeldOutTask) for entry in entries)
    return [entry for entry in entries if isinstance(entry, HeldOutTask)]


def test_both_sides_ask_alike() -> None:
    data = DataConfig.load(ROOT / "data_recipes" / "twins.yaml")
    assert [source.name for source in data.sources] == ["general", "domain"]
    general, domain = (_entries(side) for side in SIDES)
    for one, other in zip(general, domain, strict=True):
        assert (one.source, other.source) == ("general", "domain")
        assert one.data.resolve() == other.data.resolve() == ROOT / "data_recipes" / "twins.yaml"
        assert (one.reverse, one.max_queries, one.split) == (other.reverse, other.max_queries, other.split)
        assert one.name.removeprefix("General") == other.name.removeprefix("Domain")


@pytest.fixture
def few_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with made descriptions, as apt's lists would give them."""
    rng = np.random.default_rng(0)
    words = ["daemon", "parser", "library", "viewer", "kernel", "shell", "protocol", "editor", "driver", "archive"]
    folder = tmp_path / "cache" / "nearfield" / "data"
    folder.mkdir(parents=True)
    with gzip.open(folder / "debian-descriptions-50.jsonl.gz", "wt") as file:
        for number in range(600):
            drawn = rng.choice(words, 5, replace=False)
            row = {
                "short": f"{drawn[0]} for {drawn[1]} number {number}",
                "long": f"This {' '.join(drawn)} reads and writes files of kind {number}.",
                "source": f"source{number}",
                "package": f"package{number}",
                "section": "utils",
            }
            file.write(json.dumps(row) + "\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("few_descriptions")
def test_the_twins_are_scored_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the documentation says, with fewer queries; only the descriptions are made."""
    monkeypatch.chdir(tmp_path)
    for model in ("bm25", "random"):
        for file in SIDES.values():
            assert run("eval", model, "--suite", str(file), "tasks.0.max_queries=40", "tasks.1.max_queries=40") == 0
    measures = {
        measure: {entry.name: 1.0 for side in SIDES for entry in _entries(side)}
        for measure in ("llm errors", "dependency distance")
    }
    (tmp_path / "measures.json").write_text(json.dumps(measures))
    sides = ["--general", str(SIDES["general"]), "--domain", str(SIDES["domain"])]
    assert run("twins", "bm25", "random", *sides, "--measures", "measures.json", "--json", "twins.json") == 0
    said = capsys.readouterr().out
    made = json.loads((tmp_path / "twins.json").read_text())
    assert set(made["thirds"]) == {"entropy", "fog", "llm errors", "dependency distance"}
    gaps = {gap["model"]: gap for gap in made["gaps"] if gap["type"] == "all"}
    assert len(gaps) == 2
    for gap in gaps.values():
        assert gap["low"] <= gap["gap"] <= gap["high"]
    # BM25 finds the number in a made description, and has no word in common with a gloss.
    assert gaps["mteb/baseline-bm25s"]["gap"] > 0.3 > abs(gaps["mteb/baseline-random-encoder"]["gap"])
    assert "takes three models" in said
