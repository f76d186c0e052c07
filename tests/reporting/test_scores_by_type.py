"""Scores of cut vectors by task type: read from result folders, drawn in the page of an analysis."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nearfield.cli import main
from nearfield.reporting.comparison import dimension_figures, scores_by_type

TASKS = {"A": "STS", "B": "STS", "C": "Retrieval"}


def write(folder: Path, scores: dict[str, float], dimensions: int = 64) -> Path:
    """A folder of results in mteb's layout."""
    folder.mkdir(parents=True)
    (folder / "model_meta.json").write_text(json.dumps({"embed_dim": dimensions}))
    for task, score in scores.items():
        (folder / f"{task}.json").write_text(json.dumps({"scores": {"test": [{"main_score": score}]}}))
        about = {b"nearfield": json.dumps({"task_type": TASKS[task]}).encode()}
        pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(about), folder / f"{task}.units.parquet")
    return folder


@pytest.fixture()
def whole(tmp_path: Path) -> Path:
    """A model that was cut to 16 and 32 first, and to 16 drawn and principal dimensions; one cut lacks a task."""
    for name, scores in {
        "org__m-dim16": {"A": 0.3, "B": 0.5, "C": 0.2},
        "org__m-dim32": {"A": 0.5, "B": 0.7, "C": 0.3},
        "org__m-random16": {"A": 0.2, "C": 0.1},
        "org__m-pca16": {"A": 0.4, "B": 0.6, "C": 0.25},
        "org__other-dim16": {"A": 0.9, "B": 0.9, "C": 0.9},
    }.items():
        write(tmp_path / "results" / name / "rev", scores)
    return write(tmp_path / "results" / "org__m" / "rev", {"A": 0.6, "B": 0.8, "C": 0.4})


def test_only_tasks_that_all_have_count(whole: Path, tmp_path: Path) -> None:
    found = scores_by_type(tmp_path / "results", whole)
    assert found == {
        "first": ([16, 32, 64], {"STS": (1, [0.3, 0.5, 0.6]), "Retrieval": (1, [0.2, 0.3, 0.4])}),
        "random": ([16, 64], {"STS": (1, [0.2, 0.6]), "Retrieval": (1, [0.1, 0.4])}),
        "principal": ([16, 64], {"STS": (1, [0.4, 0.6]), "Retrieval": (1, [0.25, 0.4])}),
    }
    (tmp_path / "results" / "org__m-random16" / "rev" / "A.json").unlink()
    assert scores_by_type(tmp_path / "results", whole)["first"][1].keys() == {"Retrieval"}


def test_the_report_draws_the_first_dimensions(whole: Path, tmp_path: Path) -> None:
    (figure,) = dimension_figures(tmp_path / "results", {"after": whole})
    assert figure.values is not None and figure.values["x"] == [16, 32, 64]
    assert figure.values["series"] == [
        {"label": "STS (1)", "y": [0.3, 0.5, 0.6]},
        {"label": "Retrieval (1)", "y": [0.2, 0.3, 0.4]},
    ]


def test_the_page_of_an_analysis_has_a_chart_a_type(whole: Path, tiny_model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"word{i % 90} word{i * 7 % 83} {i}\n" for i in range(60)))
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    command = ["analyse", str(tiny_model), "--texts", str(texts), "--html", str(page), "--json", str(figures)]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--scores", str(whole)])
    assert stopped.value.code == 0
    made = json.loads(figures.read_text())["scores_by_type"]
    assert made["principal"] == {"dimensions": [16, 64], "types": {"STS": [0.4, 0.6], "Retrieval": [0.25, 0.4]}}
    html = page.read_text()
    for kind in ("STS", "Retrieval"):
        assert f"{kind}: mean score by the dimensions kept" in html
    assert "principal dimensions" in html and "random dimensions" in html


@pytest.mark.parametrize(("folder", "words"), [("nowhere", "no such folder"), ("other", "no scores of cut vectors")])
def test_folders_without_cut_scores(
    folder: str, words: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"word{i} text\n" for i in range(60)))
    write(tmp_path / "results" / "other" / "rev", {"A": 0.5})
    place = tmp_path / "results" / folder / "rev"
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", str(tiny_model), "--texts", str(tmp_path / "texts.txt"), "--scores", str(place)])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
