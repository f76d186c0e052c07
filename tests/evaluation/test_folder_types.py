"""A folder task of every type scores as a plain class of mteb's with the same data does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mteb.abstasks.task_metadata import TaskMetadata

from nearfield.conformance.tiny_models import WORDS
from nearfield.encoders import LoadedEncoder
from nearfield.evaluation import EvaluationResult, evaluate
from nearfield.evaluation.tasks import TYPES
from tests.data.image_making import noise, saved
from tests.evaluation.test_mocks import Reference

Columns = dict[str, list[Any]]
RNG = np.random.default_rng(0)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS[:60], 6)) for _ in range(count)]


def images(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": saved(noise(first + i, 16, 16)), "path": None} for i in range(count)]


def numbers(count: int, most: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, most, count).tolist()


def retrieval(queries: Columns, corpus: Columns, ranked: bool = False) -> dict[str, Columns]:
    count, documents = len(next(iter(queries.values()))), len(next(iter(corpus.values())))
    parts = {
        "queries": {"id": [f"q{i}" for i in range(count)], **queries},
        "corpus": {"id": [f"d{i}" for i in range(documents)], **corpus},
        "qrels": {
            "query-id": [f"q{i}" for i in range(count) for _ in range(2)],
            "corpus-id": [f"d{j}" for i in range(count) for j in (i, (i + 7) % documents)],
            "score": [1, 2] * count,
        },
    }
    if ranked:
        lists = [[f"d{(i * 3 + j) % documents}" for j in range(9)] + [f"d{i}"] for i in range(count)]
        parts["top_ranked"] = {"query-id": parts["queries"]["id"], "corpus-ids": [sorted(set(of)) for of in lists]}
    return parts


def pairs(count: int, **label: list[Any]) -> dict[str, Columns]:
    return {"test": {"sentence1": texts(count, 1), "sentence2": texts(count, 2), **label}}


def labelled(column: str, label: str, of: Callable[[int, int], list[Any]]) -> dict[str, Columns]:
    make = images if column == "image" else texts
    return {
        "train": {column: make(60, 500), label: of(60, 1)},
        "test": {column: make(40, 3), label: of(40, 2)},
    }


TEXT = retrieval({"text": texts(20, 1)}, {"text": texts(30, 2)})
RANKED = retrieval({"text": texts(20, 1)}, {"text": texts(30, 2)}, ranked=True)
INSTRUCTED = retrieval({"text": texts(20, 1), "instruction": texts(20, 5)}, {"text": texts(30, 2)})
TO_IMAGES = retrieval({"text": texts(12, 1)}, {"image": images(20)})
QUESTIONS = retrieval({"image": images(12), "text": texts(12, 1)}, {"text": texts(20, 2)}, ranked=True)
LABELS = ["word1 word2", "word3", "word4 word5 word6"]
DATA: dict[str, tuple[dict[str, Columns], dict[str, Any]]] = {
    "Retrieval": (TEXT, {}),
    "Reranking": (RANKED, {}),
    "InstructionRetrieval": (INSTRUCTED, {}),
    "InstructionReranking": (RANKED, {}),
    "Any2AnyRetrieval": (TO_IMAGES, {"category": "t2i"}),
    "Any2AnyMultilingualRetrieval": (TO_IMAGES, {"category": "t2i"}),
    "Any2AnyReranking": (retrieval({"image": images(9)}, {"text": texts(20)}, ranked=True), {"category": "i2t"}),
    "DocumentUnderstanding": (TO_IMAGES, {"category": "t2i"}),
    "VisionCentricQA": (QUESTIONS, {"category": "it2t"}),
    "STS": (pairs(40, score=[float(n) for n in numbers(40, 6)]), {}),
    "PairClassification": (pairs(40, labels=numbers(40, 2)), {}),
    "BitextMining": (pairs(25), {}),
    "Classification": (labelled("text", "label", lambda n, s: numbers(n, 3, s)), {}),
    "MultilabelClassification": (
        labelled("text", "label", lambda n, s: [[k for k in range(3) if (i >> k) & 1] for i in range(n)]),
        {},
    ),
    "Regression": (labelled("text", "value", lambda n, s: [float(v) for v in numbers(n, 50, s)]), {}),
    "Clustering": (
        {"test": {"sentences": texts(25), "labels": numbers(25, 4)}},
        {"max_fraction_of_documents_to_embed": None},
    ),
    "Summarization": (
        {
            "test": {
                "text": texts(8),
                "human_summaries": [texts(2, i) for i in range(8)],
                "machine_summaries": [texts(4, 20 + i) for i in range(8)],
                "relevance": [[float(v) for v in numbers(4, 5, i)] for i in range(8)],
            }
        },
        {"min_score": 0, "max_score": 5},
    ),
    "ImageClassification": (
        labelled("image", "label", lambda n, s: numbers(n, 3, s)),
        {"input_column_name": "image"},
    ),
    "ImageClustering": (
        {"test": {"image": images(25), "labels": numbers(25, 4)}},
        {"input_column_name": "image", "max_fraction_of_documents_to_embed": None},
    ),
    "ZeroShotClassification": (
        {"test": {"image": images(25), "label": numbers(25, 3)}},
        {"get_candidate_labels": lambda self: LABELS},
    ),
    "VisualSTS(eng)": ({"test": {"sentence1": images(20), "sentence2": images(20, 50), "score": numbers(20, 6)}}, {}),
    "VisualSTS(multi)": ({"test": {"sentence1": images(20), "sentence2": images(20, 50), "score": numbers(20, 6)}}, {}),
    "Compositionality": (
        {
            "test": {
                "image_0": images(9),
                "image_1": images(9, 30),
                "caption_0": texts(9),
                "caption_1": texts(9, 4),
            }
        },
        {"images_column_names": ["image_0", "image_1"], "texts_column_names": ["caption_0", "caption_1"]},
    ),
}
META = {"ZeroShotClassification": {"candidate_labels": LABELS}, "Summarization": {"min_score": 0, "max_score": 5}}
"""The statements of the folder's description beside task, type, split and subsets."""


