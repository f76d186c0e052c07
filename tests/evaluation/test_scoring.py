"""Vectors that are not finite and labels that a type does not know fail a task; what a score leaves out is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.arrow_dataset import Column

from nearfield.encoders import LoadedEncoder, load_encoder
from nearfield.errors import BadInputError
from nearfield.evaluation import EvaluationResult, MtebTasks, SuiteConfig, evaluate, open_model
from nearfield.evaluation.config import open_suite
from nearfield.evaluation.folder import folder_task
from nearfield.evaluation.runner import DuringTraining
from nearfield.evaluation.scoring import read_columns_whole
from nearfield.evaluation.tasks import fresh_generators
from tests.evaluation.conftest import sentences
from tests.evaluation.test_folder_types import write


def broken(folder: Path, value: float) -> LoadedEncoder:
    """A model that makes vectors with ``value`` of all texts with a word that begins with "w"."""
    loaded = load_encoder(str(folder), device="cpu")
    model: Any = loaded.model
    number = model.tokenizer.convert_tokens_to_ids("w")
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight[number] = value
    return loaded


def zeroed(folder: Path) -> LoadedEncoder:
    """A model that gives every text that begins with "w" a vector of zeros."""
    loaded = load_encoder(str(folder), device="cpu")
    model: Any = loaded.model
    number = model.tokenizer.convert_tokens_to_ids("w")

    def silence(module: Any, arguments: Any, features: Any) -> Any:
        first = features["input_ids"][:, 1] == number
        features["sentence_embedding"] = features["sentence_embedding"] * ~first[:, None]
        return features

    model[1].register_forward_hook(silence)
    return loaded


@pytest.mark.parametrize("how", [{}, {"quantize": "binary"}, {"quantize": "int8"}, {"dimensions": 8}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_fail_a_task_that_counts_them(
    tasks: Any, model_folder: Path, tmp_path: Path, how: dict[str, Any], value: float
) -> None:
    folder = tasks.sts()
    texts = pq.read_table(folder / "default.test.parquet")["sentence1"].to_pylist()
    bad = sum(any(word.startswith("w") for word in text.split()) for text in texts)
    scored = open_model(broken(model_folder, value), name="a/b", cache=tmp_path / "cache", **how)
    result = evaluate(scored, folder, tmp_path / "out")
    assert result.scores == {}
    assert f"{bad} of 40 texts have vectors that are not finite" in result.failures["TinySTS"]
    # Nothing of them is kept.
    kept = [np.load(file) for file in (tmp_path / "cache").rglob("vectors.npy")]
    assert kept and all(np.isfinite(vectors).all() for vectors in kept)


def test_every_type_fails_and_none_of_their_scores_is_written(
    every_type: Path, model_folder: Path, tmp_path: Path
) -> None:
    result = evaluate(open_model(broken(model_folder, float("nan")), name="a/b"), every_type, tmp_path / "out")
    assert result.scores == {} and len(result.failures) == 7
    assert all("not finite" in reason for reason in result.failures.values())
    assert not list(result.results_dir.glob("*.units.parquet"))


def test_pictures_that_are_not_finite_fail_their_task(picture_model: LoadedEncoder, tmp_path: Path) -> None:
    loaded = copy.deepcopy(picture_model)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "patch" in name:
                parameter.fill_(float("nan"))
    result = evaluate(loaded, write(tmp_path / "folder", "ImageClustering"), tmp_path / "out")
    assert "25 of 25 items have vectors that are not finite" in result.failures["Mine"]


def test_zero_vectors_are_said_with_the_score(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.sts()
    columns = pq.read_table(folder / "default.test.parquet").to_pydict()
    zero = sum(text.startswith("w") for name in ("sentence1", "sentence2") for text in columns[name])
    assert zero
    loaded = zeroed(model_folder)
    result = evaluate(open_model(loaded, name="a/b"), folder, tmp_path / "out")
    assert set(result.scores) == {"TinySTS"}
    (notice,) = [notice for notice in result.notices["TinySTS"] if notice.code == "zero-vectors"]
    assert f"{zero} of 80 vectors are zero" in notice.what
    fine = evaluate(str(model_folder), folder, tmp_path / "out")
    assert fine.notices == {}


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (1e30, "zero-vectors", "80 of 80 vectors are zero, or of a length that float32 cannot hold"),
        (1e-30, "zero-vectors", "80 of 80 vectors are zero, or of a length that float32 cannot hold"),
        (0.5, "vectors-all-the-same", "all 80 vectors are the same"),
    ],
)
def test_vectors_that_a_cosine_cannot_tell_apart_are_said(
    tasks: Any, model_folder: Path, tmp_path: Path, value: float, code: str, words: str
) -> None:
    """Finite ones: their cosines are 0, or all 1, whatever the texts say."""
    folder, loaded = tasks.sts(), load_encoder(str(model_folder), device="cpu")
    fixed: Any = lambda module, given, features: {  # noqa: E731
        **features,
        "sentence_embedding": torch.full_like(features["sentence_embedding"], value),
    }
    loaded.model[1].register_forward_hook(fixed)
    result = evaluate(open_model(loaded), folder, tmp_path / "out")
    assert words in {notice.code: notice.what for notice in result.notices["TinySTS"]}[code]


def test_both_are_seen_while_a_model_is_trained(tasks: Any, model_folder: Path) -> None:
    model: Any = load_encoder(str(model_folder), device="cpu").model
    scorer = DuringTraining(model, tasks.sts(), name="a/b", metric="mean", contract=None)

    def encode(texts: Any, prompt: str) -> Any:
        return np.asarray(model.encode(list(texts)))

    def part(value: float) -> Callable[..., Any]:
        def made(texts: Any, prompt: str) -> Any:
            vectors = encode(texts, prompt)
            vectors[:2] = value
            return vectors

        return made

    whole = scorer(encode)
    assert scorer.said.all() == {}
    assert scorer(part(0.0))["mean"] != whole["mean"]
    assert [notice.code for notice in scorer.said.of("TinySTS")] == ["zero-vectors"]
    with pytest.raises(BadInputError, match="2 of 40 texts have vectors that are not finite"):
        scorer(part(float("nan")))
    assert scorer(encode) == whole


def rewritten(file: Path, **columns: Any) -> None:
    table = pq.read_table(file).to_pydict()
    pq.write_table(pa.table({**table, **columns}), file)


def stated(folder: Path, **more: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **more}))


def failure(folder: Path, model: Path, out: Path) -> str:
    result: EvaluationResult = evaluate(str(model), folder, out / "out")
    assert result.scores == {} and len(result.failures) == 1
    return next(iter(result.failures.values()))


def test_labels_that_a_type_does_not_document_are_refused(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    pairs = tasks.pairs()
    rewritten(pairs / "default.test.parquet", labels=[i % 3 for i in range(30)])
    assert "10 values of the column 'labels' are not 0 (unlike) or 1 (alike): 2" in failure(
        pairs, model_folder, tmp_path
    )
    rewritten(pairs / "default.test.parquet", labels=[0.5, *[float(i % 2) for i in range(29)]])
    assert "1 value of the column 'labels' is not" in failure(pairs, model_folder, tmp_path)
    sts = tasks.sts()
    rewritten(sts / "default.test.parquet", score=[7.0, -1.0, *[1.0 * (i % 5) for i in range(38)]])
    assert "2 values of the column 'score' are not a number from 0 to 5" in failure(sts, model_folder, tmp_path)
    stated(sts, min_score=-1, max_score=10)
    assert evaluate(str(model_folder), sts, tmp_path / "wide").failures == {}
    retrieval = tasks.retrieval()
    rewritten(retrieval / "default.test.qrels.parquet", score=[0.5] * 25)
    assert "a judgement is a whole number" in failure(retrieval, model_folder, tmp_path)
    classes = tasks.classification()
    rewritten(classes / "default.test.parquet", label=[0.5 + i % 2 for i in range(40)])
    assert "a class: a text or a whole number" in failure(classes, model_folder, tmp_path)


@pytest.mark.parametrize(
    ("task_type", "file", "column", "value", "said"),
    [
        (
            "ZeroShotClassification",
            "test",
            "label",
            3,
            "'label' is not a number from 0 to 2, or one of the 3 candidate",
        ),
        (
            "ZeroShotClassification",
            "test",
            "label",
            -1,
            "'label' is not a number from 0 to 2, or one of the 3 candidate",
        ),
        ("MultilabelClassification", "test", "label", 2, "'label' is not a list of labels: 2"),
        ("MultilabelClassification", "train", "label", 2, "'label' is not a list of labels: 2"),
        ("Regression", "test", "value", float("nan"), "'value' holds a value that is no finite number"),
        ("Regression", "train", "value", float("inf"), "'value' holds a value that is no finite number"),
        ("Summarization", "test", "relevance", [5.5, 0.0, 1.0, 2.0], "'relevance' is not a number from 0 to 5: 5.5"),
        ("Summarization", "test", "relevance", [float("nan"), 0.0, 1.0, 2.0], "a number from 0 to 5: nan"),
    ],
)
def test_one_such_label_is_refused_and_counted(
    picture_model: LoadedEncoder, tmp_path: Path, task_type: str, file: str, column: str, value: Any, said: str
) -> None:
    folder = write(tmp_path / "task", task_type)
    path = folder / f"default.{file}.parquet"
    before = pq.read_table(path).to_pydict()[column]
    if task_type == "MultilabelClassification":
        rewritten(path, **{column: [value] * len(before)})
        said = said.replace("is not", "are not")
    else:
        rewritten(path, **{column: [value, *before[1:]]})
    result = evaluate(picture_model, folder, tmp_path / "out")
    assert result.scores == {} and said in result.failures["Mine"]
    assert not list(result.results_dir.glob("*.json"))


def test_queries_that_the_score_leaves_out_are_said(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.retrieval()
    pairs = [(f"q{i}", f"d{i}", 0 if i == 4 else 1) for i in range(20) if i >= 3]
    names = ("query-id", "corpus-id", "score")
    tasks.table(
        folder / "default.test.qrels.parquet", **dict(zip(names, map(list, zip(*pairs, strict=True)), strict=True))
    )
    result = evaluate(str(model_folder), folder, tmp_path / "out")
    said = {notice.code: notice.what for notice in result.notices["TinyRetrieval"]}
    assert said["queries-without-judgements"].startswith("3 of 20 queries have no judgement")
    assert said["queries-without-relevant"].startswith("1 of 20 queries have no relevant document")
    with pytest.raises(BadInputError, match="have no judgement"):
        evaluate(str(model_folder), folder, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("side", ["query-id", "corpus-id"])
def test_judgements_of_what_is_not_there_are_said_and_scored_as_mteb_does(
    tasks: Any, model_folder: Path, tmp_path: Path, side: str
) -> None:
    folder = tasks.retrieval()
    whole = evaluate(str(model_folder), folder, tmp_path / "whole").scores["TinyRetrieval"]["default"]
    qrels = pq.read_table(folder / "default.test.qrels.parquet").to_pydict()
    more = {"query-id": ["q0", "q1"], "corpus-id": ["d0", "d1"], "score": [1, 1], side: ["gone", "gone too"]}
    tasks.table(folder / "default.test.qrels.parquet", **{name: qrels[name] + more[name] for name in qrels})
    result = evaluate(str(model_folder), folder, tmp_path / "out")
    (notice,) = result.notices["TinyRetrieval"]
    assert notice.code == "judgements-of-nothing" and notice.what.startswith("2 of 27 judgements (default.test) are of")
    task = folder_task(folder).task
    model = load_encoder(str(model_folder), device="cpu").model
    theirs = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
    wanted = theirs.task_results[0].scores["test"][0]["main_score"]
    score = result.scores["TinyRetrieval"]["default"]
    assert score == pytest.approx(wanted, abs=1e-6)
    assert (score < whole - 1e-3) if side == "corpus-id" else score == whole


def test_a_score_that_is_not_defined_is_said(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    """As mteb files it: no correlation with judgements that are all alike."""
    folder = tasks.sts()
    assert evaluate(str(model_folder), folder, tmp_path / "fine").notices == {}
    rewritten(folder / "default.test.parquet", score=[2.0] * 40)
    result = evaluate(str(model_folder), folder, tmp_path / "out")
    (notice,) = result.notices["TinySTS"]
    assert np.isnan(result.scores["TinySTS"]["default"]) and notice.code == "score-undefined"
    assert "cosine_spearman of default/test is no number" in notice.what


def test_all_pairs_in_one_row_are_scored_as_pairs(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.pairs()
    expected = evaluate(str(model_folder), folder, tmp_path / "rows").scores
    columns = pq.read_table(folder / "default.test.parquet").to_pydict()
    tasks.table(folder / "default.test.parquet", **{name: [values] for name, values in columns.items()})
    result = evaluate(str(model_folder), folder, tmp_path / "row")
    assert result.failures == {} and result.scores == expected


def test_a_clustering_takes_all_texts_and_small_sets_are_scored(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.meta("Small", "Clustering", subsets=["a", "b", "c"])
    for subset, count in (("a", 25), ("b", 4), ("c", 2)):
        labels = np.random.default_rng(count).integers(0, 5, count).tolist() if count > 4 else [0, 1, 1, 0][:count]
        tasks.table(folder / f"{subset}.test.parquet", sentences=sentences(count, seed=count), labels=labels)
    result = evaluate(str(model_folder), folder, tmp_path / "out")
    assert result.failures == {} and result.scores["Small"]["a"] < 0.8, "25 random labels are not found"
    assert [notice.code for notice in result.notices["Small"]] == ["trivial-clusters"]
    random = evaluate("random", folder, tmp_path / "out")
    assert random.scores["Small"]["a"] < 0.8


@pytest.mark.parametrize(("count", "said"), [(100, "4 of 100 items"), (20, None)])
def test_what_an_official_class_draws_is_said(
    tasks: Any, model_folder: Path, tmp_path: Path, count: int, said: str | None
) -> None:
    folder = tasks.meta("Drawn", "Clustering", mteb_class="MedrxivClusteringS2S.v2")
    labels = [i % 2 for i in range(count)]
    tasks.table(folder / "default.test.parquet", sentences=sentences(count), labels=labels)
    result = evaluate(str(model_folder), folder, tmp_path / "out")
    assert result.failures == {}
    found = {notice.code: notice.what for notice in result.notices.get("Drawn", ())}
    # Four per cent of 20 would be none at all: all are taken then.
    assert (found == {}) if said is None else (said in found["sampled"] and "= 0.04" in found["sampled"])


def test_tasks_of_a_benchmark_are_not_shared_between_evaluations() -> None:
    suite = SuiteConfig(name="s", tasks=[MtebTasks(benchmark="MTEB(eng, v2)", types=["Clustering"])])
    first, second = open_suite(suite)[0].task, open_suite(suite)[0].task
    assert first is not second
    drawn = first.rng_state.random()
    assert second.rng_state.random() == drawn != first.rng_state.random()
    fresh_generators(first)
    assert first.rng_state.random() == drawn


def test_scores_are_the_same_and_no_label_is_read_by_itself(
    tasks: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tasks.classification(), load_encoder(str(model_folder), device="cpu").model
    read = 0
    iterate, get = Column.__iter__, Column.__getitem__

    def counted_iterate(self: Column) -> Any:
        nonlocal read
        for value in iterate(self):
            read += self.column_name == "label"
            yield value

    def counted_get(self: Column, key: Any) -> Any:
        nonlocal read
        read += self.column_name == "label" and isinstance(key, int | np.integer)
        return get(self, key)

    monkeypatch.setattr(Column, "__iter__", counted_iterate)
    monkeypatch.setattr(Column, "__getitem__", counted_get)
    found = []
    for whole in (False, True):
        task, read = folder_task(folder).task, 0
        task.load_data()
        if whole:
            read_columns_whole(task)
            read_columns_whole(task)
        result = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
        found.append((result.task_results[0].scores, read))
    (expected, slowly), (got, fast) = found
    assert got == expected
    assert 100 * fast < slowly, "labels of the training samples alone, once an experiment"
