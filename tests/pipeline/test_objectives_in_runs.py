"""Objectives beside InfoNCE, from the recipe to the model: they get what they ask for."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.arrays import Ragged
from nearfield.batching.plan import Batch, Plan
from nearfield.conformance.tiny_models import WORDS, save_tiny_bert
from nearfield.errors import BadInputError
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages
from nearfield.training.chunks import TeacherScores

SOURCES = """\
name: kinds
sources:
  - name: search
    task_type: Retrieval
    reader: {kind: jsonl, path: search.jsonl}
    examples: {kind: retrieval, query: query, positives: positive, negatives: negative}
    split: {kind: all}
  - name: pairs
    task_type: STS
    reader: {kind: jsonl, path: pairs.jsonl}
    examples: {kind: graded, first: a, second: b, score: score, scale: [0, 5]}
    split: {kind: all}
  - name: classes
    task_type: Classification
    reader: {kind: jsonl, path: classes.jsonl}
    examples: {kind: labelled, item: text, label: label}
    split: {kind: all}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty retrieval examples, graded pairs and labelled texts each."""
    folder, rows = tmp_path_factory.mktemp("kinds"), random.Random(0)

    def text(*more: str) -> str:
        return " ".join([*rows.sample(WORDS, 5), *more])

    lines = {
        "search": [{"query": text(f"word{i}"), "positive": text(f"word{i}"), "negative": text()} for i in range(60)],
        "pairs": [{"a": text(), "b": text(), "score": rows.randint(0, 5)} for _ in range(60)],
        "classes": [{"text": text(f"word{i % 4}"), "label": f"c{i % 4}"} for i in range(60)],
    }
    for name, found in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    (folder / "kinds.yaml").write_text(SOURCES)
    return folder / "kinds.yaml"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model."""
    return save_tiny_bert(tmp_path_factory.mktemp("teacher") / "wide", hidden=64, seed=3)


def train(folder: Path, model: Path, data: Path, objective: str, more: str = "", batches: str = "") -> Path:
    recipe = folder / "kinds.yaml"
    recipe.write_text(
        f"""\
name: kinds
data: {data}
encoder: {{model: {model}}}
objective: {objective}
batches: {{kind: single_source, batch_size: 10{batches}}}
training: {{epochs: 1, max_steps: 4, learning_rate: 1.0e-3, trackers: [], watch_every: 1}}
{more}
"""
    )
    return run_stages(open_run(recipe, (), folder / "run"), "train").folder


def told(run: Path, sources: set[str]) -> list[dict[str, Any]]:
    """The metrics of a run of four steps that ended well and learnt from these sources."""
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in lines)
    plan = Plan(run / "plan" / "epoch-000.parquet")
    assert set(plan.metadata["sources"].values()) == sources
    assert (run / "model" / "modules.json").is_file()
    return lines


MINING = "mining: {negatives: 3, explicit: replace, rules: [], teacher: {kind: sentence_transformer, model: TEACHER}}"


@pytest.mark.parametrize(
    ("objective", "more", "sources"),
    [
        ("{kind: cosent}", "", {"pairs"}),
        ("{kind: angle}", "", {"pairs"}),
        ("{kind: triplet}", "", {"search"}),
        ("{kind: siglip}", "", {"search"}),
        ("{kind: supcon}", "", {"classes"}),
        ("{kind: unicom, classes: 0.5}", "", {"classes"}),
        ("{kind: simcse}", "", {"search", "pairs", "classes"}),
        ("{kind: sbcl}", "", {"classes"}),
        ("{kind: hiprbert}", "", {"classes"}),
        ("{kind: simlap, label_width: 8, hidden: 8, project: 8, project_hidden: 8}", "", {"classes"}),
        ("{kind: carol, inner: 8}", "", {"classes"}),
        ("{kind: mcse, captions: [search], projection: 8}", "guide: GUIDE", {"search", "pairs", "classes"}),
        ("{kind: distil_scores, teacher_temperature: 0.1}", MINING, {"search"}),
        ("{kind: distil_scores, loss: margin_mse, teacher: vectors}", "guide: GUIDE", {"search"}),
        ("{kind: distil_embeddings}", "guide: GUIDE", {"search", "pairs", "classes"}),
        (
            "{kind: combined, parts: [{objective: {kind: infonce}}, {objective: {kind: cosent}, weight: 0.8}]}",
            "",
            {"search", "pairs"},
        ),
    ],
)
def test_it_trains(
    objective: str, more: str, sources: set[str], tmp_path: Path, tiny_model: Path, data: Path, teacher: Path
) -> None:
    guide = f"{{kind: sentence_transformer, model: {teacher}}}"
    more = more.replace("TEACHER", str(teacher)).replace("GUIDE", guide)
    run = train(tmp_path, tiny_model, data, objective, more, ", negatives: 1")
    lines = told(run, sources)
    assert all(line["loss"] > 0 for line in lines)
    assert all("effective_rank" in line for line in lines)