def write(folder: Path, task_type: str, **more: Any) -> Path:
    """The folder of a type's data."""
    folder.mkdir(parents=True)
    parts, _ = DATA[task_type]
    splits = [part for part in parts if part == "train"]
    meta = {"task": "Mine", "type": task_type, "split": "test", "subsets": ["default"], "extra_splits": splits}
    (folder / "meta.json").write_text(json.dumps({**meta, **META.get(task_type, {}), **more}))
    for part, columns in parts.items():
        stem = f"default.{part}" if part in ("train", "test") else f"default.test.{part}"
        pq.write_table(pa.table(columns), folder / f"{stem}.parquet")
    return folder


def dataset(columns: Columns) -> Any:
    data = datasets.Dataset.from_dict(columns)
    for name, values in columns.items():
        if isinstance(values[0], dict):
            data = data.cast_column(name, datasets.Image())
    return data


def plain(task_type: str) -> Any:
    """mteb's class of a type with the data in it, and nothing of ours."""
    parts, settings = DATA[task_type]
    defaults = TYPES[task_type]
    category = settings.get("category", defaults.category)
    letters = {"t": "text", "i": "image"}
    metadata = TaskMetadata(
        name="Mine",
        type=task_type,
        description="",
        dataset={"path": "x", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=defaults.main_score,
        category=category,
        modalities=list(dict.fromkeys(letters[c] for c in category if c in letters)),
    )

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        if "qrels" in parts:
            relevant: dict[str, dict[str, int]] = {}
            for query, document, score in zip(*parts["qrels"].values(), strict=True):
                relevant.setdefault(query, {})[document] = score
            ranked = parts.get("top_ranked")
            split = {name: dataset(parts[name]) for name in ("corpus", "queries")}
            split |= {"relevant_docs": relevant}
            split |= {"top_ranked": None if ranked is None else dict(zip(*ranked.values(), strict=True))}
            self.dataset = {"default": {"test": split}}
        else:
            self.dataset = datasets.DatasetDict({name: dataset(columns) for name, columns in parts.items()})
        self.data_loaded = True

    body = {key: value for key, value in settings.items() if key != "category"}
    return type("Plain", (defaults.base,), {"metadata": metadata, "load_data": load_data, **body})()


@pytest.fixture(scope="module")
def result(picture_model: LoadedEncoder, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    root = tmp_path_factory.mktemp("folders")
    for number, task_type in enumerate(TYPES):
        write(root / f"{number:02d}", task_type, task=f"Mine{number}")
    return evaluate(picture_model, root, tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("task_type", list(TYPES))
def test_a_folder_scores_as_the_plain_class(
    task_type: str, picture_model: LoadedEncoder, result: EvaluationResult
) -> None:
    name = f"Mine{list(TYPES).index(task_type)}"
    assert name not in result.failures and name not in result.not_applicable
    theirs = mteb.evaluate(
        Reference(picture_model), plain(task_type), cache=None, show_progress_bar=False, co2_tracker=False
    )
    wanted = theirs.task_results[0].scores["test"][0]["main_score"]
    assert result.scores[name]["default"] == pytest.approx(wanted, abs=1e-6)
    assert result.notices.get(name, ()) == ()
