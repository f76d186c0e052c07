"""``nearfield plan show`` and ``nearfield plan diff``: what they print, the page, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nearfield.batching import SingleSourceConfig
from nearfield.batching.plan import count_exceptions, measure_hardness, write_plan
from nearfield.cli.app import app
from nearfield.errors import BadInputError
from tests.batching.making import known_of, make_apart, make_vectors

EVIL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two epochs, the second without a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    sources, vectors = [make_apart(0, 66), make_apart(1, 40)], make_vectors()
    known = known_of(sources)
    for name, size in (("taught", 4), ("untaught", 8)):
        config = SingleSourceConfig(batch_size=size)
        for number in range(2):
            epoch = config.build().plan(sources, 3, number, known=known)
            measured: dict[str, Any] = {"exceptions": count_exceptions(epoch, known)}
            if name == "taught":
                measured |= measure_hardness(epoch, vectors, 3)
                epoch.details["strata"] = {
                    EVIL: {"kind": "kmeans", "wanted": 4, "clusters": 3, "merged": 1, "sizes": [30, 20, 16]}
                }
            about = {
                "seed": 3, "epoch": number, "batches": config.model_dump(mode="json"), "sources": {"0": EVIL, "1": "second"},
            }  # fmt: skip
            path = folder / name / "plan" / f"epoch-{number:03d}.parquet"
            names = {0: EVIL, 1: "second"}
            write_plan(path, epoch, {0: (0, 0), 1: (0, 0)}, lambda _, items: items % 9 + 2, about, names=names, measured=measured)  # fmt: skip
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_show_prints_and_draws(runs: Path) -> None:
    said = run("plan", "show", runs / "taught")
    assert "single_source, batches of 4, seed 3" in said
    assert "2 in a batch that did not fill" in said
    assert re.search(r"0\.\d{3} ± 0\.\d{3}", said)
    assert "3 clusters of 16 to 30 examples (4 asked for, 1 small ones merged)" in said
    page = (runs / "taught" / "plan.html").read_text()
    assert "<script" not in page
    assert page.count("<svg") == 5
    assert "Similarity of a query" in page and "Share of each source over the epoch" in page
    assert "No item stands twice in a batch" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_show_of_a_file_without_a_teacher(runs: Path, tmp_path: Path) -> None:
    said = run("plan", "show", runs / "untaught" / "plan" / "epoch-001.parquet", "--out", tmp_path / "page.html")
    assert "the recipe names no teacher" in said
    assert (tmp_path / "page.html").read_text().count("<svg") == 2


def test_diff(runs: Path) -> None:
    said = run("plan", "diff", runs / "taught", runs / "untaught")
    assert re.search(r"batches\s+26\s+13", said)
    assert "batches.batch_size" in said and "pairs of examples meet in both" in said
    same = run("plan", "diff", runs / "taught", runs / "taught" / "plan" / "epoch-000.parquet")
    assert "The plans are identical" in same and "overlap 100.0%" in same
    other = run("plan", "diff", runs / "taught", runs / "untaught", "--epoch", 1)
    assert "identical" not in other


def test_what_is_no_plan(runs: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["show", tmp_path / "none"], "there is no plan"),
        (["show", tmp_path], "this folder has no plan"),
        (["show", runs / "taught", "--out", tmp_path], "the page is one file, and this is a folder"),
        (["diff", runs / "taught", runs / "untaught", "--epoch", 2], "there is no epoch 2: 2 are planned"),
    ):
        with pytest.raises(BadInputError, match=words):
            run("plan", *arguments)


def test_shares(toy_recipe: Path, tmp_path: Path) -> None:
    arguments = ("plan", "shares", toy_recipe, "--run-folder", tmp_path / "run", "--split", "train", "--clusters", 3)
    (line,) = [line for line in run(*arguments).splitlines() if "sampling:" in line]
    sampling = yaml.safe_load(line.partition("sampling: ")[2])
    assert sampling["kind"] == "shares" and sum(sampling["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert not (tmp_path / "run" / "plan").exists(), "it only says"
    with pytest.raises(BadInputError, match="there is no source 'nobody'"):
        run(*arguments, "--towards", "nobody")
