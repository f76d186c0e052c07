"""Trainings that can learn nothing are refused before the first step, and by the dry run; others are said to learn nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nearfield
from nearfield.conformance.tiny_models import WORDS
from nearfield.errors import BadInputError
from nearfield.training import diagnostics
from nearfield.training.diagnostics import ChanceWatch, GradientWatch
from nearfield.training.tracking import read_metrics
from tests.conftest import write_toy_recipe


def write_rows(folder: Path, rows: list[dict[str, Any]], examples: str, weight: bool = False) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "data.yaml"
    recipe.write_text(
        "name: rows\nsources:\n  - name: pairs\n    task_type: STS\n    reader: {kind: jsonl, path: rows.jsonl}\n"
        f"    examples: {examples}\n    split: {{kind: all, name: train}}\n"
        + ("    weight: weight\n" if weight else "")
    )
    return recipe


GRADED = "{kind: graded, first: a, second: b, score: score}"
PAIRS = "{kind: retrieval, query: a, positives: b}"


def rows_of(count: int = 40, **more: Any) -> list[dict[str, Any]]:
    return [
        {"a": f"{WORDS[n]} {WORDS[-1]}", "b": f"{WORDS[n]} {WORDS[-2]}", "score": n / count, **more}
        for n in range(count)
    ]


def refused(recipe: Path, settings: list[str], run: Path, match: str) -> None:
    """Both by the dry run and by the training, which begins nothing."""
    dry = nearfield.dry_run(recipe, settings, run)
    assert dry is not None and not dry.would_start
    assert any(match in notice.what for notice in dry.notices if notice.blocks)
    with pytest.raises(BadInputError, match=match):
        nearfield.train(recipe, settings, run, until="train")
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["objective={kind: triplet}", "batches.negatives=0"],
        ["objective={kind: infonce, in_batch_negatives: false}", "batches.negatives=0"],
        ["objective={kind: infonce, score_mask: {rule: cut, margin: -1.0}}"],
        ["objective={kind: infonce, source_weights: {pairs: 0.0}}"],
        ["training.averaged_batches=16", "batches.negatives=0"],
    ],
)
def test_settings_that_leave_nothing_to_learn(toy_recipe: Path, tmp_path: Path, settings: list[str]) -> None:
    refused(toy_recipe, settings, tmp_path / "run", "nothing can be learnt from these batches")


def test_data_that_teach_nothing(tiny_model: Path, tmp_path: Path) -> None:
    nothing = "nothing can be learnt from these batches"
    cases = {
        "scores": (rows_of(score=0.5), GRADED, "objective={kind: cosent}", nothing),
        "weights": (rows_of(weight=0.0), PAIRS, "objective={kind: infonce}", nothing),
        "twice": ([{**row, "n": row["b"]} for row in rows_of()], PAIRS[:-1] + ", negatives: n}", "objective={kind: infonce, in_batch_negatives: false}", nothing),
    }  # fmt: skip
    for name, (rows, examples, objective, match) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_toy_recipe(folder, tiny_model, write_rows(folder, rows, examples, name == "weights"))
        refused(recipe, [objective], folder / "run", match)


def test_a_prompt_that_leaves_no_room_for_the_text(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path, rows_of(), PAIRS)
    prompt = " ".join(f"word{n}" for n in range(30))
    data.write_text(data.read_text() + f"    prompts: {{query: '{prompt} '}}\n")
    recipe = write_toy_recipe(tmp_path, tiny_model, data)
    settings = ["training.max_length=16"]
    refused(recipe, settings, tmp_path / "run", "the prompt takes all that is read of a text")
    rows = [{"a": f"zzz{n}", "b": f"yyy{n}"} for n in range(40)]
    (tmp_path / "unknown").mkdir()
    recipe = write_toy_recipe(tmp_path / "unknown", tiny_model, write_rows(tmp_path / "unknown", rows, PAIRS))
    refused(recipe, [], tmp_path / "unknown" / "run", "the tokenizer knows none of their words")


def test_scores_beyond_a_cosine_and_negatives_that_are_not_there(tiny_model: Path, tmp_path: Path) -> None:
    rows = rows_of()
    for row in rows:
        row["score"] = 5 * row["score"]
    recipe = write_toy_recipe(tmp_path, tiny_model, write_rows(tmp_path, rows, GRADED))
    settings = ["objective={kind: cosine_regression}", "training.max_steps=1"]
    found = nearfield.dry_run(recipe, settings, tmp_path / "run")
    assert found is not None and found.would_start, [n for n in found.notices if n.blocks]
    [said] = [notice for notice in found.notices if notice.code == "scores-out-of-range"]
    assert "31 of 40 scores (from 0 to 4.875) are beyond what cosine_regression can give (-1 to 1)" in said.what
    nearfield.train(recipe, settings, tmp_path / "run", until="train")
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["notices"]
    assert said.to_json() in kept
    assert said.what in (tmp_path / "run" / "model" / "README.md").read_text()
    with pytest.raises(BadInputError, match="can give"):
        nearfield.train(recipe, settings, tmp_path / "strict", until="train", strict=True)
    alike = [{**row, "score": 1.0} for row in rows]
    (tmp_path / "alike").mkdir()
    recipe = write_toy_recipe(tmp_path / "alike", tiny_model, write_rows(tmp_path / "alike", alike, GRADED))
    found = nearfield.dry_run(recipe, settings, tmp_path / "alike" / "run")
    assert found is not None and "scores-all-equal" in {notice.code for notice in found.notices}
    (tmp_path / "pairs").mkdir()
    recipe = write_toy_recipe(tmp_path / "pairs", tiny_model, write_rows(tmp_path / "pairs", rows_of(), PAIRS))
    found = nearfield.dry_run(recipe, ["batches.negatives=3"], tmp_path / "pairs" / "run")
    assert found is not None
    [said] = [notice for notice in found.notices if notice.code == "negatives-missing"]
    assert "asks for 3 a query, and of 32 examples none has any" in said.what


def test_a_gradient_of_exactly_0_stops_a_run() -> None:
    watch = GradientWatch(0, [0] * 100)
    for _ in range(diagnostics.STEPS - 1):
        watch.see(0.0)
    with pytest.raises(BadInputError, match="the gradient of the first 10 steps is exactly 0"):
        watch.see(0.0)
    watch = GradientWatch(0, [0] * 100)
    for norm in [0.0] * 9 + [1e-30] + [0.0] * 50:
        watch.see(norm)
    watch = GradientWatch(50, [0] * 100)
    for _ in range(50):
        watch.see(0.0)
    watch = GradientWatch(0, [0, 0])
    watch.see(0.0)
    with pytest.raises(BadInputError, match="first 2 steps"):
        watch.see(0.0)


def test_a_run_waits_for_a_batch_of_each_source() -> None:
    """A source of weight 0 may come first, and often."""
    watch = GradientWatch(0, [0] * 20 + [1, 0, 0])
    for norm in [0.0] * 20 + [0.5, 0.0, 0.0]:
        watch.see(norm)
    for sources, stops in (([0] * 20 + [1, 0, 0], 21), ([1] + [0] * 30, 10), ([0] * 4, 4)):
        watch = GradientWatch(0, sources)
        for _ in range(stops - 1):
            watch.see(0.0)
        with pytest.raises(BadInputError, match=f"first {stops} steps"):
            watch.see(0.0)


def test_a_run_whose_gradient_is_0_ends(toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A margin that every triplet keeps: what the data show is not the reason."""
    from nearfield.pipeline.training import TrainStage

    monkeypatch.setattr(TrainStage, "teaching_notices", lambda self, model, data, plans: [])
    settings = ["objective={kind: triplet}", "batches.negatives=0"]
    with pytest.raises(BadInputError, match="the gradient of the first 10 steps is exactly 0"):
        nearfield.train(toy_recipe, settings, tmp_path / "run", until="train")
    assert not (tmp_path / "run" / "model").exists()
    found = nearfield.dry_run(toy_recipe, settings, tmp_path / "dry")
    assert found is not None and not found.would_start
    assert "gradient-zero" in {notice.code for notice in found.notices}


