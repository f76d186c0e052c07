"""From a store to plans: examples of all kinds as columns, plans and their summary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nearfield.batching import KMeansStrataConfig, SingleSourceConfig
from nearfield.batching.plan import Plan
from nearfield.data import Store, prepare_store
from nearfield.files import hash_file, read_json
from nearfield.pipeline.mining import items_by_role
from nearfield.pipeline.planning import PlanInputs, read_examples, write_plans
from tests.batching.making import make_vectors

RECIPE = """\
name: kinds
sources:
  - name: topics
    task_type: Classification
    reader: {kind: jsonl, path: topics.jsonl}
    examples: {kind: labelled, item: text, label: topic}
    split: {kind: all}
  - name: similar
    task_type: STS
    reader: {kind: jsonl, path: similar.jsonl}
    examples: {kind: graded, first: one, second: two, score: score}
    split: {kind: all}
  - name: moods
    task_type: Classification
    reader: {kind: jsonl, path: moods.jsonl}
    examples: {kind: labelled, item: text, label: topic}
    split: {kind: all}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "kinds.yaml").write_text(RECIPE)
    topics = [{"text": f"text {n}", "topic": ["sport", "art", "food"][n % 3]} for n in range(30)]
    moods = [{"text": f"mood {n}", "topic": ["sport", "calm"][n % 2]} for n in range(10)]
    similar = [{"one": f"left {n}", "two": f"right {n}", "score": n / 20} for n in range(20)]
    for name, rows in (("topics", topics), ("moods", moods), ("similar", similar)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_store(folder / "kinds.yaml", folder / "cache")


def test_labels_are_numbers_of_their_source(store: Store) -> None:
    (topics, moods), labels = read_examples(store, ["topics", "moods"], "train")
    assert labels == [("topics", "art"), ("topics", "food"), ("topics", "sport"), ("moods", "calm"), ("moods", "sport")]
    assert topics.labels is not None and moods.labels is not None
    for source in (topics, moods):
        assert source.labels is not None
        texts = store.examples.take(source.examples)["label"].to_pylist()
        assert [labels[label] for label in source.labels.tolist()] == [(source.name, text) for text in texts]
    assert set(items_by_role(store, ["topics"], "train")["document"].tolist()) == set(topics.queries.tolist())


def test_plans_of_labelled_and_graded_examples(store: Store, tmp_path: Path) -> None:
    names = ["topics", "similar", "moods"]
    sources, labels = read_examples(store, names, "train")
    prompts = {source.source: (0, 1) for source in sources}
    config = SingleSourceConfig(batch_size=4)
    inputs = PlanInputs(sources, labels, prompts, lambda prompt, items: items % 3 + prompt, store, make_vectors())
    for folder in ("one", "again"):
        (tmp_path / folder).mkdir()
        whole = write_plans(tmp_path / folder, config, inputs, seed=1, epochs=2, max_steps=None, metadata={"data": "x"})
    assert read_json(tmp_path / "one" / "summary.json") == json.loads(json.dumps(whole))
    assert whole["steps"] == 2 * (7 + 5 + 2)
    for number, epoch in enumerate(whole["epochs"]):
        assert epoch["batches_by_source"] == {"topics": 7, "similar": 5, "moods": 2}
        assert epoch["exceptions"]["repeated_items"] == 0
        assert epoch["hardness"]["batches"] == 14
        file = f"epoch-{number:03d}.parquet"
        assert epoch["hash"] == hash_file(tmp_path / "one" / file) == hash_file(tmp_path / "again" / file)
    plan = Plan(tmp_path / "one" / "epoch-000.parquet")
    assert plan.metadata["data"] == "x"
    assert [tuple(label) for label in plan.metadata["labels"]] == labels
    label_of = dict(
        zip(sources[0].queries.tolist(), (sources[0].labels if sources[0].labels is not None else []), strict=True)
    )
    for step in range(len(plan)):
        batch = plan.batch(step)
        assert batch.score is not None and batch.label is not None
        if batch.source == store.source_number("similar"):
            assert (batch.label == -1).all()
            scores = store.examples.take(batch.example)["score"].to_pylist()
            assert batch.score.tolist() == scores
        else:
            assert np.isnan(batch.score).all()
        if batch.source == store.source_number("topics"):
            for label, positives in zip(batch.label.tolist(), batch.positives, strict=True):
                assert [label_of[item] for item in positives.tolist()] == [label]


def test_it_ends_where_the_training_does(store: Store, tmp_path: Path) -> None:
    sources, labels = read_examples(store, ["similar"], "train")
    inputs = PlanInputs(sources, labels, {sources[0].source: (0, 0)}, lambda prompt, items: items, store)
    whole = write_plans(tmp_path, SingleSourceConfig(batch_size=4), inputs, seed=1, epochs=9, max_steps=6, metadata={})
    assert len(whole["epochs"]) == 2
    assert "hardness" not in whole["epochs"][0]


def test_clusters_of_labelled_examples(store: Store, tmp_path: Path) -> None:
    sources, labels = read_examples(store, ["topics"], "train")
    inputs = PlanInputs(
        sources, labels, {sources[0].source: (0, 0)}, lambda prompt, items: items, store, make_vectors()
    )
    config = KMeansStrataConfig(batch_size=4, clusters=3)
    whole = write_plans(tmp_path, config, inputs, seed=1, epochs=1, max_steps=None, metadata={})
    about = whole["epochs"][0]["planner"]["strata"]["topics"]
    assert sum(about["sizes"]) == 30 and len(about["sizes"]) == about["clusters"]
