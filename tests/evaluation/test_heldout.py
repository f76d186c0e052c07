"""Held-out splits as tasks: every sense is relevant, distractors are recorded, synonyms are one cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nearfield.data import DataConfig, Store, prepare_store
from nearfield.errors import BadInputError
from nearfield.evaluation import HeldOutTask, SuiteConfig, evaluate
from nearfield.evaluation.results import read_units
from nearfield.evaluation.tasks import heldout_task, query_clusters

# bank and shore share a gloss; bank has a second sense in the train split; mole has two senses in the test split.
RETRIEVAL = [
    ("bank", "the land beside a river", "s1", "test"),
    ("shore", "the land beside a river", "s1", "test"),
    ("coin", "a round piece of metal money", "s2", "test"),
    ("mole", "a small animal that digs", "s3", "test"),
    ("mole", "a dark spot on the skin", "s4", "test"),
    ("spot", "a dark spot on the skin", "s4", "test"),
    ("bank", "a house that keeps money for people", "s5", "train"),
    ("vault", "a house that keeps money for people", "s5", "train"),
    *((f"noun{i}", f"an unrelated thing number {i}", f"t{i}", "train") for i in range(30)),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, some_sentences: Callable[..., list[str]]) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    with (folder / "gloss.jsonl").open("w") as file:
        for query, gloss, synset, split in RETRIEVAL:
            file.write(json.dumps({"query": query, "gloss": gloss, "synset": synset, "split": split}) + "\n")
    texts = some_sentences(120, seed=20)
    with (folder / "graded.jsonl").open("w") as file:
        for i in range(30):
            row = {"a": texts[i], "b": texts[30 + i], "score": i % 5 / 5, "key": f"k{i // 3}", "split": "test"}
            file.write(json.dumps(row) + "\n")
    with (folder / "labels.jsonl").open("w") as file:
        for i, text in enumerate(texts[60:]):
            split = "test" if i % 3 == 0 else "train"
            file.write(json.dumps({"text": text, "label": "ab"[len(text) % 2], "split": split}) + "\n")
    path = folder / "data.yaml"
    path.write_text(
        """\
name: small
sources:
  - name: gloss
    task_type: Retrieval
    reader: {kind: jsonl, path: gloss.jsonl}
    examples: {kind: retrieval, query: query, positives: gloss}
    cluster: synset
    split: {kind: column, column: split}
  - name: graded
    task_type: STS
    reader: {kind: jsonl, path: graded.jsonl}
    examples: {kind: graded, first: a, second: b, score: score, scale: [0, 1]}
    cluster: key
    split: {kind: column, column: split}
  - name: labels
    task_type: Classification
    reader: {kind: jsonl, path: labels.jsonl}
    examples: {kind: labelled, item: text, label: label}
    split: {kind: column, column: split}
