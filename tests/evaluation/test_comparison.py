"""Comparisons from result files: estimates are mteb's, intervals and tests are those of the statistics module."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nearfield.errors import BadInputError
from nearfield.evaluation import ModelComparison, compare, evaluate, label_results
from nearfield.evaluation.results import find_results, read_units
from tests.evaluation.made import write_result


@pytest.fixture(scope="module")
def folders(
    every_type: Path, model_folder: Path, other_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    out = tmp_path_factory.mktemp("compared") / "results"
    models = [str(model_folder), str(other_model_folder), "random", "bm25"]
    return [evaluate(model, every_type, out).results_dir for model in models]


@pytest.fixture(scope="module")
def comparison(folders: list[Path]) -> ModelComparison:
    return compare(label_results(folders, ["a", "b", "random", "bm25"]), samples=400, permutations=400)


def test_estimates_are_the_main_scores_of_mteb(comparison: ModelComparison, folders: list[Path]) -> None:
    of_label = dict(zip(["a", "b", "random", "bm25"], folders, strict=True))
    assert len(comparison.scores) == 8 * 3 + 2
    for row in comparison.scores:
        scores = json.loads((of_label[row.model] / f"{row.task}.json").read_text())["scores"][row.split]
        expected = next(entry["main_score"] for entry in scores if entry["hf_subset"] == row.subset)
        assert row.score == pytest.approx(expected, abs=1e-6)
        if row.reason is None:
            assert row.low is not None and row.high is not None and row.low - 1e-9 <= row.score <= row.high + 1e-9


def test_only_scores_that_allow_it_have_intervals(comparison: ModelComparison) -> None:
    without = {row.task for row in comparison.scores if row.low is None}
    assert without == set()
    for row in [*comparison.scores, *comparison.differences]:
        assert (row.low is None) == (row.reason is not None)
    untested = [row for row in comparison.differences if row.verdict == "not tested"]
    assert {row.task for row in untested} == without
    assert all("not tested" in row.sentence and row.p is None for row in untested)


def test_differences_are_paired_and_deterministic(comparison: ModelComparison, folders: list[Path]) -> None:
    again = compare(label_results(folders, ["a", "b", "random", "bm25"]), samples=400, permutations=400)
    assert again.to_json() == comparison.to_json()
    json.dumps(comparison.to_json(), allow_nan=False)
    row = next(row for row in comparison.differences if (row.task, row.model) == ("TinyRetrieval", "b"))
    values = []
    for folder in folders[:2]:
        frame = read_units(folder, "TinyRetrieval")[0].to_pandas()
        values.append(frame[frame.metric == "ndcg_at_10"].value.to_numpy())
    assert row.difference == pytest.approx((values[1] - values[0]).mean(), abs=2e-5)
    spread = (values[1] - values[0]).std() / np.sqrt(len(values[0]))
    assert row.high - row.low == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_another_seed_and_baseline(folders: list[Path]) -> None:
    first = compare(label_results(folders[:2], ["a", "b"]), samples=200, permutations=200, seed=1)
    turned = compare(label_results(folders[:2], ["a", "b"]), baseline="b", samples=200, permutations=200, seed=1)
    for one, other in zip(first.differences, turned.differences, strict=True):
        assert one.difference == pytest.approx(-other.difference)
        if one.low is not None:
            assert one.low == pytest.approx(-other.high) and one.p == pytest.approx(other.p, abs=0.15)
    assert {row.model for row in turned.differences} == {"a"}


def test_a_clear_difference_a_nothing_and_their_sentences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.8, 200)
    a = write_result(tmp_path / "A" / "1", base.tolist())
    b = write_result(tmp_path / "B" / "1", (base + rng.normal(0.05, 0.05, 200)).tolist())
    c = write_result(tmp_path / "C" / "1", (base + rng.normal(0, 0.05, 200)).tolist())
    better, same = compare(label_results([a, b, c], ["A", "B", "C"]), samples=2000, permutations=2000).differences
    assert (better.verdict, same.verdict) == ("better", "not separable")
    assert better.sentence.startswith("B is better than A on Made: +0.0")
    assert "p = 0.0005" in better.sentence and "Holm" in better.sentence
    assert same.sentence.startswith("C is not separable from A on Made: ")
    assert better.p_adjusted == pytest.approx(2 / 2001) and better.units == better.clusters == 200
    worse = compare([b, a], samples=500, permutations=500).differences[0]
    assert worse.verdict == "worse" and worse.model == "local/A" and "after Holm" not in worse.sentence


def test_clusters_are_the_units_of_the_statistics(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    steps = np.repeat(rng.normal(0.02, 0.1, 20), 10)
    base = rng.uniform(0.3, 0.6, 200)
    clusters = [f"c{i // 10}" for i in range(200)]
    rows = {}
    for name, keys in (("single", [None] * 200), ("whole", clusters)):
        a = write_result(tmp_path / name / "A" / "1", base.tolist(), clusters=keys)
        b = write_result(tmp_path / name / "B" / "1", (base + steps).tolist(), clusters=keys)
        rows[name] = compare([a, b], samples=2000, permutations=2000).differences[0]
    assert rows["whole"].clusters == 20 and rows["single"].clusters == 200
    assert rows["whole"].difference == rows["single"].difference
    widths = {name: row.high - row.low for name, row in rows.items()}
    assert widths["whole"] > 2.5 * widths["single"] and rows["whole"].p > rows["single"].p


def test_other_data_or_units_are_not_compared(tmp_path: Path) -> None:
    a = write_result(tmp_path / "A" / "1", [0.1, 0.2, 0.3])
    b = write_result(tmp_path / "B" / "1", [0.2, 0.3, 0.4], revision="local-2")
    c = write_result(tmp_path / "C" / "1", [0.2, 0.3])
    first, second = compare([a, b, c], samples=100, permutations=100).differences
    assert first.verdict == "not tested" and "different data" in first.sentence
    assert second.verdict == "not tested" and "different units" in second.sentence


def test_units_that_do_not_give_the_main_score_are_refused(tmp_path: Path) -> None:
    a = write_result(tmp_path / "A" / "1", [0.1, 0.2, 0.3])
    b = write_result(tmp_path / "B" / "1", [0.1, 0.2, 0.3], main=0.25)
    with pytest.raises(BadInputError, match=r"0\.200000, but the task's main score is 0\.250000"):
        compare([a, b], samples=100, permutations=100)


def test_results_are_found_by_folder_and_by_name(folders: list[Path], model_folder: Path, tmp_path: Path) -> None:
    results = folders[0].parents[1]
    assert find_results(str(folders[0]), results) == folders[0]
    assert find_results(str(folders[0].parent), results) == folders[0]
    assert find_results("local/tiny", results) == find_results("tiny", results) == folders[0]
    assert find_results(str(model_folder), results) == folders[0]
    assert find_results("bm25", results) == folders[3] and find_results("random", results) == folders[2]
    with pytest.raises(BadInputError, match="Models there: local/other"):
        find_results("nobody", results)
    for revision in ("1", "2"):
        write_result(tmp_path / "r" / "local__two" / revision, [0.1])
    with pytest.raises(BadInputError, match="2 revisions"):
        find_results("local/two", tmp_path / "r")


def test_effects_count_units_and_standard_deviations(tmp_path: Path) -> None:
    a = write_result(tmp_path / "A" / "1", [0.5, 0.5, 0.5, 0.5])
    b = write_result(tmp_path / "B" / "1", [0.6, 0.7, 0.5, 0.4])
    (row,) = compare(label_results([a, b], ["A", "B"]), samples=200, permutations=200).differences
    assert (row.won, row.even, row.lost) == (2, 1, 1)
    differences = np.array([0.1, 0.2, 0.0, -0.1])
    assert row.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert row.equivalent is None and "quivalen" not in row.sentence


def test_equivalence_is_shown_or_not_and_never_assumed(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = rng.uniform(0.2, 0.8, 400)
    a = write_result(tmp_path / "A" / "1", base.tolist())
    near = write_result(tmp_path / "B" / "1", (base + rng.normal(0, 0.01, 400)).tolist())
    noisy = write_result(tmp_path / "C" / "1", (base + rng.normal(0, 0.15, 400)).tolist())
    first, second = compare(
        label_results([a, near, noisy], ["A", "B", "C"]), samples=2000, permutations=200, margin=0.005
    ).differences
    assert first.equivalent and "equivalent within 0.5 points" in first.sentence
    assert second.equivalent is False and "Equivalence within 0.5 points is not shown" in second.sentence
    with pytest.raises(BadInputError, match="between 0 and 100 points"):
        compare([a, near], margin=2.0)


def test_every_kind_of_score_says_what_its_interval_speaks_of(comparison: ModelComparison) -> None:
    scopes = {row.task: row.scope for row in comparison.scores}
    assert scopes["TinyClassification"] == "other items and other training samples"
    assert scopes["TinyClustering"].startswith("the task's own experiments")
    assert scopes["TinyPairs"] == scopes["TinySTS"] == "other pairs of the same kind"
    assert scopes["TinyRetrieval"] == "other units of the same kind"
    assert "among as many" in scopes["TinyBitext"]