def test_a_verdict_of_chance_wants_a_loss_that_never_moved() -> None:
    for shares, said in (
        ([1.0] * 24, 1),
        ([0.99, 1.01] * 12, 1),
        ([1.0] * 12 + [0.9] * 12, 0),
        ([1.0] * 8, 0),
        ([0.5] * 24, 0),
    ):
        assert len(list(ChanceWatch(24, list(shares)).notices())) == said
    assert sum(ChanceWatch(1000).wants(step) for step in range(1000)) in range(diagnostics.LOOKS, diagnostics.LOOKS + 2)


def test_a_loss_at_chance_that_never_moves_is_said(toy_recipe: Path, tmp_path: Path) -> None:
    toy_recipe.write_text(toy_recipe.read_text().replace("max_steps: 12", "max_steps: 16"))
    still = ["training.learning_rate=1.0e-12", "training.dropout=false", "objective.temperature=100.0"]
    nearfield.train(toy_recipe, still, tmp_path / "run", until="train")
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["notices"]
    assert "loss-at-chance" in {one["code"] for one in kept}
    assert "the loss was at chance" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_source_of_mixed_batches_that_teaches_nothing_is_said(tiny_model: Path, tmp_path: Path) -> None:
    """Its examples have no negatives, and those of the source beside them are none of theirs."""
    data = write_rows(tmp_path, rows_of(), PAIRS)
    text = data.read_text()
    (tmp_path / "more.jsonl").write_text(
        "".join(
            json.dumps({**row, "a": f"{row['a']} word9", "n": f"word{n} word8"}) + "\n"
            for n, row in enumerate(rows_of())
        )
    )
    second = text[text.index("  - name:") :].replace("name: pairs", "name: more").replace("rows.jsonl", "more.jsonl")
    data.write_text(text + second.replace(PAIRS, PAIRS[:-1] + ", negatives: n}"))
    recipe = write_toy_recipe(tmp_path, tiny_model, data)
    settings = ["objective={kind: infonce, in_batch_negatives: false}", "batches.kind=shuffled"]
    found = nearfield.dry_run(recipe, settings, tmp_path / "run")
    assert found is not None and found.would_start
    said = [notice.what for notice in found.notices if notice.code == "source-teaches-nothing"]
    assert len(said) == 1 and said[0].startswith("pairs: ")


