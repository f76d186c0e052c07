"""The texts of a suite: all sides of all splits that are scored, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfield.data.decontaminate import BenchmarkText
from nearfield.errors import BadInputError
from nearfield.evaluation import FolderTasks, SuiteConfig
from nearfield.evaluation.config import open_suite
from nearfield.evaluation.tasks import TYPES, describe_task, make_task
from nearfield.evaluation.texts import benchmark_tasks, task_texts

SHARED = Path(__file__).parents[3] / "shared" / "data"


def made(task_type: str, data: dict[str, object], splits: tuple[str, ...] = ("test",), **changes: object) -> object:
    languages = changes.pop("languages", {"default": ["eng-Latn"]})
    metadata = describe_task("Made", task_type, "", "0", languages=languages, splits=splits)  # type: ignore[arg-type]
    return make_task(TYPES[task_type].base, metadata, lambda: data)


def texts_of(task: object) -> list[tuple[str, str]]:
    return [(text.role, text.text) for text in task_texts(task)]


def test_retrieval_tasks_have_queries_documents_and_distractors() -> None:
    import datasets

    split = {
        "queries": datasets.Dataset.from_dict({"id": ["q1", "q2"], "text": ["first", "second"]}),
        "corpus": datasets.Dataset.from_dict(
            {"id": ["a", "b", "c"], "title": ["Title", "", "T"], "text": ["body", "unread", "no"]}
        ),
        "relevant_docs": {"q1": {"a": 1, "c": 0}},
        "top_ranked": None,
    }
    task = made("Retrieval", {"default": {"test": split, "dev": split}})
    assert texts_of(task) == [
        ("query", "first"),
        ("query", "second"),
        ("document", "Title body"),
        ("document", "body"),
        ("distractor", "unread"),
        ("distractor", "T no"),
        ("distractor", "no"),
    ]
    assert not task.data_loaded  # type: ignore[attr-defined]


def test_pairs_and_items_have_all_their_texts_and_no_labels() -> None:
    import datasets

    pairs = datasets.Dataset.from_dict({"sentence1": ["a", " "], "sentence2": ["b", "c"], "score": [1.0, 2.0]})
    assert texts_of(made("STS", {"test": pairs, "train": pairs})) == [("text", "a"), ("text", "b"), ("text", "c")]
    items = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"text": [split], "label": ["joy"]}) for split in ("train", "test")}
    )
    assert texts_of(made("Classification", {"default": items})) == [("text", "test")]
    nested = datasets.Dataset.from_dict({"sentences": [["one", "two"]], "labels": [["x", "y"]]})
    assert texts_of(made("Clustering", {"test": nested})) == [("text", "one"), ("text", "two")]


def test_all_subsets_and_splits_that_are_scored() -> None:
    import datasets

    def side(name: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"sentence1": [name], "sentence2": [name + "'"]})

    data = {lang: {split: side(f"{lang} {split}") for split in ("dev", "test", "train")} for lang in ("de", "fr")}
    task = made("BitextMining", data, ("dev", "test"), languages={"de": ["deu-Latn"], "fr": ["fra-Latn"]})
    found = texts_of(task)
    assert len(found) == 8
    assert not any("train" in text for _, text in found)


def test_data_that_cannot_be_loaded_are_bad_input() -> None:
    def fail() -> dict[str, object]:
        raise ConnectionError("no route")

    task = made("STS", {})
    task.load_data = fail  # type: ignore[attr-defined]
    with pytest.raises(BadInputError, match="cannot be loaded"):
        list(task_texts(task))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared benchmark data are not here")
def test_every_task_at_hand_has_the_texts_that_it_states() -> None:
    """The counts of real tasks of every type."""
    import pyarrow.parquet as pq

    suite = SuiteConfig(
        name="shared",
        tasks=[FolderTasks(path=SHARED, only=["SciFact", "STS12", "Banking77Classification", "WikiQA-rerank"])],
    )
    for task in benchmark_tasks(open_suite(suite)):
        texts: list[BenchmarkText] = list(task.texts())
        folder = SHARED / task.name
        wanted = 0
        for file in folder.glob("default.test*.parquet"):
            columns = set(pq.read_schema(file).names) & {"text", "sentence1", "sentence2"}
            table = pq.read_table(file, columns=sorted(columns)).to_pydict()
            wanted += sum(bool(text and not text.isspace()) for column in table.values() for text in column)
        assert len({(text.role, text.id) for text in texts}) == wanted
