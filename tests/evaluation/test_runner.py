"""Running suites: mteb's own scores and files, unit scores that add up to them, reuse, failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError
from nearfield.evaluation import MtebTasks, SuiteConfig, evaluate, open_model
from nearfield.evaluation.folder import folder_task, task_folders
from nearfield.evaluation.results import (
    TOP_SCHEMA,
    TOP_SUFFIX,
    UNIT_SCHEMA,
    UNITS_SUFFIX,
    check_scores,
    read_checked,
    read_scores,
    read_units,
)
from nearfield.evaluation.scores import AVERAGE_PRECISION, CROSSED_MEAN, MATCH_F1, MEAN_OF_EXPERIMENTS, SPEARMAN
from nearfield.evaluation.tasks import shared_clusters
from nearfield.files import DamagedError


@pytest.fixture(scope="module")
def result(every_type: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("run") / "results"
    return evaluate(str(model_folder), every_type, out)


def test_every_type_is_scored_as_mteb_scores_it(result: Any, every_type: Path, model_folder: Path) -> None:
    assert result.failures == {} and result.not_applicable == {}
    model = load_encoder(str(model_folder), device="cpu").model
    for folder in task_folders(every_type):
        task = folder_task(folder).task
        for subset, score in result.scores[folder.name].items():
            task.hf_subsets = [subset]
            theirs = mteb.evaluate(
                model, task, cache=None, show_progress_bar=False, encode_kwargs={"show_progress_bar": False}
            )
            assert score == pytest.approx(theirs.task_results[0].scores["test"][0]["main_score"], abs=1e-6)


def test_results_lie_in_the_layout_of_mteb_and_load_there(result: Any) -> None:
    folder = result.results_dir
    assert folder.parent.name == "local__tiny" and folder.name == result.revision
    cache = mteb.ResultCache(folder.parents[2])
    loaded = cache.load_task_result("TinySTS", "local/tiny", result.revision)
    assert loaded.dataset_revision.startswith("local-")
    assert loaded.get_score() == pytest.approx(result.scores["TinySTS"]["default"], abs=1e-6)
    assert json.loads((folder / "model_meta.json").read_text())["name"] == "local/tiny"
    assert sorted(path.stem for path in folder.glob("Tiny*.json")) == sorted(result.scores)


def test_units_add_up_to_the_main_score(result: Any) -> None:
    folder = result.results_dir
    means = {"TinyRetrieval": "ndcg_at_10", "TinyReranking": "map_at_1000", "TinyClassification": "accuracy"}
    for task, metric in means.items():
        table, metadata = read_units(folder, task)
        assert table.schema.names == UNIT_SCHEMA.names
        frame = table.to_pandas()
        values = frame[frame.metric == metric].value
        assert values.mean() == pytest.approx(result.scores[task]["default"], abs=5.1e-6)
        assert metadata["no_interval"] == {}
    pairs = read_units(folder, "TinySTS")[0].to_pandas().pivot(index="id", columns="metric", values="value")
    assert stats.spearmanr(pairs.gold, pairs.prediction)[0] == pytest.approx(
        result.scores["TinySTS"]["default"], abs=1e-9
    )
    for task in ("TinyPairs", "TinyClustering", "TinyBitext"):
        assert read_units(folder, task)[1]["no_interval"] == {}
    # read_scores computes each score from its units again and refuses those that do not agree
    found = {task: of.estimator for (task, _, _), of in read_scores(folder).items()}
    assert found["TinyClassification"] is CROSSED_MEAN and found["TinyPairs"] is AVERAGE_PRECISION
    assert found["TinyClustering"] is MEAN_OF_EXPERIMENTS and found["TinyBitext"] is MATCH_F1
    assert found["TinySTS"] is SPEARMAN


def test_units_that_share_content_are_clusters() -> None:
    contents = {"a": ["x", "y"], "b": ["z"], "c": ["y", "w"], **{f"u{i}": [f"v{i}"] for i in range(30)}}
    clusters = shared_clusters(contents)
    assert clusters["a"] == clusters["c"] == "a" and clusters["b"] == "b" and len(set(clusters.values())) == 32
    assert set(shared_clusters({f"u{i}": ["same"] for i in range(10)}).values()) == {"u0"}
    assert shared_clusters({f"u{i}": [str(i)] for i in range(10)}) == {}


def test_other_query_metrics_equal_those_of_mteb(result: Any) -> None:
    table = read_units(result.results_dir, "TinyRetrieval")[0].to_pandas()
    scores = json.loads((result.results_dir / "TinyRetrieval.json").read_text())["scores"]["test"][0]
    for metric in ("recall_at_10", "recall_at_100", "mrr_at_10"):
        values = table[table.metric == metric].value
        assert len(values) == 20
        assert values.mean() == pytest.approx(scores[metric], abs=1e-5)


def test_top_results_are_the_nearest_documents(result: Any, every_type: Path, model_folder: Path) -> None:
    table = pq.read_table(result.results_dir / "TinyRetrieval.top10.parquet")
    assert table.schema.names == TOP_SCHEMA.names
    top = table.to_pandas()
    assert (top.groupby("query_id")["rank"].apply(list).map(lambda ranks: ranks == list(range(1, 11)))).all()
    model = load_encoder(str(model_folder), device="cpu").model
    folder = every_type / "TinyRetrieval"
    queries = pq.read_table(folder / "default.test.queries.parquet").to_pydict()
    corpus = pq.read_table(folder / "default.test.corpus.parquet").to_pydict()
    documents = [f"{t} {x}".strip() for t, x in zip(corpus["title"], corpus["text"], strict=True)]
    similarity = model.similarity(model.encode(queries["text"]), model.encode(documents)).numpy()
    for i, query in enumerate(queries["id"]):
        expected = [corpus["id"][j] for j in np.argsort(-similarity[i])[:10]]
        assert top[top.query_id == query].doc_id.tolist() == expected


def test_a_second_run_reuses_and_overwrite_does_not(every_type: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"tasks": ["TinySTS", "TinyRetrieval"]}
    first = evaluate(str(model_folder), every_type, tmp_path / "out", **arguments)
    second = evaluate(str(model_folder), every_type, tmp_path / "out", **arguments)
    assert first.reused == () and set(second.reused) == {"TinySTS", "TinyRetrieval"}
    assert second.scores == first.scores
    third = evaluate(str(model_folder), every_type, tmp_path / "out", overwrite=True, **arguments)
    assert third.reused == () and third.scores == first.scores


def test_changed_data_or_a_broken_file_is_scored_anew(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.sts()
    first = evaluate(str(model_folder), folder, tmp_path / "out")
    tasks.sts(count=30)
    second = evaluate(str(model_folder), folder, tmp_path / "out")
    assert second.reused == () and second.scores != first.scores
    (second.results_dir / "TinySTS.json").write_text("{")
    third = evaluate(str(model_folder), folder, tmp_path / "out")
    assert third.reused == () and third.scores == second.scores


def test_a_failing_task_is_recorded_and_the_others_run(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    tasks.sts()
    broken = tasks.retrieval("TinyBroken")
    tasks.table(broken / "default.test.top_ranked.parquet", **{"query-id": ["q0"], "corpus-ids": [["nowhere"]]})
    result = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    assert set(result.scores) == {"TinySTS"}
    assert "'nowhere'" in result.failures["TinyBroken"] and "top_ranked.parquet" in result.failures["TinyBroken"]


def test_an_image_task_is_not_applicable_to_a_text_model(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    tasks.sts()
    folder = tasks.meta("MNISTZeroShot", "ZeroShotClassification")
    tasks.table(folder / "default.test.parquet", image=[b"x"], label=[0])
    result = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    assert result.failures == {} and set(result.scores) == {"TinySTS"}
    assert "image" in result.not_applicable["MNISTZeroShot"]


def test_an_official_task_without_a_connection_fails_with_one_message(model_folder: Path, tmp_path: Path) -> None:
    suite = SuiteConfig(name="official", tasks=[MtebTasks(names=["STS12"])])
    result = evaluate(str(model_folder), suite, tmp_path / "out")
    assert "hub is not reachable" in result.failures["STS12"]
    assert "mteb/sts12-sts" in result.failures["STS12"] and "\n" not in result.failures["STS12"]


def test_bm25_and_random_are_rows_like_any_other(every_type: Path, tmp_path: Path) -> None:
    bm25 = evaluate("bm25", every_type, tmp_path / "out")
    assert set(bm25.scores) == {"TinyRetrieval", "TinyReranking"} and bm25.failures == {}
    assert set(bm25.not_applicable) == {"TinySTS", "TinyClassification", "TinyPairs", "TinyClustering", "TinyBitext"}
    random = evaluate("random", every_type, tmp_path / "out")
    assert len(random.scores) == 7 and random.failures == {}
    assert bm25.scores["TinyRetrieval"]["default"] > random.scores["TinyRetrieval"]["default"] + 0.3


def test_a_name_files_the_results_elsewhere(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    result = evaluate(open_model(str(model_folder), name="me/after"), tasks.sts(), tmp_path / "kept")
    assert result.results_dir.parent == tmp_path / "kept" / "me__after"
    with pytest.raises(BadInputError, match="organisation/model"):
        evaluate(open_model(str(model_folder), name="a/b/c"), tasks.sts(), tmp_path / "kept")


def test_a_clustering_score_does_not_depend_on_the_other_subsets(
    tasks: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = tasks.clustering()
    both = evaluate(str(model_folder), folder, tmp_path / "both").scores["TinyClustering"]
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "subsets": ["two"]}))
    alone = evaluate(str(model_folder), folder, tmp_path / "alone").scores["TinyClustering"]
    assert alone["two"] == both["two"]


def test_an_aggregate_task_is_the_mean_of_its_parts(
    tasks: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    from nearfield.evaluation import runner
    from nearfield.evaluation.tasks import SuiteTask

    parts = [folder_task(tasks.sts("PartOne")).task, folder_task(tasks.sts("PartTwo", count=25)).task]

    class Both(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="Both",
            description="Two parts",
            tasks=parts,
            main_score="cosine_spearman",
            type="STS",
            eval_splits=["test"],
        )

    monkeypatch.setattr(runner, "open_suite", lambda *_, **__: [SuiteTask(Both())])
    result = evaluate(str(model_folder), tasks.root, tmp_path / "results")
    assert result.failures == {} and set(result.scores) == {"PartOne", "PartTwo", "Both"}
    mean = np.mean([result.scores[name]["default"] for name in ("PartOne", "PartTwo")])
    assert result.scores["Both"]["default"] == pytest.approx(mean, abs=1e-6)
    assert (result.results_dir / "Both.json").is_file()


def test_a_flipped_bit_in_results_is_found_and_scored_anew(
    tasks: Any, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it lies in the units and the best results; in mteb's file where it makes another score."""
    folder, out = tasks.retrieval(), tmp_path / "out"
    result = evaluate(str(model_folder), folder, out)
    files = [result.results_dir / f"TinyRetrieval{suffix}" for suffix in (UNITS_SUFFIX, TOP_SUFFIX)]
    random, found = np.random.default_rng(0), 0
    for file in files:
        whole, table = file.read_bytes(), read_checked(file)
        for place in random.choice(len(whole), 150, replace=False).tolist():
            bit = 1 << int(random.integers(8))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                now = read_checked(file)
            except (DamagedError, OSError, ValueError, pa.ArrowException):
                found += 1
                continue
            assert now.equals(table, check_metadata=False), "only what is not of the content may change unseen"
        file.write_bytes(whole)
    assert found > 150
    path = result.results_dir / "TinyRetrieval.json"
    text = path.read_text()
    assert evaluate(str(model_folder), folder, out).reused == ("TinyRetrieval",)
    for change in (
        lambda: path.write_text(text.replace('"main_score": 0.', '"main_score": 0.1', 1)),
        lambda: files[0].write_bytes(files[0].read_bytes()[:-20] + b"x" + files[0].read_bytes()[-19:]),
    ):
        change()
        again = evaluate(str(model_folder), folder, out)
        assert again.reused == () and again.scores == result.scores
        assert "the present result cannot be used and is scored anew" in caplog.text
        caplog.clear()
    path.write_text(path.read_text().replace('"ndcg_at_10": 0.', '"ndcg_at_10": 1.', 1))
    with pytest.raises(DamagedError, match="not those that were written"):
        check_scores(result.results_dir, "TinyRetrieval")