class _Plan:
    """Batches by the sources of their examples."""

    def __init__(self, *batches: list[int]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def column(self, name: str) -> Any:
        rows = [(step, source) for step, sources in enumerate(self.batches) for source in sources]
        return np.array(rows)[:, ("step", "source").index(name)]


def test_each_source_is_looked_at_in_batches_that_have_it() -> None:
    """Of mixed batches most may have nothing of a small source."""
    plans: Any = [_Plan([0, 0], [1, 1], [0, 1]), _Plan([2, 2], [0, 0])]
    assert diagnostics.batches_by_source(plans) == {
        0: [(0, 0, 0), (0, 2, 2), (1, 1, 4)],
        1: [(0, 1, 1), (0, 2, 2)],
        2: [(1, 0, 3)],
    }


def test_a_source_that_teaches_nothing_and_comes_first_stops_no_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "STEPS", 2)
    rows = rows_of(160)
    for number, row in enumerate(rows):
        row["a"] = f"{row['a']} word{number}"
    data = write_rows(tmp_path, rows, PAIRS)
    text = data.read_text()
    (tmp_path / "few.jsonl").write_text(
        (tmp_path / "rows.jsonl").read_text().replace('"a": "', '"a": "word3 ')[:4000].rpartition("\n")[0] + "\n"
    )
    few = text[text.index("  - name:") :].replace("name: pairs", "name: few").replace("rows.jsonl", "few.jsonl")
    data.write_text(text + few)
    recipe = write_toy_recipe(tmp_path, tiny_model, data)
    settings = ["objective={kind: infonce, source_weights: {pairs: 0.0}}", "training.max_steps=12"]
    found = nearfield.dry_run(recipe, settings, tmp_path / "dry")
    assert found is not None and found.would_start, found.notices
    nearfield.train(recipe, settings, tmp_path / "run", until="train")
    norms = [line["gradient_norm"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert norms[:2] == [0.0, 0.0] and any(norms), "else the order of batches makes the test say nothing"


def test_scores_that_the_model_cannot_get_are_found_before_the_training(
    toy_recipe: Path, tmp_path: Path, toy_data: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"name: toy\ntasks: [{{kind: heldout, name: Toy, data: {toy_data}, source: pairs}}]\n")
    settings = [f"evaluation={{suite: {suite}, dimensions: [8, 64]}}"]
    found = nearfield.dry_run(toy_recipe, settings, tmp_path / "run")
    assert found is not None and not found.would_start
    with pytest.raises(BadInputError, match="asks for 64 dimensions, and the model has 32"):
        nearfield.train(toy_recipe, settings, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_two_views_of_a_model_without_dropout_are_said(toy_recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps({**config, **still}))
    for model, more, wanted in ((base, (), 1), (base, ("training.attention_dropout=0.3",), 0), (tiny_model, (), 0)):
        settings = ["objective={kind: simcse}", f"encoder.model={model}", *more]
        found = nearfield.dry_run(toy_recipe, settings, tmp_path / "run")
        assert found is not None and found.would_start
        assert sum(notice.code == "views-alike" for notice in found.notices) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        ["training.learning_rate=1e-30"],
        ["training.learning_rate=1e-11", "training.precision=bf16-pure"],
        ["training.max_gradient_norm=1e-30", "training.optimizer={kind: sgd}"],
    ],
)
def test_weights_that_never_moved_are_said(toy_recipe: Path, tmp_path: Path, settings: list[str]) -> None:
    """The gradient is there, and what is added to each weight is rounded away, or as good as nothing."""
    nearfield.train(toy_recipe, [*settings, "training.max_steps=2"], tmp_path / "run", until="train")
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["notices"]
    (said,) = [one["what"] for one in kept if one["code"] == "weights-unchanged"]
    assert said in (tmp_path / "run" / "model" / "README.md").read_text()
    with pytest.raises(BadInputError, match="nothing was learnt"):
        nearfield.train(
            toy_recipe, [*settings, "training.max_steps=2"], tmp_path / "strict", until="train", strict=True
        )


def test_a_tracker_that_is_not_installed_blocks(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = ["training.trackers=[{kind: wandb, project: p}]"]
    refused(toy_recipe, settings, tmp_path / "run", "Weights & Biases is not installed")


def test_labels_that_are_all_the_same_are_said(toy_recipe: Path, tmp_path: Path) -> None:
    """Items of one label are pulled together, which has a gradient and teaches nothing."""
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"t": f"word{i}", "l": "x"}) + "\n" for i in range(24)))
    (tmp_path / "items.yaml").write_text(
        "name: items\nsources:\n  - {name: items, task_type: Classification, reader: {kind: jsonl, path: items.jsonl}, "
        "examples: {kind: labelled, item: t, label: l}, split: {kind: all}}\n"
    )
    settings = [
        f"data={tmp_path / 'items.yaml'}",
        "sources=[items]",
        "objective={kind: supcon}",
        "training.max_steps=2",
        "batches.batch_size=8",
    ]
    found = nearfield.dry_run(toy_recipe, settings, tmp_path / "run")
    assert found is not None and found.would_start
    (said,) = [notice.what for notice in found.notices if notice.code == "labels-all-equal"]
    assert said == "items: all 24 items have the label 'x': there are none to tell apart"


def test_a_tracker_without_a_login_blocks(toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ["training.trackers=[{kind: wandb, project: p}]"]
    refused(toy_recipe, settings, tmp_path / "run", "Weights & Biases has no login")