"""
    )
    return path


@pytest.fixture(scope="module")
def open_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Store]:
    cache = tmp_path_factory.mktemp("cache")
    return lambda path: prepare_store(DataConfig.load(path), cache)


def settings(recipe: Path, **changes: Any) -> HeldOutTask:
    return HeldOutTask(**{"name": "Held", "data": recipe, "source": "gloss", "distractors": 10, **changes})


def loaded(task: Any) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    task.load_data()
    split = task.dataset["default"]["test"]
    texts = [dict(zip(split[part]["id"], split[part]["text"], strict=True)) for part in ("queries", "corpus")]
    return texts[0], texts[1], split["relevant_docs"]


def test_every_sense_in_the_corpus_is_relevant(recipe: Path, open_store: Any) -> None:
    held = heldout_task(settings(recipe, distractors=1000), open_store)
    queries, corpus, relevant = loaded(held.task)
    assert sorted(queries.values()) == ["bank", "coin", "mole", "shore", "spot"]
    assert len(corpus) == 4 + 31 and held.details["distractors"] == 31 and held.details["distractors_asked"] == 1000
    glosses = {queries[q]: sorted(corpus[d] for d in documents) for q, documents in relevant.items()}
    assert glosses["bank"] == ["a house that keeps money for people", "the land beside a river"]
    assert glosses["mole"] == ["a dark spot on the skin", "a small animal that digs"]
    assert glosses["shore"] == ["the land beside a river"]


def test_synonyms_and_their_senses_are_one_cluster(recipe: Path, open_store: Any) -> None:
    held = heldout_task(settings(recipe), open_store)
    queries, _, _ = loaded(held.task)
    clusters = {queries[q]: c for q, c in held.clusters["default", "test"].items()}
    assert clusters["bank"] == clusters["shore"] and clusters["mole"] == clusters["spot"]
    assert len(set(clusters.values())) == 3
    assert (held.details["clusters"], held.details["largest_cluster"]) == (3, 2)


def test_clusters_without_keys_are_shared_documents() -> None:
    relevant = {1: [10, 11], 2: [11], 3: [12], 4: [13, 12], 5: [14]}
    assert query_clusters(relevant, {}) == {1: 1, 2: 1, 3: 3, 4: 3, 5: 5}
    assert query_clusters(relevant, {14: {"k"}, 10: {"k"}}) == {1: 1, 2: 1, 3: 3, 4: 3, 5: 1}


def test_samples_depend_on_the_seed_alone(recipe: Path, open_store: Any) -> None:
    first, again = (heldout_task(settings(recipe), open_store).task.metadata.revision for _ in range(2))
    other = heldout_task(settings(recipe, seed=1), open_store).task.metadata.revision
    assert first == again != other and first.startswith("local-")
    few = heldout_task(settings(recipe, max_queries=2), open_store)
    assert few.details["queries"] == 2 and len(loaded(few.task)[0]) == 2


def test_every_kind_of_source_is_scored(recipe: Path, open_store: Any, model_folder: Path, tmp_path: Path) -> None:
    suite = SuiteConfig(
        name="small",
        tasks=[
            settings(recipe),
            settings(recipe, name="HeldSTS", source="graded"),
            settings(recipe, name="HeldLabels", source="labels"),
            settings(recipe, name="HeldClusters", source="labels", **{"as": "clustering"}),
        ],
    )
    result = evaluate(str(model_folder), suite, tmp_path / "results", open_store=open_store)
    assert result.failures == {} and set(result.scores) == {"Held", "HeldSTS", "HeldLabels", "HeldClusters"}
    assert result.details["Held"]["largest_cluster"] == 2
    table, metadata = read_units(result.results_dir, "Held")
    assert set(table["cluster"].to_pylist()) - {None} and metadata["details"]["distractors"] == 10
    pairs = read_units(result.results_dir, "HeldSTS")[0].to_pandas()
    assert pairs.cluster.nunique() == 10 and len(pairs) == 60
    again = evaluate(str(model_folder), suite, tmp_path / "results", open_store=open_store)
    assert len(again.reused) == 4 and again.details == result.details


def test_a_result_with_other_clusters_is_not_reused(
    recipe: Path, model_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "data.yaml"
    for file in recipe.parent.glob("*.jsonl"):
        (other.parent / file.name).symlink_to(file)
    other.write_text(recipe.read_text().replace("cluster: synset", "cluster: query"))

    def run(path: Path) -> Any:
        suite = SuiteConfig(name="small", tasks=[settings(path)])
        return evaluate(
            str(model_folder),
            suite,
            tmp_path / "results",
            open_store=lambda data: prepare_store(data, tmp_path / "cache"),
        )

    first, second, third = run(recipe), run(other), run(other)
    assert first.scores == second.scores and second.reused == () and third.reused == ("Held",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "glosses"}, "Sources: gloss, graded, labels"),
        ({"split": "dev"}, "Splits: test, train"),
        ({"as": "clustering"}, "needs labelled examples"),
        ({"source": "labels", "train_split": "fit"}, "train split 'fit'"),
    ],
)
def test_what_cannot_be_held_out_is_bad_input(recipe: Path, open_store: Any, changes: Any, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        heldout_task(settings(recipe, **changes), open_store)
    assert message in str(caught.value) and "data.yaml" in str(caught.value)