def test_cmim_trains(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    """It learns from single texts: it tells of its latents, not of how alike two sides are. Its loss, of log densities, falls;
    that it is over 0 is not promised."""
    run = train(tmp_path, tiny_model, data, "{kind: cmim, inner: 8}")
    lines = told(run, {"search", "pairs", "classes"})
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["deviation"] == pytest.approx(0.1) and lines[-1]["deviation"] != pytest.approx(0.1, rel=1e-4)
    assert all(0 < line["belonging"] < 1 for line in lines)
    assert not any("effective_rank" in line or "positive_similarity" in line for line in lines)


def test_both_kinds_in_one_batch(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    """Conan's joint loss: the parts' losses are told, and the weighted sum is the loss."""
    objective = "{kind: combined, parts: [{objective: {kind: infonce}}, {objective: {kind: cosent}, weight: 0.8}]}"
    recipe = tmp_path / "kinds.yaml"
    recipe.write_text(
        f"""\
name: kinds
data: {data}
encoder: {{model: {tiny_model}}}
objective: {objective}
batches: {{kind: shuffled, batch_size: 20}}
training: {{max_steps: 3, trackers: [], watch_every: 1}}
"""
    )
    run = run_stages(open_run(recipe, (), tmp_path / "run"), "train").folder
    lines = read_metrics(run / "metrics.jsonl")
    both = [line for line in lines if "loss/infonce" in line and "loss/cosent" in line]
    assert both, "no batch had both kinds"
    for line in both:
        assert line["loss"] == pytest.approx(line["loss/infonce"] + 0.8 * line["loss/cosent"], rel=1e-5)


def test_what_does_not_fit_is_said(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    with pytest.raises(BadInputError, match="the recipe does not mine"):
        train(tmp_path, tiny_model, data, "{kind: distil_scores}")
    with pytest.raises(BadInputError, match="has no scores of the data's own negatives"):
        train(tmp_path, tiny_model, data, "{kind: distil_scores}", "mining: {negatives: 3}")
    with pytest.raises(BadInputError, match="learns from graded examples"):
        train(tmp_path, tiny_model, data, "{kind: cosent}", MINING.replace(", model: TEACHER", ""))
    with pytest.raises(BadInputError, match="the objective 'cosent' learns from graded examples"):
        train(tmp_path, tiny_model, data, "{kind: cosent}", "sources: [search]")
    twice = "{kind: combined, parts: [{objective: {kind: infonce}}, {objective: {kind: simcse}}]}"
    with pytest.raises(BadInputError, match="infonce and simcse do not read the texts of the source 'search' alike"):
        train(tmp_path, tiny_model, data, twice)
    with pytest.raises(BadInputError, match="has no use for one"):
        train(tmp_path, tiny_model, data, "{kind: cosent}", "guide: {kind: sentence_transformer}")


def test_teacher_scores_of_a_batch() -> None:
    """Positives and negatives by item, whatever their order; not a number for what was not scored."""
    scores = TeacherScores(
        np.array([3, 8]),
        Ragged.from_lists([[10, 11], [20]]),
        np.array([0.9, 0.8, 0.7]),
        Ragged.from_lists([[12, 13], [21]]),
        np.array([0.4, 0.3, 0.2]),
    )
    none = np.zeros(3, dtype=np.int64)
    batch = Batch(
        np.array([8, 3, 5]),
        np.arange(3),
        [np.array([20]), np.array([11]), np.array([30])],
        [np.array([21, 99]), np.array([13, 12]), np.array([12])],
        none,
        none,
        0,
    )
    nan = np.nan
    np.testing.assert_array_equal(scores.of(batch), [0.7, 0.2, nan, 0.8, 0.3, 0.4, nan, nan])
    empty = TeacherScores(np.array([], dtype=np.int64), Ragged.empty(0), np.array([]), Ragged.empty(0), np.array([]))
    assert np.isnan(empty.of(batch)).all()
